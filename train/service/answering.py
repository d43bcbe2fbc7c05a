"""Sample requests as answers of the engine, together with everybody else's."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from stepjax.errors import RequestError
from stepjax.infer.engine.adapters import AdapterPin
from stepjax.infer.engine.admission import QueueFullError
from stepjax.infer.engine.engine import Update
from stepjax.infer.sampling.params import MAX_ANSWERS
from stepjax.infer.serve.errors import ApiError
from stepjax.infer.serve.service import EngineRequest, Service
from stepjax.infer.session import Session
from stepjax.text.tokenizer import Tokenizer
from stepjax.train.service.promises import Promise
from stepjax.train.service.recorded_experts import RecordedExperts, SequenceExperts
from stepjax.train.service.wire.results import SampledTokens, SampleResult
from stepjax.train.service.wire.sample_requests import SampleCall

FULL_S = 0.1  # between attempts while the engine's queue is full


def fitted(service: Service, session: Session, call: SampleCall) -> list[EngineRequest]:
    """The requests of the engine for a call: at most `MAX_ANSWERS` answers each, the first with the prompt's scores.

    Raises:
      RequestError: the prompt or a parameter does not fit the model.
    """
    if not call.prompt:
        raise RequestError("prompt: has no tokens, expected at least one")
    requests: list[EngineRequest] = []
    for first in range(0, call.num_samples, MAX_ANSWERS):
        params = call.params.replace(
            n=min(MAX_ANSWERS, call.num_samples - first), seed=(call.params.seed + first) % 2**32
        )
        if first:
            params = params.replace(prompt_logprobs=None)
        requests.append(EngineRequest(tuple(call.prompt), service.engine.fit(call.prompt, params)))
    capacity = service.engine.config.num_slots + service.engine.config.max_waiting
    if call.num_samples > capacity:
        raise RequestError(f"num_samples: is {call.num_samples}, expected at most {capacity}, which may run and wait")
    return requests


async def answered(
    service: Service,
    session: Session,
    call: SampleCall,
    requests: Sequence[EngineRequest],
    pin: AdapterPin | None,
    promise: Promise,
    *,
    salt: str,
    recorded: RecordedExperts | None = None,
) -> SampleResult:
    """The answers to a call.

    Args:
      recorded: gets the experts of each answer's tokens.

    Raises:
      ApiError: an answer ended in an error.
    """
    await service.ready.wait()
    wanted = [request._replace(adapter=pin, salt=salt) for request in requests]
    while True:
        try:
            submission = service.submit(wanted, whole=not call.stops)
            break
        except QueueFullError:
            promise.queue_state = "paused_capacity"
            await asyncio.sleep(FULL_S)
    promise.queue_state = "active"
    tokenizer = session.tokenizer
    ended = [_Ending(call.stops, tokenizer) for _ in range(call.num_samples)]
    prompt_scores, num_cached = (), 0
    try:
        while submission.open or any(ending.reason is None for ending in ended):
            for index, update in await submission.take():
                prompt_scores = prompt_scores or update.prompt_scores
                num_cached = max(num_cached, update.num_cached)
                if ended[index].push(update) and not update.finish_reason:
                    ended[index].experts = await service.finish_with_experts(submission, index)
    finally:
        service.close(submission)
    for ending in ended:
        if ending.reason not in ("stop", "length"):
            raise ApiError(
                f"sample: an answer ended with {ending.reason}; its logits were not finite", status=500, code="error"
            )
    if recorded is not None and service.engine.config.routing:
        for id, ending in zip(promise.about["sample_sequence_ids"], ended, strict=True):
            await asyncio.to_thread(_record, recorded, id, call.prompt, ending)
    return _result(call, ended, prompt_scores, num_cached)


def _record(recorded: RecordedExperts, id: str, prompt: Sequence[int], ending: _Ending) -> None:
    """Keep the experts of an answer."""
    if ending.experts is not None:
        tokens = np.asarray([*prompt, *ending.tokens], np.int32)
        experts = ending.experts[: len(tokens)]
        recorded.write(id, SequenceExperts(tokens[: len(experts)], len(prompt), np.ascontiguousarray(experts)))


def _result(call: SampleCall, ended: Sequence[_Ending], prompt_scores: Sequence, num_cached: int) -> SampleResult:
    width = call.params.logprobs or 0
    sequences = [
        SampledTokens(
            tuple(ending.tokens),
            tuple(score.logprob for score in ending.scores),
            ending.reason == "stop",
            tuple(score.top for score in ending.scores) if width else None,
        )
        for ending in ended
    ]
    logprobs = top = None
    if call.prompt_logprobs or call.top_prompt:
        scored = call.last_n if call.last_n is not None else len(call.prompt)
        first = len(call.prompt) - min(scored, len(prompt_scores))
        kept = prompt_scores[len(prompt_scores) - (len(call.prompt) - first) :]
        if call.prompt_logprobs:
            logprobs = np.full((len(call.prompt),), np.nan, np.float32)
            logprobs[first:] = [score.logprob for score in kept]
        if call.top_prompt:
            top = [()] * first + [score.top for score in kept]
    return SampleResult(
        sequences,
        logprobs,
        top,
        top_width=call.top_prompt,
        sample_width=width,
        num_cached=num_cached,
    )


@dataclass(eq=False)
class _Ending:
    """One answer, with its end: the engine's, or the token that completes a stop string."""

    stops: tuple[str, ...]
    tokenizer: Tokenizer | None
    tokens: list[int] = field(default_factory=list)
    scores: list = field(default_factory=list)
    reason: str | None = None
    experts: np.ndarray | None = None  # `Update.experts`

    def push(self, update: Update) -> bool:
        """Take an update; True: a stop string has ended the answer now."""
        if self.reason is not None:
            return False
        scores = update.scores or (None,) * len(update.tokens)
        for token, score in zip(update.tokens, scores, strict=True):
            self.tokens.append(token)
            if score is not None:
                self.scores.append(score)
            if self.stops and self._stopped():
                self.reason, self.experts = "stop", update.experts
                return True
        if update.finish_reason:
            self.reason, self.experts = update.finish_reason, update.experts
        return False

    def _stopped(self) -> bool:
        """Whether the newest token completes a stop string. Each token has a byte at least, so a few hold it."""
        if self.tokenizer is None:
            raise ApiError("stop: this checkpoint has no tokenizer.json, so give token ids", code="invalid_value")
        longest = max(len(stop.encode()) for stop in self.stops)
        recent = self.tokenizer.token_bytes(self.tokens[-longest:])
        newest = len(self.tokenizer.token_bytes(self.tokens[-1:]))
        stops = [stop.encode() for stop in self.stops]
        return any(recent.find(stop, max(0, len(recent) - newest - len(stop) + 1)) >= 0 for stop in stops)
