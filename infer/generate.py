"""Answers to a list of prompts: an engine with room for them, and the text of its tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from stepjax.infer.engine.config import EngineConfig
from stepjax.infer.engine.engine import Engine
from stepjax.infer.engine.ready_programs import ProgramShape
from stepjax.infer.engine.sequence import FinishReason
from stepjax.infer.guided.guide import Constraint
from stepjax.infer.hosts import agreed
from stepjax.infer.sampling.params import SamplingParams
from stepjax.infer.transcript import AnswerStream, Delta, Transcript, begins_in_reasoning
from stepjax.startup import Startup
from stepjax.text.tool_calls import ToolCall, ToolSchemas

if TYPE_CHECKING:
    from stepjax.infer.session import Session

CHUNK = 512  # prompt tokens per prefill step
MAX_BATCH = 8  # answers that run together


@dataclass(frozen=True)
class Timing:
    """Speed of the prompts that ran together. Time spent compiling is not counted."""

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


class Generation:
    """Answers to a list of prompts, as an iterator of ``(row, delta)`` while they grow.

    If the iterator is closed early, `completions` returns the answers as far as they have grown.
    """

    def __init__(
        self,
        session: Session,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        *,
        speculate: int | None = None,
        tools: Sequence[ToolSchemas | None] | None = None,
    ):
        """
        Args:
          params: one per prompt. The rows of the ``n`` answers to a prompt follow each other.
          tools: one entry per prompt.
        """
        prompts = [list(ids) for ids in prompts]
        fitted = [_fit(session, ids, prompt_params) for ids, prompt_params in zip(prompts, params, strict=True)]
        seeds = agreed(np.asarray([prompt_params.seed for prompt_params in fitted], np.uint32)).tolist()
        fitted = [prompt_params.replace(seed=seed) for prompt_params, seed in zip(fitted, seeds, strict=True)]
        self._engine = Engine(session, _config(session, prompts, fitted, speculate))
        self._num_answers = sum(prompt_params.n for prompt_params in fitted)
        self._rows: dict[str, int] = {}  # by the engine's id
        self._streams: list[AnswerStream] = []
        tokenizer, eos = session.tokenizer, session.config.eos_ids
        for ids, prompt_params, schemas in zip(prompts, fitted, tools or [None] * len(prompts), strict=True):
            thinks = tokenizer is not None and begins_in_reasoning(ids, tokenizer)
            after = Constraint(session.masks, thinking=True) if thinks and prompt_params.min_tokens else None
            for answer_id in self._engine.add(ids, prompt_params, constraint=after):
                transcript = Transcript(
                    prompt_params, eos_ids=eos, tokenizer=tokenizer, in_reasoning=thinks, tools=schemas
                )
                self._rows[answer_id] = len(self._streams)
                self._streams.append(AnswerStream(transcript))

    def prepare(self, startup: Startup | None = None) -> None:
        """Compile at once what one answer needs, before it begins. For several answers, what they need depends on when
        they end, and is compiled where it is met.

        Args:
          startup: shows how far it is.
        """
        if self._num_answers > 1:
            return
        executor, config = self._engine.executor, self._engine.config
        assert config.speculate is not None
        shapes = [ProgramShape("decode", 1, config.speculate), ProgramShape("prefill", 1, config.widths[0])]
        if missing := executor.missing(shapes):
            with (startup or Startup()).stage("compiling", "preparing programs", unit="programs") as stage:
                executor.compile_together(missing, progress=stage.advance)

    def __iter__(self) -> Iterator[tuple[int, Delta]]:
        self.prepare()
        for update in self._engine.run():
            row = self._rows[update.id]
            stream = self._streams[row]
            if stream.finish_reason:
                continue
            added = stream.take(update)
            if added.ids:
                yield row, added.delta
            if added.ended_early:
                self._engine.finish(update.id)

    def completions(self) -> list[Completion]:
        """The answers so far; one that has not ended is closed as cancelled."""
        return [self._completion(stream) for stream in self._streams]

    def _completion(self, stream: AnswerStream) -> Completion:
        transcript, num_steps = stream.transcript, stream.num_decode_steps
        transcript.end("cancelled")
        assert transcript.finish_reason
        stats = self._engine.stats
        return Completion(
            ids=transcript.ids,
            text=transcript.text,
            reasoning_content=transcript.reasoning,
            content=transcript.content,
            tool_calls=transcript.calls,
            finish_reason=transcript.finish_reason,
            timing=Timing(
                prefill_tokens_per_s=stats.prefill_tokens / max(stats.prefill_s, 1e-9),
                decode_tokens_per_s=stats.decode_tokens / stats.decode_s if stats.decode_s else 0.0,
                accepted_per_step=(len(transcript.ids) - 1) / num_steps if num_steps else 0.0,
            ),
        )


def _config(
    session: Session, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams], speculate: int | None
) -> EngineConfig:
    """An engine with room for these prompts; sizes are powers of two, so that compiled programs are used again."""
    longest = max(len(ids) + prompt_params.max_tokens for ids, prompt_params in zip(prompts, params, strict=True))
    num_answers = sum(prompt_params.n for prompt_params in params)
    return EngineConfig(
        num_slots=min(MAX_BATCH, _bucket(num_answers, 1)),
        context=min(session.config.max_positions, _bucket(longest, 256)),
        num_snapshots=None if num_answers > 1 else 0,
        speculate=session.max_drafts if speculate is None else speculate,
        widths=(min(CHUNK, _bucket(max(map(len, prompts)), 16)),),
        token_budget=CHUNK,
        max_waiting=num_answers,
    )


def generate(
    session: Session,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    speculate: int | None = None,
    tools: ToolSchemas | None = None,
) -> list[Completion]:
    """Answer a list of prompts, each a list of token ids. At most `MAX_BATCH` answers run together.

    Args:
      session: from `stepjax.load`.
      params: one for all prompts, or one per prompt; None takes the checkpoint's defaults. With ``n`` above 1, the
        ``n`` answers to a prompt follow each other in the result.
      speculate: MTP drafts per step, 0 … 3; None takes as many as the checkpoint has. It never changes the answer.
      tools: function schemas in OpenAI form; calls in the answer are then parsed.

    Raises:
      RequestError: an empty prompt, an id outside the vocabulary, or a prompt that leaves no room to answer.

    Example:
      >>> import stepjax
      >>> model = stepjax.load("step-tiny")
      >>> prompt = model.encode_chat([{"role": "user", "content": "What is 467 + 358?"}])
      >>> stepjax.generate(model, [prompt], model.sampling(temperature=0.0, max_tokens=64))[0].content
      '825'
    """
    if params is None or isinstance(params, SamplingParams):
        params = [params or session.sampling()] * len(prompts)
    if not prompts:
        return []
    generation = Generation(session, prompts, params, speculate=speculate, tools=[tools] * len(prompts))
    for _ in generation:
        pass
    return generation.completions()


def _fit(session: Session, ids: Sequence[int], params: SamplingParams) -> SamplingParams:
    """Check a prompt and cut ``max_tokens`` to the room that the context leaves."""
    room = session.check_prompt(ids)
    return params.replace(max_tokens=min(params.max_tokens, room), min_tokens=min(params.min_tokens, room))


def _bucket(count: int, low: int) -> int:
    """The smallest power of two that is at least ``count`` and ``low``: few shapes, few compilations."""
    return max(low, 1 << (count - 1).bit_length())
