"""The body of a forward or forward_backward call: JSON or protocol buffers, plain or compressed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np

from stepjax.infer.serve.bodies import parse_json
from stepjax.infer.serve.errors import ApiError
from stepjax.train.service.wire.protobuf import damaged, double, entry, fields, nested, number, text
from stepjax.train.service.wire.tensors import NamedTensor, bad, tensor_from_json, tensor_from_protobuf

PROTOBUF = "application/x-protobuf"
Config = dict[str, float | str]


@dataclass(frozen=True)
class Span:
    """Where consecutive tokens come from: a sampled sequence, or its prompt."""

    sequence_id: str
    offset: int  # of the first, among those
    length: int
    sampled: bool  # False: of the prompt


@dataclass(frozen=True)
class GivenDatum:
    """A datum as it was sent: nothing of it has been checked against the model or the loss."""

    tokens: np.ndarray  # int64 [N]
    inputs: dict[str, NamedTensor]
    spans: tuple[Span, ...] = ()  # of the tokens; empty: nothing is said


@dataclass(frozen=True)
class TrainCall:
    """A forward or forward_backward call."""

    model_id: str
    seq_id: int
    data: list[GivenDatum]
    loss: str
    config: Config = field(default_factory=dict)
    forward_only: bool = False


def read_call(body: bytes, kind: str, *, forward_only: bool = False) -> TrainCall:
    """The call of a body that is not compressed.

    Args:
      kind: its content type.
      forward_only: the path says so, as older clients do.

    Raises:
      ApiError: the body is damaged, or of another kind.
    """
    if kind == PROTOBUF:
        return _from_protobuf(memoryview(body), forward_only=forward_only)
    if kind == "application/json":
        return _from_json(parse_json(body), forward_only=forward_only)
    raise ApiError(
        f"content-type: is {kind[:60]!a}, expected {PROTOBUF} or application/json", code="unsupported_media_type"
    )


def _from_protobuf(body: memoryview, *, forward_only: bool) -> TrainCall:
    model_id = loss = ""
    seq_id, data, old, new = 0, [], {}, {}
    for index, value in fields(body):
        if index == 1:
            model_id = text(value, "model_id")
        elif index == 2:
            seq_id = number(value, "seq_id")
        elif index == 3:
            data.append(_datum(nested(value, "data"), len(data)))
        elif index == 4:
            loss = text(value, "loss_fn")
        elif index == 5:
            key, setting = entry(value, "loss_fn_config", lambda part: double(part, "loss_fn_config"), 0.0)
            old[key] = setting
        elif index == 6:
            forward_only = forward_only or number(value, "forward_only") != 0
        elif index == 7:
            key, setting = entry(value, "loss_fn_config_v2", _setting, 0.0)
            new[key] = setting
    return TrainCall(model_id, seq_id, data, loss, new or old, forward_only)


def _setting(value: int | memoryview) -> float | str:
    out: float | str = 0.0
    for index, part in fields(nested(value, "loss_fn_config_v2")):
        if index == 1:
            out = double(part, "loss_fn_config_v2")
        elif index == 2:
            out = text(part, "loss_fn_config_v2")
    return out


def _datum(value: memoryview, place: int) -> GivenDatum:
    tokens: list[np.ndarray] = []
    inputs: dict[str, NamedTensor] = {}
    spans: list[Span] = []
    for index, part in fields(value):
        if index == 1:
            tokens.append(_chunk(nested(part, "chunk"), f"data[{place}].model_input"))
        elif index == 3:
            spans.append(_span(nested(part, "span"), f"data[{place}].model_input_spans"))
        elif index == 2:
            name, tensor = _input(nested(part, "loss_fn_inputs"), f"data[{place}].loss_fn_inputs")
            inputs[name] = tensor
    return GivenDatum(np.concatenate(tokens) if tokens else np.zeros((0,), np.int64), inputs, tuple(spans))


def _span(value: memoryview, what: str) -> Span:
    span = Span("", 0, 0, sampled=False)
    for index, part in fields(value):
        found: dict[int, Any] = {}
        for number_, data in fields(nested(part, what)):
            found[number_] = text(data, what) if number_ == 1 else number(data, what)
        span = Span(found.get(1, ""), found.get(2, 0), found.get(3, 0), sampled=index == 2)
    return span


def _input(value: memoryview, what: str) -> tuple[str, NamedTensor]:
    name, tensor = "", None
    for index, part in fields(value):
        if index == 1:
            name = text(part, f"a name of {what}")
        elif index == 2:
            tensor = part
    if tensor is None:
        raise bad(f"{what}.{name}"[:120], "has no tensor")
    return name, tensor_from_protobuf(f"{what}.{name}"[:120], tensor)


def _chunk(value: memoryview, what: str) -> np.ndarray:
    tokens = np.zeros((0,), np.int64)
    for index, part in fields(value):
        if index != 1:
            raise _no_images(what)
        for number_, data in fields(nested(part, what)):
            if number_ == 1:
                content = bytes(nested(data, what))
                if len(content) % 4:
                    raise damaged(f"{what} has {len(content)} bytes of tokens, no multiple of 4")
                tokens = np.frombuffer(content, "<i4").astype(np.int64)
    return tokens


def _no_images(what: str) -> ApiError:
    return bad(what, "holds an image or audio; this model takes text only (chunks of type encoded_text)")


def _from_json(body: Mapping[str, Any], *, forward_only: bool) -> TrainCall:
    known = {"model_id", "seq_id", "forward_backward_input", "forward_input", "forward_only", "type"}
    _only(body, known, "")
    given = body.get("forward_backward_input", body.get("forward_input"))
    if not isinstance(given, Mapping):
        raise bad("forward_backward_input", "expected an object with data and loss_fn")
    _only(given, {"data", "loss_fn", "loss_fn_config"}, "forward_backward_input.")
    model_id, loss, seq_id, data = body.get("model_id"), given.get("loss_fn"), body.get("seq_id"), given.get("data")
    if not isinstance(model_id, str):
        raise bad("model_id", "expected a string")
    if not isinstance(loss, str):
        raise bad("loss_fn", "expected a string")
    if isinstance(seq_id, bool) or not isinstance(seq_id, int):
        raise bad("seq_id", "expected an integer")
    if not isinstance(data, list):
        raise bad("data", "expected a list")
    config = given.get("loss_fn_config") or {}
    if not isinstance(config, Mapping):
        raise bad("loss_fn_config", "expected an object")
    for name, value in config.items():
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise bad(f"loss_fn_config.{name[:80]}", "expected a number or a string")
    settings: Config = {
        name: value if isinstance(value, str) else _finite(f"loss_fn_config.{name[:80]}", value)
        for name, value in config.items()
    }
    forward_only = forward_only or body.get("forward_only") is True
    return TrainCall(
        model_id, seq_id, [_json_datum(item, place) for place, item in enumerate(data)], loss, settings, forward_only
    )


def _finite(name: str, value: float) -> float:
    try:
        out = float(value)
    except OverflowError:
        out = math.inf
    if not math.isfinite(out):
        raise bad(name, "expected a finite number")
    return out


def _json_datum(item: Any, place: int) -> GivenDatum:
    what = f"data[{place}]"
    if not isinstance(item, Mapping):
        raise bad(what, "expected an object with model_input and loss_fn_inputs")
    _only(item, {"model_input", "loss_fn_inputs", "model_input_spans", "loss_fn_input_spans"}, f"{what}.")
    tokens = prompt_tokens(item.get("model_input"), f"{what}.model_input")
    inputs = item.get("loss_fn_inputs")
    if not isinstance(inputs, Mapping):
        raise bad(f"{what}.loss_fn_inputs", "expected an object of tensors")
    tensors = {name: tensor_from_json(f"{what}.loss_fn_inputs.{name}"[:120], value) for name, value in inputs.items()}
    return GivenDatum(np.asarray(tokens, np.int64), tensors, _json_spans(item.get("model_input_spans"), what))


def _json_spans(given: Any, what: str) -> tuple[Span, ...]:
    """Spans as protocol buffers have them in JSON: objects with prompt_tokens or sampled_tokens."""
    if given is None:
        return ()
    name = f"{what}.model_input_spans"
    if not isinstance(given, list) or not all(isinstance(item, Mapping) for item in given):
        raise bad(name, "expected a list of spans")
    spans: list[Span] = []
    for item in given:
        kind = "sampled_tokens" if "sampled_tokens" in item else "prompt_tokens"
        origin = item.get(kind)
        if not isinstance(origin, Mapping) or not isinstance(origin.get("sequence_id"), str):
            raise bad(name, "expected objects with prompt_tokens or sampled_tokens of a sequence_id")
        counts = [origin.get(part, 0) for part in ("offset", "length")]
        if any(isinstance(count, bool) or not isinstance(count, int) for count in counts):
            raise bad(name, "expected an offset and a length that are integers")
        spans.append(Span(origin["sequence_id"], *counts, sampled=kind == "sampled_tokens"))
    return tuple(spans)


def prompt_tokens(value: Any, what: str) -> list[int]:
    """The token ids of a ModelInput in JSON: its chunks one behind the other."""
    chunks = value.get("chunks") if isinstance(value, Mapping) else None
    if not isinstance(chunks, list):
        raise bad(what, "expected an object with a list of chunks")
    tokens: list[int] = []
    for chunk in chunks:
        if not isinstance(chunk, Mapping):
            raise bad(what, "expected chunks that are objects")
        if chunk.get("type", "encoded_text") != "encoded_text":
            raise _no_images(what)
        part = chunk.get("tokens")
        if not isinstance(part, list) or not all(
            isinstance(token, int) and not isinstance(token, bool) and -(2**63) <= token < 2**63 for token in part
        ):
            raise bad(what, "expected chunks with a list of token ids")
        tokens += part
    return tokens


def _only(value: Mapping[str, Any], known: set[str], where: str) -> None:
    unknown = {*value} - known
    if unknown:
        raise bad(f"{where}{min(unknown)[:80]}", "is no field of this request")


def inflated(body: bytes, encoding: str, *, most: int) -> bytes:
    """A body without its compression.

    Args:
      encoding: of the header content-encoding; "" and "identity" are none.
      most: bytes; a frame of few may hold any number, so what is inflated is bounded and not only what came.

    Raises:
      ApiError: the encoding is unknown, or the frame is damaged or too large.
    """
    if encoding in ("", "identity"):
        return body
    if encoding != "zstd" or not has_zstd():
        expected = "zstd or none" if has_zstd() else "none"
        raise ApiError(f"content-encoding: is {encoding[:40]!a}, expected {expected}", code="unsupported_encoding")
    zstandard: Any = import_module("zstandard")

    out = bytearray()
    try:
        with zstandard.ZstdDecompressor(max_window_size=2**27).stream_reader(body) as reader:
            while part := reader.read(2**20):
                out += part
                if len(out) > most:
                    raise ApiError(
                        f"body: expected at most {most} bytes once it is inflated", status=413, code="request_too_large"
                    )
        # The reader ends without an error where its input does; what follows is bounded, since the first frame was.
        frame = zstandard.ZstdDecompressor(max_window_size=2**27).decompressobj()
        frame.decompress(body)
    except zstandard.ZstdError as error:
        raise damaged(f"is no zstd frame ({error})") from None
    if not frame.eof or frame.unused_data:
        raise damaged("expected one whole zstd frame")
    return bytes(out)


def has_zstd() -> bool:
    """Whether bodies compressed with zstd can be read: the library is the extra ``zstd``."""
    return find_spec("zstandard") is not None


def canonical(body: Mapping[str, Any]) -> bytes:
    """JSON by which two bodies are compared."""
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
