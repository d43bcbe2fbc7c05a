"""Generation for a fixed batch of prompts: prefill in chunks, then verify-and-draft steps until all have ended."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from stepjax.cache import SPARE_ROWS
from stepjax.infer.hosts import agreed
from stepjax.infer.runner import Runner, State
from stepjax.infer.sampler import Sampling, SamplingParams
from stepjax.infer.transcript import Delta, FinishReason, Transcript, begins_in_reasoning
from stepjax.sharding.watchdog import deadline
from stepjax.tool_parser import ToolCall

if TYPE_CHECKING:
    from stepjax.infer.load import Session

CHUNK = 512  # prompt tokens per prefill call
MAX_BATCH = 8  # prompts that run together
STEP_S = 300.0  # after which a compiled step on several hosts is taken to hang

Tools = Sequence[Mapping[str, Any]]  # function schemas in OpenAI form


@dataclass(frozen=True)
class Timing:
    """Speed of the batch a prompt ran in, without the time that compiling took."""

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    accepted_per_step: float  # tokens this answer gained per decode step: 1 without drafts, at most drafts + 1


@dataclass(frozen=True)
class Completion:
    """A finished answer."""

    ids: list[int]  # a final end-of-sequence id included
    text: str  # thinking markers included
    reasoning_content: str
    content: str
    tool_calls: list[ToolCall]
    finish_reason: FinishReason
    timing: Timing


@dataclass
class _Clock:
    """Tokens and seconds of one batch."""

    prefill_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    decoded: list[int] = field(default_factory=list)  # tokens per row
    steps: list[int] = field(default_factory=list)  # steps in which the row was active


class Batch:
    """Prompts that start together and share every step; a row stays idle once its answer has ended."""

    def __init__(
        self,
        runner: Runner,
        params: Any,
        prompts: Sequence[Sequence[int]],
        sampling: Sequence[SamplingParams],
        *,
        dtype: Any,
    ):
        self.runner, self.params, self.prompts = runner, params, prompts
        self.size = _bucket(len(prompts), 1)
        padding = [SamplingParams(temperature=0.0, seed=0)] * (self.size - len(prompts))
        self.sampling: Sampling = agreed(Sampling.of([*sampling, *padding]))
        longest = max(len(ids) + each.max_tokens for ids, each in zip(prompts, sampling, strict=True))
        self.state: State = runner.start(self.size, _bucket(longest + SPARE_ROWS, 256), dtype)
        self.clock = _Clock(decoded=[0] * len(prompts), steps=[0] * len(prompts))

    def prefill(self) -> list[int]:
        """Run the prompts; returns the first answer token of each."""
        first = [0] * len(self.prompts)
        longest = max(map(len, self.prompts))
        width = min(CHUNK, _bucket(longest, 16))
        for start in range(0, longest, width):
            arguments = (self.params, self.state, *self._chunk(start, width), self.sampling)
            run = self.runner.prefill.compiled(*arguments)
            began = time.perf_counter()
            with deadline("a prefill chunk", STEP_S):
                self.state, token_B = run(*arguments)
                drawn = np.asarray(token_B)
            self.clock.prefill_s += time.perf_counter() - began
            for row, prompt in enumerate(self.prompts):
                if start < len(prompt) <= start + width:
                    first[row] = int(drawn[row])
        self.clock.prefill_tokens += sum(map(len, self.prompts))
        return first

    def _chunk(self, start: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        ids, count = np.zeros((self.size, width), np.int32), np.zeros((self.size,), np.int32)
        follow = np.full((self.size,), -1, np.int32)
        for row, prompt in enumerate(self.prompts):
            piece = prompt[start : start + width]
            ids[row, : len(piece)], count[row] = piece, len(piece)
            if start + width < len(prompt):
                follow[row] = prompt[start + width]
        return ids, count, follow

    def step(self, active: Sequence[bool]) -> list[list[int]]:
        """One decode step; returns the new tokens of each row, none for an idle one."""
        mask = np.asarray([*active, *[False] * (self.size - len(active))])
        arguments = (self.params, self.state, mask, self.sampling)
        run = self.runner.step.compiled(*arguments)
        began = time.perf_counter()
        with deadline("a decode step", STEP_S):
            self.state, emitted = run(*arguments)
            tokens, counts = np.asarray(emitted.token_BT), np.asarray(emitted.count_B)
        self.clock.decode_s += time.perf_counter() - began
        for row, live in enumerate(active):
            self.clock.decoded[row] += int(counts[row])
            self.clock.steps[row] += live
        return [tokens[row, : counts[row]].tolist() for row in range(len(active))]

    def timing(self, row: int) -> Timing:
        clock = self.clock
        return Timing(
            prefill_tokens_per_s=clock.prefill_tokens / max(clock.prefill_s, 1e-9),
            decode_tokens_per_s=sum(clock.decoded) / clock.decode_s if clock.decode_s else 0.0,
            accepted_per_step=clock.decoded[row] / clock.steps[row] if clock.steps[row] else 0.0,
        )


class Generation:
    """Answers to a batch of prompts, as an iterator of ``(row, delta)`` while they grow.

    Closing the iterator early, or `cancel`, ends an answer where it stands; `completions` then holds what there is.
    """

    def __init__(
        self,
        session: Session,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        *,
        speculate: int | None = None,
        tools: Sequence[Tools | None] | None = None,
    ):
        """``tools`` has one entry per prompt."""
        prompts, params = [list(ids) for ids in prompts], list(params)
        params = [_fit(session, ids, each) for ids, each in zip(prompts, params, strict=True)]
        self._batch = Batch(session.runner(speculate), session.params, prompts, params, dtype=session.dtype)
        tokenizer, eos = session.tokenizer, session.config.eos_ids
        self.transcripts = [
            Transcript(
                each,
                eos_ids=eos,
                tokenizer=tokenizer,
                in_reasoning=tokenizer is not None and begins_in_reasoning(ids, tokenizer),
                tools=schemas,
            )
            for ids, each, schemas in zip(prompts, params, tools or [None] * len(prompts), strict=True)
        ]

    def __iter__(self) -> Iterator[tuple[int, Delta]]:
        new = [[token] for token in self._batch.prefill()]
        while True:
            for row, (ids, transcript) in enumerate(zip(new, self.transcripts, strict=True)):
                if ids:
                    yield row, transcript.push(ids)
            active = [transcript.finish_reason is None for transcript in self.transcripts]
            if not any(active):
                return
            new = self._batch.step(active)

    def completions(self) -> list[Completion]:
        """The answers so far; one that has not ended is closed as cancelled."""
        return [self._completion(row, transcript) for row, transcript in enumerate(self.transcripts)]

    def _completion(self, row: int, transcript: Transcript) -> Completion:
        transcript.cancel()
        assert transcript.finish_reason
        return Completion(
            ids=transcript.ids,
            text=transcript.text,
            reasoning_content=transcript.reasoning,
            content=transcript.content,
            tool_calls=transcript.calls,
            finish_reason=transcript.finish_reason,
            timing=self._batch.timing(row),
        )


def generate(
    session: Session,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    speculate: int | None = None,
    tools: Tools | None = None,
) -> list[Completion]:
    """Answer a list of prompts, each a list of token ids, `MAX_BATCH` at a time.

    Args:
      session: from `stepjax.load`.
      params: one for all, or one per prompt; None takes the checkpoint's defaults.
      speculate: MTP drafts per step, 0 … 3; None takes as many as the checkpoint has. It never changes the answer.
      tools: function schemas in OpenAI form; calls in the answer are then parsed.

    Raises:
      RequestError: an empty prompt, an id outside the vocabulary, or a prompt that leaves no room to answer.
    """
    if params is None or isinstance(params, SamplingParams):
        params = [params or session.sampling()] * len(prompts)
    schemas = [tools] * len(prompts)
    done: list[Completion] = []
    for at in range(0, len(prompts), MAX_BATCH):
        part = slice(at, at + MAX_BATCH)
        generation = Generation(session, prompts[part], params[part], speculate=speculate, tools=schemas[part])
        for _ in generation:
            pass
        done += generation.completions()
    return done


def _fit(session: Session, ids: Sequence[int], params: SamplingParams) -> SamplingParams:
    """Check a prompt and cut ``max_tokens`` to the room that the context leaves."""
    return params.replace(max_tokens=min(params.max_tokens, session.check_prompt(ids)))


def _bucket(count: int, low: int) -> int:
    """The least power of two that holds ``count``, from ``low`` on: few shapes, few compilations."""
    return max(low, 1 << (count - 1).bit_length())
