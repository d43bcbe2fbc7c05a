"""Masks of constrained answers, computed on separate threads, one step ahead of the device."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import numpy as np

from stepjax.infer.engine.answer import Answer
from stepjax.infer.engine.executor import Mask
from stepjax.infer.engine.sequence import Row, StepPlan
from stepjax.infer.guided.guide import Constraint
from stepjax.infer.guided.schema_grammar import GrammarError

log = logging.getLogger(__name__)


class Guidance:
    """Keeps the guides of an engine's answers one step ahead.

    From the launch of a step until the masks of the next one are ready, an answer is held: no decode step of it is
    planned. Answers without a guide do not wait. Only the engine's thread calls the methods.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="masks")
        self._pending: dict[Future[np.ndarray], Answer] = {}  # masks that held answers wait for
        self._masked_slots: set[int] = set()  # slots whose last mask on the device restricts them

    @property
    def num_pending(self) -> int:
        """Answers that wait for their masks."""
        return len(self._pending)

    def begin(self, answer: Answer, constraint: Constraint) -> None:
        """Guide a new answer. Its first mask is for the token that prefill samples."""
        guide = constraint.guide()
        if guide.active:
            answer.guide, answer.sequence.held = guide, True
            answer.masks = self._threads.submit(guide.ahead, ())

    def look_ahead(self, answer: Answer, drafts: Sequence[int]) -> None:
        """Start computing the masks of the answer's next step, which verifies these drafts. An answer that its guide no
        longer restricts is released.
        """
        guide = answer.guide
        assert guide is not None
        if guide.active:
            answer.masks = self._threads.submit(guide.ahead, drafts)
            self._pending[answer.masks] = answer
        else:
            answer.guide = answer.masks = None
            answer.sequence.held = False

    def release(self) -> None:
        """Release the answers whose masks are ready."""
        for future in [future for future in self._pending if future.done()]:
            answer = self._pending.pop(future)
            if answer.masks is future:
                answer.sequence.held = False

    def wait(self) -> None:
        """Block until the masks of an answer are ready, and release it."""
        wait(self._pending, return_when=FIRST_COMPLETED)
        self.release()

    def mask(self, row: Row, answer: Answer, plan: StepPlan) -> Mask | None:
        """The mask that the device must receive before a row's step, if there is one.

        Raises:
          Exception: the answer's guide failed; `fault_of` says how.
        """
        if answer.guide is None:
            if row.slot not in self._masked_slots:
                return None
            self._masked_slots.discard(row.slot)
            return Mask(row.slot, b"")
        if plan.kind == "prefill" and row.next_id >= 0:
            return None
        answer.sequence.held = True  # until this step is read
        assert answer.masks is not None
        self._masked_slots.add(row.slot)
        return Mask(row.slot, answer.masks.result()[: 1 + plan.drafts].tobytes())

    def reset(self, slots: Iterable[int]) -> None:
        """Forget the masks of slots that another sequence takes."""
        self._masked_slots.difference_update(slots)

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)


def fault_of(error: Exception) -> str:
    """The message about a guide's error that a client receives."""
    if isinstance(error, GrammarError):
        return str(error)
    log.error("a guide failed", exc_info=error)
    return "the grammar failed at this answer; the server's log says why"
