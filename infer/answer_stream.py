"""One answer as its readers see it: the engine's updates go in, text, ids, scores and the end come out."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from stepjax.infer.engine.answer import TokenScore
from stepjax.infer.engine.engine import Update
from stepjax.infer.transcript import Delta, FinishReason, Transcript


class AnswerDelta(NamedTuple):
    """What some updates added to an answer."""

    delta: Delta
    ids: tuple[int, ...]
    scores: tuple[TokenScore, ...]  # of the ids, if the request asks for them
    finish_reason: FinishReason | None
    ended_early: bool  # the text ended before the engine knew: call `Engine.finish`


class AnswerStream:
    """Reads the updates of one answer, and keeps what they add up to.

    An answer ends where its transcript or the engine ends it, whichever comes first; later updates add nothing.
    """

    def __init__(self, transcript: Transcript):
        self.transcript = transcript
        self.scores: list[TokenScore] = []  # of the ids, if the request asks for them
        self.prompt_scores: tuple[TokenScore, ...] = ()
        self.experts: np.ndarray | None = None  # uint16 [prompt and answer, MoE layers, A], at the end
        self.num_decode_steps = 0  # steps that brought tokens, without the one that read the prompt's end
        self.fault = ""  # why the answer ended in an error, unless its logits were not finite

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.transcript.finish_reason

    def take(self, *updates: Update) -> AnswerDelta:
        """Read updates in the order in which the engine gave them."""
        transcript = self.transcript
        num_ids, num_scores = len(transcript.ids), len(self.scores)
        delta, ended_early = Delta(), False
        for update in updates:
            if transcript.finish_reason:
                break
            before = len(transcript.ids)
            self.num_decode_steps += before > 0 and bool(update.tokens)
            delta = delta.join(transcript.push(update.tokens))
            self.scores += update.scores[: len(transcript.ids) - before]
            self.prompt_scores = self.prompt_scores or update.prompt_scores
            ended_early = transcript.finish_reason is not None and update.finish_reason is None
            if update.finish_reason:  # an error, or a grammar that nothing may follow, ends it without a token
                delta = delta.join(transcript.end(update.finish_reason))
                self.experts, self.fault = update.experts, update.fault
        return AnswerDelta(
            delta,
            tuple(transcript.ids[num_ids:]),
            tuple(self.scores[num_scores:]),
            transcript.finish_reason,
            ended_early,
        )
