"""The engine's record of an unfinished answer: what ends it, and the scores and experts of its tokens."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from stepjax.infer.engine.sequence import Row, Sequence, StepPlan
from stepjax.infer.guided.guide import Guide
from stepjax.infer.sampling.params import SamplingParams
from stepjax.infer.steps.state import NO_EXPERT


class TokenScore(NamedTuple):
    """Log-probabilities at one position: of its token, and of the most likely tokens."""

    logprob: float
    top: tuple[tuple[int, float], ...]  # token id and log-probability, most likely first


class ExpertRecord:
    """The experts that each token of one sequence was sent to.

    A token that runs again, after a preemption or in a later turn, keeps its first experts: the token after it was
    sampled with those.
    """

    def __init__(self) -> None:
        self._ids: np.ndarray | None = None  # uint16 [room, L, A]

    def take(self, start: int, ids_TLA: np.ndarray) -> None:
        """Record the experts of the tokens from ``start`` on; `NO_EXPERT` marks a token that did not run."""
        end = start + len(ids_TLA)
        room = np.empty((0, *ids_TLA.shape[1:]), np.uint16) if self._ids is None else self._ids
        if end > len(room):
            more = np.full((2 * end - len(room), *ids_TLA.shape[1:]), NO_EXPERT, np.uint16)
            room = self._ids = np.concatenate([room, more])
        held = room[start:end]
        np.copyto(held, ids_TLA, where=held == NO_EXPERT)

    def first(self, num_tokens: int) -> np.ndarray | None:
        """Experts of the first ``num_tokens`` tokens, uint16 [tokens, MoE layers, A]; None if no token ran."""
        return None if self._ids is None else self._ids[:num_tokens].copy()


@dataclass(eq=False)
class Answer:
    """An unfinished answer."""

    sequence: Sequence
    ends: frozenset[int]  # ids that end it
    guide: Guide | None = None  # while it restricts the answer
    masks: Future[np.ndarray] | None = None  # for the next step
    fault: str = ""
    experts: ExpertRecord = field(default_factory=ExpertRecord)
    _prompt: list[TokenScore | None] | None = None

    def cut(self, tokens: list[int]) -> tuple[tuple[int, ...], bool]:
        """The tokens up to the first that ends the answer, and whether there is one within ``max_tokens``.

        Raises:
          GrammarError: the grammar does not allow a token at its position.
        """
        room = self.sequence.params.max_tokens - len(self.sequence.output)
        tokens = tokens[:room]
        if self.guide is None and self.ends.isdisjoint(tokens):
            return tuple(tokens), False
        for i, token in enumerate(tokens):
            if self.guide is not None:
                self.guide.push(token)
            if token in self.ends or (self.guide is not None and self.guide.done):
                return tuple(tokens[: i + 1]), True
        return tuple(tokens), False

    def scores(self, logprobs: Any, place: int, count: int) -> tuple[TokenScore, ...]:
        """Scores of the ``count`` tokens of a row, if the request asks for them."""
        top = self.sequence.params.logprobs
        return () if top is None else tuple(_score(logprobs, (place, column), top) for column in range(count))

    def take_experts(self, row: Row, plan: StepPlan, expert_ids: np.ndarray, count: int) -> None:
        """Record the experts of the tokens that a step added to the cache: a piece of a prompt, or the newest token and
        the accepted drafts, one for each of the ``count`` new tokens.
        """
        if plan.kind == "prefill":
            self.experts.take(row.start, expert_ids[: row.count])
        else:
            self.experts.take(self.sequence.num_tokens - 1, expert_ids[:count])

    def take_prompt(self, row: Row, logprobs: Any) -> None:
        """Record the scores of the prompt tokens that follow the tokens of a piece."""
        prompt, top = self.sequence.prompt, self.sequence.params.prompt_logprobs
        scores: list[TokenScore | None] = [None] * (len(prompt) - 1) if self._prompt is None else self._prompt
        for position in range(row.start, min(row.start + row.count, len(prompt) - 1)):
            scores[position] = _score(logprobs, position - row.start, top or 0)
        self._prompt = scores

    def give_prompt(self) -> tuple[TokenScore, ...]:
        """The scores of the whole prompt, once."""
        if self._prompt is None or None in self._prompt:
            return ()
        scores, self._prompt = self._prompt, []
        self.sequence.params = self.sequence.params.replace(prompt_logprobs=None)
        return tuple(score for score in scores if score is not None)


def split_request(id: str, params: SamplingParams) -> list[tuple[str, SamplingParams]]:
    """The id and the parameters of each of the ``params.n`` answers to a request.

    A single answer has the request's own id; of several, answer i is ``id/i`` and is sampled with seed + i. Only
    the first reports the scores of the prompt.
    """
    if params.n == 1:
        return [(id, params)]
    first = params.replace(n=1)
    others = first.replace(prompt_logprobs=None)
    return [(f"{id}/{i}", (others if i else first).replace(seed=(params.seed + i) % 2**32)) for i in range(params.n)]


def _score(logprobs: Any, index: Any, top: int) -> TokenScore:
    ids, values = logprobs.top_id_BTN[index][:top].tolist(), logprobs.top_BTN[index][:top].tolist()
    return TokenScore(float(logprobs.token_BT[index]), tuple(zip(ids, values, strict=True)))
