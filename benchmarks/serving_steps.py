"""Programs of the engine with arguments for them, for `gpu.py`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stepjax.config import ASSETS, ModelConfig
from stepjax.infer.sampling.state import Sampling
from stepjax.infer.session import Session
from stepjax.infer.steps.program import Program
from stepjax.infer.steps.state import Pieces, State

PAGE = 64
REPEATED = 6  # steps that are run twice


def narrow() -> ModelConfig:
    """The embedded model's widths, with whole groups of 64."""
    hub = json.loads((ASSETS / "step-tiny" / "config.json").read_text(encoding="utf-8"))
    return ModelConfig.from_hf(hub | {"moe_intermediate_size": 64})


class Call:
    """A program of the engine with arguments for it."""

    def __init__(self, session: Session, program: Program, rows: int, drafts: int, pages: int):
        self.session, self.program = session, program
        vocab = session.config.vocab_size

        def empty() -> State:
            size = (rows * pages + 1, PAGE)
            return session.runner(drafts).start_paged(rows, size, session.dtype, Sampling.empty(rows, vocab))

        self.empty = empty
        self.table = np.arange(1, 1 + rows * pages, dtype=np.int32).reshape(rows, pages)
        self.rng = np.random.default_rng(0)

    @property
    def tokens(self) -> int:
        """That one call makes or reads, if no draft is accepted."""
        raise NotImplementedError

    def rest(self) -> tuple[Any, ...]:
        """The arguments after the state."""
        raise NotImplementedError

    def first(self) -> State:
        """The state of the first call."""
        return self.empty()

    def compile(self) -> None:
        self.program.compiled(self.session.params, jax.eval_shape(self.empty), *self.rest())

    def start(self) -> Callable[[], Any]:
        """What runs the program once, its state on the device from now on."""
        held, rest = [self.first()], jax.tree.map(jnp.asarray, self.rest())
        program = self.program.compiled(self.session.params, held[0], *rest)

        def run() -> Any:
            held[0], emitted = program(self.session.params, held[0], *rest)
            return held[0].progress, emitted

        return run


class Decode(Call):
    """A step over slots whose caches are full to ``context``."""

    def __init__(self, session: Session, batch: int, context: int, drafts: int):
        super().__init__(session, session.runner(drafts).step(drafts), batch, drafts, -(-context // PAGE) + 2)
        self.batch, self.context = batch, context

    @property
    def tokens(self) -> int:
        return self.batch

    def rest(self) -> tuple[Any, ...]:
        return np.ones((self.batch,), bool), self.table

    def first(self) -> State:
        state, rng = self.empty(), np.random.default_rng(1)
        last = rng.integers(3, self.session.config.vocab_size, self.batch).astype(np.int32)
        length = jnp.full((self.batch,), self.context, jnp.int32)
        return state._replace(progress=state.progress._replace(length_S=length, last_S=jnp.asarray(last)))

    def emitted(self) -> str:
        """A digest of the tokens of a few steps from the first state on."""
        run, digest = self.start(), hashlib.sha256()
        for _ in range(REPEATED):
            _, emitted = run()
            count = np.asarray(emitted.count_B)
            for row, tokens in zip(np.asarray(emitted.token_BT), count, strict=True):
                digest.update(row[:tokens].tobytes())
        return digest.hexdigest()[:16]


class Prefill(Call):
    """One prompt read in one piece."""

    def __init__(self, session: Session, tokens: int):
        super().__init__(session, session.runner(0).prefill(), 1, 0, -(-tokens // PAGE) + 1)
        self._tokens = tokens

    @property
    def tokens(self) -> int:
        return self._tokens

    def rest(self) -> tuple[Any, ...]:
        ids = self.rng.integers(3, self.session.config.vocab_size, (1, self._tokens)).astype(np.int32)
        one = np.zeros((1,), np.int32)
        return (Pieces(ids, one + self._tokens, one - 1, one, one, self.table),)
