"""Masks of constrained answers, computed on separate threads, one step ahead of the device."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait

import numpy as np

from stepjax.infer.engine.answer import Answer
from stepjax.infer.engine.executor import Mask
from stepjax.infer.engine.sequence import Row, StepPlan
from stepjax.infer.guided.guide import Guide
from stepjax.infer.guided.schema_grammar import GrammarError

log = logging.getLogger(__name__)


WAIT_S = 0.02  # the longest that `Guidance.wait` blocks, so that the engine's thread still accepts commands


class Guidance:
    """Keeps the guides of an engine's answers one step ahead.

    An answer is held while the masks of its next token are being computed, and from the launch of a step that samples
    until that step is read. No step that samples is planned for a held answer, whether it decodes, prefills its prompt
    or prefills again after a preemption. Answers without a guide do not wait. Only the engine's thread calls this.
    """

    def __init__(self, threads: Executor | None = None) -> None:
        """``threads`` compute the masks; None: two threads of its own."""
        self._threads = threads or ThreadPoolExecutor(max_workers=2, thread_name_prefix="masks")
        self._pending: dict[Future[np.ndarray], Answer] = {}  # masks that held answers wait for
        self._masked_slots: set[int] = set()  # slots whose last mask on the device restricts them

    @property
    def num_pending(self) -> int:
        """Answers that wait for their masks."""
        return len(self._pending)

    def begin(self, answer: Answer, guide: Guide) -> None:
        """Guide a new answer. Its first mask is for the token that prefill samples."""
        if guide.active:
            answer.guide = guide
            self.look_ahead(answer, ())

    def look_ahead(self, answer: Answer, drafts: Sequence[int]) -> None:
        """Start computing the masks of the answer's next step, which verifies these drafts. An answer that its guide no
        longer restricts is released.
        """
        guide = answer.guide
        assert guide is not None
        if guide.active:
            answer.sequence.held = True
            answer.masks = self._threads.submit(guide.ahead, drafts)
            self._pending[answer.masks] = answer
        else:
            answer.guide = answer.masks = None
            answer.sequence.held = False

    def release(self) -> None:
        """Release the answers whose masks are ready."""
        for future in [future for future in self._pending if future.done()]:
            self._pending.pop(future).sequence.held = False

    def wait(self) -> None:
        """Block until the masks of an answer are ready, but not for long, and release it."""
        wait(self._pending, timeout=WAIT_S, return_when=FIRST_COMPLETED)
        self.release()

    def drop(self, answer: Answer) -> None:
        """Forget an answer that has ended: nobody waits for its masks, and they are not begun."""
        if answer.masks is not None:
            self._pending.pop(answer.masks, None)
            answer.masks.cancel()

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
        assert answer.masks is not None
        assert answer.masks not in self._pending, "a step that samples was planned before its masks were ready"
        answer.sequence.held = True  # until this step is read
        self._masked_slots.add(row.slot)
        return Mask(row.slot, answer.masks.result()[: 1 + plan.drafts].tobytes())

    def reset(self, slots: Iterable[int]) -> None:
        """Forget the masks of slots that another sequence takes."""
        self._masked_slots.difference_update(slots)

    def close(self) -> None:
        """Begin no more masks. It does not wait for those that are being computed."""
        self._pending.clear()
        self._threads.shutdown(wait=False, cancel_futures=True)


def fault_of(error: Exception) -> str:
    """The message about a guide's error that a client receives."""
    if isinstance(error, GrammarError):
        return str(error)
    log.error("a guide failed", exc_info=error)
    return "the grammar failed at this answer; the server's log says why"
