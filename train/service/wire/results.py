"""Results of passes and samples: protocol buffers, and the same as JSON for clients that do not ask for them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stepjax.train.service.wire.protobuf import (
    double,
    entry,
    fields,
    nested,
    numbers,
    packed,
    text,
    written,
    written_map,
)
from stepjax.train.service.wire.tensors import FLOAT32, NamedTensor, tensor_to_json, tensor_to_protobuf

OUTPUT_TYPE = "ArrayRecord"
NO_LOGPROB = -99999.0  # of an empty place in a table of likeliest tokens


def pass_to_protobuf(outputs: Sequence[Mapping[str, np.ndarray]], metrics: Mapping[str, float]) -> bytes:
    """The result of a forward or forward_backward call.

    Args:
      outputs: of each datum, float32 [N] or [N, K] by name.
      metrics: each name has one colon, and behind it how the client reduces it over chunks.
    """
    assert all(name.count(":") == 1 for name in metrics)

    def kind(output: Mapping[str, np.ndarray]) -> Any:
        return [(name, value.shape[1:]) for name, value in output.items()]

    records = [_record(list(group)) for _, group in itertools.groupby(outputs, kind)]
    return written(
        (1, OUTPUT_TYPE),
        *((2, record) for record in records),
        *((3, written((1, name), (2, float(value)))) for name, value in metrics.items()),
    )


def _record(outputs: list[Mapping[str, np.ndarray]]) -> bytes:
    """Data whose arrays have the same trailing shapes."""
    columns: dict[str, bytes] = {}
    for name in outputs[0]:
        values = [np.ascontiguousarray(output[name], np.float32) for output in outputs]
        ends = np.cumsum([0, *(value.nbytes for value in values)], dtype=np.int64)
        data = b"".join(value.tobytes() for value in values)
        columns[name] = written((1, data), (2, ends.tobytes()), (3, FLOAT32), (4, packed(values[0].shape[1:])))
    return written((1, OUTPUT_TYPE), *written_map(2, columns), (3, len(outputs)))


def pass_to_json(result: bytes) -> dict[str, Any]:
    """The JSON of a result that `pass_to_protobuf` wrote."""
    outputs: list[dict[str, Any]] = []
    metrics: dict[str, float] = {}
    for index, value in fields(memoryview(result)):
        if index == 2:
            outputs += _read_record(nested(value, "record"))
        elif index == 3:
            name, metric = entry(value, "metrics", lambda part: double(part, "metrics"), 0.0)
            metrics[name] = metric
    return {"loss_fn_output_type": OUTPUT_TYPE, "loss_fn_outputs": outputs, "metrics": metrics}


def _read_record(record: memoryview) -> list[dict[str, Any]]:
    outputs: list[dict[str, Any]] = []
    for index, value in fields(record):
        if index != 2:
            continue
        name, column = "", memoryview(b"")
        for part, content in fields(nested(value, "fields")):
            name, column = (text(content, "name"), column) if part == 1 else (name, nested(content, "column"))
        data, ends, trailing = b"", np.zeros(0, np.int64), []
        for part, content in fields(column):
            if part == 1:
                data = bytes(nested(content, name))
            elif part == 2:
                ends = np.frombuffer(bytes(nested(content, name)), np.int64)
            elif part == 4:
                trailing += numbers(content, name)
        for place, (start, end) in enumerate(itertools.pairwise(ends.tolist())):
            array = np.frombuffer(data[start:end], np.float32).reshape(-1, *trailing)
            if place == len(outputs):
                outputs.append({})
            outputs[place][name] = tensor_to_json(NamedTensor(name, array))
    return outputs


@dataclass(frozen=True)
class SampledTokens:
    """One answer."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    stopped: bool  # False: it has all tokens that were allowed
    top: tuple[tuple[tuple[int, float], ...], ...] | None = None  # the likeliest at each token


@dataclass(frozen=True)
class SampleResult:
    """The answers to one prompt, and its own scores."""

    sequences: list[SampledTokens]
    prompt_logprobs: np.ndarray | None = None  # float32 [prompt], NaN where nothing was scored
    prompt_top: list[tuple[tuple[int, float], ...]] | None = None
    top_width: int = 0  # columns of `prompt_top`
    sample_width: int = 0  # columns of `SampledTokens.top`
    target_logprobs: NamedTensor | None = None
    num_cached: int = 0
    about: dict[str, Any] = field(default_factory=dict)


def sample_to_protobuf(result: SampleResult) -> bytes:
    sequences = [
        written(
            (1, 0 if sequence.stopped else 1),
            (2, np.asarray(sequence.tokens, np.int32).tobytes()),
            (3, np.asarray(sequence.logprobs, np.float32).tobytes()),
            (4, None if sequence.top is None else _top_to_protobuf(sequence.top, result.sample_width)),
        )
        for sequence in result.sequences
    ]
    scores, targets = result.prompt_logprobs, result.target_logprobs
    return written(
        *((1, sequence) for sequence in sequences),
        (2, None if scores is None else scores.astype(np.float32).tobytes()),
        (3, None if result.prompt_top is None else _top_to_protobuf(result.prompt_top, result.top_width)),
        (4, result.num_cached),
        (5, None if targets is None else tensor_to_protobuf(targets)),
    )


def sample_to_json(result: SampleResult) -> dict[str, Any]:
    out: dict[str, Any] = {
        "type": "sample",
        "sequences": [
            {
                "stop_reason": "stop" if sequence.stopped else "length",
                "tokens": list(sequence.tokens),
                "logprobs": list(sequence.logprobs),
                **({} if sequence.top is None else {"topk_logprobs": [[list(p) for p in row] for row in sequence.top]}),
            }
            for sequence in result.sequences
        ],
        "prompt_cache_hit_tokens": result.num_cached,
    }
    if result.prompt_logprobs is not None:
        values = result.prompt_logprobs.tolist()
        out["prompt_logprobs"] = [None if value != value else value for value in values]
    if result.prompt_top is not None:
        out["topk_prompt_logprobs"] = [[list(pair) for pair in row] or None for row in result.prompt_top]
    if result.target_logprobs is not None:
        out["target_prompt_logprobs"] = tensor_to_json(result.target_logprobs)
    return out


def _top_to_protobuf(rows: Sequence[Sequence[tuple[int, float]]], width: int) -> bytes:
    ids, logprobs = np.zeros((len(rows), width), np.int32), np.full((len(rows), width), NO_LOGPROB, np.float32)
    for place, row in enumerate(rows):
        for rank, (token, logprob) in enumerate(row[:width]):
            ids[place, rank], logprobs[place, rank] = token, logprob
    return written((1, ids.tobytes()), (2, logprobs.tobytes()), (3, width), (4, len(rows)))
