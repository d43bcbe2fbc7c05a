"""An engine that counts which experts its steps choose and moves the copies of the busiest to where they are needed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from stepjax.errors import ConfigError
from stepjax.infer.engine.answer import Answer
from stepjax.infer.engine.config import EngineConfig
from stepjax.infer.engine.engine import Engine, Update
from stepjax.infer.engine.executor import Executor, Order, Progress
from stepjax.infer.engine.followers import Channel
from stepjax.infer.expert_moves import ORDER, ExpertMoves, ExpertPlaces, LayerMove

if TYPE_CHECKING:
    from stepjax.infer.session import Session

log = logging.getLogger(__name__)

LEAST_GAIN = 0.05  # share of its tokens that the fullest rank must lose, or a layer's experts stay where they are


@dataclass(frozen=True)
class BalancedConfig(EngineConfig):
    """Settings of a `BalancedEngine`.

    Raises:
      ConfigError: a number of steps below 1, or answers are to be bitwise the same: which device adds up which experts
        of a token changes with their places.
    """

    move_every: int = 1000  # steps whose tokens are counted before experts move

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.move_every < 1:
            raise ConfigError(f"move_every: is {self.move_every}, expected at least 1 step")
        if self.deterministic:
            raise ConfigError(
                "move_every: experts that move change how a token's sums are rounded; leave deterministic out"
            )

    @property
    def counting(self) -> bool:
        return True

    def executor(self, session: Session) -> Executor:
        """As of every engine; it carries out the moves that process 0 orders.

        Raises:
          RequestError: the model has one place for each expert, or its layers run in a loop.
        """
        executor = super().executor(session)
        executor.handlers[ORDER] = ExpertPlaces(session, executor).carry_out
        return executor


class BalancedEngine(Engine):
    """An `Engine` whose model has more places than experts (`expert_slots`), and which moves the copies.

    After ``move_every`` steps it plans one layer a step, and writes a few slots between two steps where the fullest
    device would get fewer tokens. What was counted before counts half as much the next time. Answers stay the same.

    Example:
      >>> import stepjax
      >>> from stepjax.infer.balanced_engine import BalancedConfig, BalancedEngine
      >>> model = stepjax.load("step-tiny", mesh="expert=2", strategy="wide", expert_slots=10)
      >>> engine = BalancedEngine(model, BalancedConfig(num_slots=2, context=256, widths=(64,), move_every=8))
      >>> engine.add(model.encode_chat([{"role": "user", "content": "What is 467 + 358?"}]), id="sum")
      ['sum']
      >>> [update.finish_reason for update in engine.run()][-1]
      'stop'
    """

    def __init__(self, session: Session, config: BalancedConfig, *, channels: Sequence[Channel] = ()):
        super().__init__(session, config, channels=channels)
        self._every, self._places = config.move_every, ExpertPlaces(session, self.executor)
        self._load_LE = np.zeros((len(self._places.layers), session.config.num_experts), np.int64)
        self._num_counted = 0  # steps
        self._moves: ExpertMoves | None = None  # under way

    def start(self, *, progress: Progress | None = None) -> None:
        """As of every engine; compiles the program that moves experts, too, by moving none."""
        super().start(progress=progress)
        layer = self._places.layers[0]
        nothing = LayerMove(layer, {}, self._places.order(layer))
        if self.leader:
            self.leader.tell(ORDER, nothing.encoded())
        self._places.write(nothing)

    def step(self) -> list[Update]:
        """Move a few experts if they are to be moved, launch a step, and read the one before it."""
        with self._timer.host():
            self._move()
        return super().step()

    def _move(self) -> None:
        if self._moves is None:
            if self._num_counted < self._every:
                return
            self._moves = ExpertMoves(
                self._session, self.executor, self._load_LE, leader=self.leader, least_gain=LEAST_GAIN
            )
            self._load_LE, self._num_counted = self._load_LE // 2, 0
        written = self._moves.advance()
        if written is not None:
            self.stats.expert_slots_written += written
            return
        before, after = np.mean(self._moves.imbalance, axis=0).tolist()
        log.info("experts: the fullest device gets %.2f times the mean of a layer's tokens, was %.2f", after, before)
        self.stats.expert_imbalance, self._moves = after, None

    def _commit(self, order: Order, emitted: Any, launched: Sequence[Answer | None]) -> list[Update]:
        self._load_LE += emitted.load_LE
        self._num_counted += 1
        return super()._commit(order, emitted, launched)
