"""From a request's body to the engine's request: the prompt, the sampling parameters, and how to read the answer."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stepjax.errors import RequestError
from stepjax.infer.sampling.params import SamplingParams
from stepjax.infer.serve.formats import check_tool_choice, constraint_of
from stepjax.infer.serve.limits import LIMITS
from stepjax.infer.serve.schemas import ChatRequest, SampledRequest
from stepjax.infer.serve.service import EngineRequest
from stepjax.infer.serve.thinking import thinking_of
from stepjax.infer.transcript import Transcript, begins_in_reasoning
from stepjax.text.chat import read_template_kwargs
from stepjax.text.tool_calls import CallSchemas

if TYPE_CHECKING:
    from stepjax.infer.engine.engine import Engine
    from stepjax.infer.session import Session
    from stepjax.text.tokenizer import Tokenizer


# Sampling parameters whose errors name them otherwise than requests do.
_NAMES = {"stop_ids": "stop_token_ids", "allowed_ids": "allowed_token_ids"}


@dataclass(frozen=True)
class TranscriptOptions:
    """How the answers to a prompt are read."""

    tokenizer: Tokenizer | None
    eos_ids: tuple[int, ...]
    in_reasoning: bool = False
    tools: CallSchemas | None = None
    include_stop: bool = False
    skip_special: bool = True
    verbatim: bool = False  # after the thinking no text is a marker or a call
    max_calls: int | None = None  # tool calls after which an answer ends

    def transcript(self, params: SamplingParams) -> Transcript:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return Transcript(params, **fields)


def read_chat(engine: Engine, session: Session, body: ChatRequest) -> tuple[EngineRequest, TranscriptOptions]:
    """The engine's request for a conversation, and how to read its answer.

    It renders and tokenises, which is too slow for an event loop.

    Raises:
      RequestError, TemplateError: the request is invalid.
    """
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError("top_logprobs: is given, expected logprobs to be true with it")
    check_tool_choice(body.tool_choice)
    ids, tools = encode_prompt(session, body)
    max_tokens = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    top = (body.top_logprobs or 0) if body.logprobs else None
    tokenizer = session.tokenizer
    assert tokenizer is not None, "encode_chat needs it"
    in_reasoning = begins_in_reasoning(ids, tokenizer)
    request = engine_request(engine, session, body, ids, max_tokens=max_tokens, logprobs=top)
    constraint = constraint_of(session, body, in_reasoning=in_reasoning, tools=tools)
    verbatim = constraint is not None and constraint.matcher is not None and not constraint.calls
    options = transcript_options(
        session,
        body,
        in_reasoning=in_reasoning,
        tools=None if verbatim or tools is None else CallSchemas(tools),
        verbatim=verbatim,
        max_calls=1 if body.parallel_tool_calls is False else None,
    )
    return request._replace(constraint=constraint), options


def encode_prompt(session: Session, body: ChatRequest) -> tuple[list[int], list[dict[str, Any]] | None]:
    """The token ids of a conversation's prompt, and the tools in it; errors as `read_chat`."""
    tools = offered_tools(body.tools, body.tool_choice)
    options = template_options(session, body)
    return session.encode_chat(body.messages, tools=tools, **options), tools


def template_options(session: Session, body: ChatRequest) -> dict[str, Any]:
    """What a request says of the prompt beside messages and tools, as keyword arguments of `Session.encode_chat`."""
    names = session.template.options if session.template else ()
    options = read_template_kwargs(body.chat_template_kwargs, names)
    options["enable_thinking"] = thinking_of(body).enabled
    options["continue_final_message"] = continues(body)
    if body.add_generation_prompt is False and not options["continue_final_message"]:
        raise RequestError(
            "add_generation_prompt: is false, expected true, or continue_final_message: an answer begins with it"
        )
    return options


def continues(body: ChatRequest) -> bool:
    """Whether the answer goes on from the last message: if the request says so, or says nothing and that message is a
    begun answer.

    Raises:
      RequestError: the fields contradict each other.
    """
    if body.continue_final_message and body.add_generation_prompt:
        raise RequestError("continue_final_message: is true, expected add_generation_prompt to be false with it")
    if body.continue_final_message is not None:
        return body.continue_final_message
    last = body.messages[-1]
    if body.add_generation_prompt or len(body.messages) < 2 or not isinstance(last, Mapping):
        return False
    is_begun = last.get("content") or last.get("reasoning_content") or last.get("reasoning")
    return last.get("role") == "assistant" and bool(is_begun) and not last.get("tool_calls")


def offered_tools(tools: list[dict[str, Any]] | None, choice: Any) -> list[dict[str, Any]] | None:
    """The tools that go into the prompt; None if none may be called."""
    if not tools or choice == "none":
        return None
    size, most = len(json.dumps(tools, ensure_ascii=False).encode()), LIMITS["tools_bytes"].high
    if size > most:
        raise RequestError(f"tools: have {size} bytes in all, expected at most {most}")
    return tools


def stop_strings(stop: Any) -> tuple[str, ...]:
    """The stop strings of a request."""
    given = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if not isinstance(given, list) or not all(isinstance(text, str) for text in given):
        raise RequestError("stop: expected a text or a list of texts")
    check_count("stop", "stop", len(given))
    low, high = LIMITS["stop_bytes"].low, LIMITS["stop_bytes"].high
    for index, text in enumerate(given):
        if not low <= len(text.encode()) <= high:
            raise RequestError(f"stop[{index}]: has {len(text.encode())} bytes, expected {low} to {high}")
    return tuple(given)


@contextmanager
def _sent_names(place: str) -> Iterator[None]:
    """Errors name fields as the request does; its prompt is at ``place``."""
    try:
        yield
    except RequestError as error:
        names = {**_NAMES, "tokens": place}
        text = re.sub(rf"^({'|'.join(names)})(?=:)", lambda match: names[match[0]], str(error))
        error.args = (text, *error.args[1:])
        raise


def engine_request(
    engine: Engine,
    session: Session,
    body: SampledRequest,
    ids: list[int],
    *,
    max_tokens: int | None,
    logprobs: int | None,
    place: str = "messages",
) -> EngineRequest:
    """The engine's request for one prompt, its sampling parameters checked and cut to the context.

    Args:
      place: of the prompt in the request, for errors.

    Raises:
      RequestError: the request is invalid; its own names are in the message.
    """
    with _sent_names(place):
        if body.truncate_prompt_tokens is not None:
            ids = ids[-body.truncate_prompt_tokens :]
        bias = body.logit_bias or {}
        params = session.sampling(
            max_tokens=session.config.max_positions if max_tokens is None else max_tokens,
            temperature=_float(body.temperature),
            top_p=_float(body.top_p),
            top_k=None if (top_k := body.sampled("top_k")) is None else max(0, top_k),
            min_p=_float(body.sampled("min_p")),
            repetition_penalty=_float(body.sampled("repetition_penalty")),
            presence_penalty=_float(body.presence_penalty),
            frequency_penalty=_float(body.frequency_penalty),
            seed=None if body.seed is None else body.seed % 2**32,
            n=body.n,
            stop=stop_strings(body.stop),
            stop_ids=tuple(body.stop_token_ids or ()),
            ignore_eos=body.ignore_eos or (body.nvext is not None and body.nvext.ignore_eos),
            min_tokens=body.min_tokens,
            logit_bias={_token(token): _bias(token, value) for token, value in bias.items()},
            allowed_ids=tuple(body.allowed_token_ids or ()),
            logprobs=logprobs,
            prompt_logprobs=body.prompt_logprobs,
        )
        return EngineRequest(
            tuple(ids),
            engine.fit(ids, params),
            priority=body.priority or 0,
            salt=body.cache_salt or "",
        )


def _float(value: float | None) -> float | None:
    return None if value is None else float(value)


def transcript_options(session: Session, body: SampledRequest, **options: Any) -> TranscriptOptions:
    return TranscriptOptions(
        session.tokenizer,
        tuple(session.config.eos_ids),
        include_stop=bool(body.include_stop_str_in_output or body.no_stop_trim),
        skip_special=body.skip_special_tokens is not False,
        **options,
    )


def _token(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or len(text) > 9:
        raise RequestError(f"logit_bias: has the key {text[:40]!a}, expected a token id")
    return int(text)


def _bias(token: str, value: float) -> float:
    low, high = LIMITS["logit_bias_value"].low, LIMITS["logit_bias_value"].high
    if not low <= value <= high:
        raise RequestError(f"logit_bias[{token}]: is {value}, expected {low} to {high}")
    return value


def check_count(limit: str, name: str, count: int) -> None:
    """Raise RequestError if a field has more items than ``limit`` allows."""
    most = LIMITS[limit].high
    if count > most:
        raise RequestError(f"{name}: has {count} {LIMITS[limit].of}, expected at most {most}")
