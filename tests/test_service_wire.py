"""Bodies of the training service: protocol buffers, JSON and zstd, and what is refused by name."""

from __future__ import annotations

import json
import random as chance
from typing import Any

import numpy as np
import pytest
from training import datum

from stepjax.infer.serve.errors import ApiError
from stepjax.train.losses.target_losses import TARGET_LOSSES
from stepjax.train.service.checks import TEACHER_LOSSES, ModelRoom, check_call
from stepjax.train.service.devices.micro_batches import micro_sizes
from stepjax.train.service.wire import calls
from stepjax.train.service.wire.calls import PROTOBUF, Span, inflated, read_call
from stepjax.train.service.wire.protobuf import fields, packed, written, written_map
from stepjax.train.service.wire.results import (
    SampledTokens,
    SampleResult,
    pass_to_json,
    pass_to_protobuf,
    sample_to_json,
    sample_to_protobuf,
)
from stepjax.train.service.wire.sample_requests import read_sample
from stepjax.train.service.wire.tensors import (
    listed_values,
    tensor_from_json,
    tensor_from_protobuf,
    tensor_to_json,
    tensor_to_protobuf,
)

ROOM = ModelRoom(16, 320)


def body(*data: bytes, loss: str = "cross_entropy", seq: int = 3, **config) -> bytes:
    settings = {
        name: written((2, value)) if isinstance(value, str) else written((1, float(value)))
        for name, value in config.items()
    }
    return written((1, "m"), (2, seq), *((3, item) for item in data), (4, loss), *written_map(7, settings))


GOOD = datum([5, 6, 7], target_tokens=np.array([6, 7, 8]), weights=np.array([0, 1, 0.5], np.float32))


def checked(message: bytes, **options):
    return check_call(read_call(message, PROTOBUF, **options), ROOM)


def test_a_pass_in_protocol_buffers():
    call = read_call(body(GOOD, loss="ppo", clip_low_threshold=0.9, teacher="x"), PROTOBUF)
    assert (call.model_id, call.seq_id, call.loss, call.forward_only) == ("m", 3, "ppo", False)
    assert call.config == {"clip_low_threshold": 0.9, "teacher": "x"}
    found = checked(body(GOOD)).data[0]
    assert found.tokens.tolist() == [5, 6, 7]
    assert found.targets.tolist() == [[6], [7], [8]]
    assert found.weights.tolist() == [[0], [1], [0.5]]
    assert found.flat


def test_the_same_in_json():
    given = {
        "model_id": "m",
        "seq_id": 3,
        "forward_backward_input": {
            "data": [
                {
                    "model_input": {"chunks": [{"type": "encoded_text", "tokens": [5, 6, 7]}]},
                    "loss_fn_inputs": {
                        "target_tokens": {"data": [6, 7, 8], "dtype": "int64", "shape": [3]},
                        "weights": {"data": [0, 1.0, 0.5], "dtype": "float32", "shape": [3]},
                    },
                }
            ],
            "loss_fn": "cross_entropy",
        },
    }
    found = check_call(read_call(json.dumps(given).encode(), "application/json"), ROOM)
    expected = checked(body(GOOD))
    np.testing.assert_array_equal(found.data[0].targets, expected.data[0].targets)
    np.testing.assert_array_equal(found.data[0].weights, expected.data[0].weights)
    assert found.loss == expected.loss


def test_sparse_targets_are_the_dense_ones():
    dense = np.array([[3, 0, 9], [0, 0, 0], [0, 4, 0]])
    crow, col, values = np.array([0, 2, 2, 3]), np.array([0, 2, 1]), np.array([3, 9, 4])
    csr = written((1, values.tobytes()), (2, crow.tobytes()), (3, col.tobytes()))
    sparse = tensor_from_protobuf("x", memoryview(written((2, csr), (3, 2), (4, packed((3, 3))))))
    np.testing.assert_array_equal(sparse.value, dense)
    assert listed_values(sparse).tolist() == [3, 9, 4]
    again = tensor_from_protobuf("x", memoryview(tensor_to_protobuf(sparse)))
    np.testing.assert_array_equal(again.value, dense)
    np.testing.assert_array_equal(tensor_from_json("x", tensor_to_json(sparse)).value, dense)


BAD = {
    "id past the vocabulary": (
        body(datum([5, 320, 7], target_tokens=np.arange(3), weights=np.ones(3, np.float32))),
        "320",
    ),
    "negative id": (body(datum([5, -1, 7], target_tokens=np.arange(3), weights=np.ones(3, np.float32))), "-1"),
    "target past the vocabulary": (
        body(datum([5, 6, 7], target_tokens=np.array([1, 2, 999]), weights=np.ones(3, np.float32))),
        "target_tokens",
    ),
    "wrong length": (body(datum([5, 6], target_tokens=np.arange(3), weights=np.ones(3, np.float32))), "2 tokens"),
    "weights of another length": (
        body(datum([5, 6, 7], target_tokens=np.arange(3), weights=np.ones(2, np.float32))),
        "weights",
    ),
    "no weights": (body(datum([5, 6, 7], target_tokens=np.arange(3))), "weights is missing"),
    "no targets": (body(datum([5, 6, 7], weights=np.ones(3, np.float32))), "target_tokens is missing"),
    "NaN": (
        body(datum([5, 6, 7], target_tokens=np.arange(3), weights=np.array([1, np.nan, 1], np.float32))),
        "not finite",
    ),
    "unknown input": (
        body(datum([5], target_tokens=np.arange(1), weights=np.ones(1, np.float32), mask=np.ones(1, np.float32))),
        "mask",
    ),
    "unknown loss": (body(GOOD, loss="hinge"), "cross_entropy, importance_sampling"),
    "a loss that is not served": (body(GOOD, loss="stable_reinforce"), "not public"),
    "unknown setting": (body(GOOD, clip=1.0), "clip"),
    "setting that is text": (body(GOOD, loss="ppo", clip_low_threshold="low"), "finite number"),
    "gspo without bounds": (body(GOOD, loss="gspo"), "clip_low_threshold"),
    "no data": (body(), "empty"),
    "no tokens": (body(datum([], target_tokens=np.arange(0), weights=np.ones(0, np.float32))), "no tokens"),
    "too long": (
        body(datum([1] * 17, target_tokens=np.ones(17, np.int64), weights=np.ones(17, np.float32))),
        "context has 16",
    ),
    "an image": (body(written((1, written((2, b"png"))))), "image"),
    "float targets": (
        body(datum([5], target_tokens=np.ones(1, np.float32), weights=np.ones(1, np.float32))),
        "expected int64",
    ),
    "no teacher": (body(GOOD, loss="reverse_kl"), "teacher"),
    "a shape that is too large": (
        body(
            written(
                (1, written((1, written((1, b"\0" * 4))))),
                *written_map(2, {"target_tokens": written((3, 2), (4, packed([2**40, 2**40])))}),
            )
        ),
        "shape",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_pass_is_refused_by_name(case):
    message, named = BAD[case]
    with pytest.raises(ApiError, match=named) as caught:
        checked(message)
    assert 400 <= caught.value.status < 500


@pytest.mark.parametrize("loss", [*TARGET_LOSSES, *TEACHER_LOSSES])
def test_an_input_that_is_missing_is_named(loss):
    """Of every loss, those with a teacher too."""
    taught = loss in TEACHER_LOSSES
    config: dict[str, Any] = {"teacher": "base"} if taught else {}
    if loss == "gspo":
        config = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
    names = ("weights",) if taught else TARGET_LOSSES[loss].inputs
    inputs = {"target_tokens": np.array([6, 7, 8]), **{name: np.ones(3, np.float32) for name in names}}
    assert checked(body(datum([5, 6, 7], **inputs), loss=loss, **config)).data
    for name in inputs:
        fewer = datum([5, 6, 7], **{other: value for other, value in inputs.items() if other != name})
        if name == ("weights" if taught else "sequence_ratio_mask"):
            assert checked(body(fewer, loss=loss, **config)).data
        else:
            with pytest.raises(ApiError, match=f"{name} is missing"):
                checked(body(fewer, loss=loss, **config))


def test_damaged_messages_are_refused():
    """Every prefix, and thousands of changed bytes: an error of ours or a call, never another exception."""
    spans = [Span("a:sample:0:1:0", 0, 2, sampled=False), Span("a:sample:0:1:0", 0, 1, sampled=True)]
    named = datum([5, 6, 7], spans=spans, target_tokens=[6, 7, 8], logprobs=[0.0] * 3, advantages=[1.0] * 3)
    message, random = body(named, GOOD, loss="dro", beta=0.1), chance.Random(0)
    damaged = [message[:end] for end in range(len(message))]
    for _ in range(3000):
        changed = bytearray(message)
        for _ in range(random.randint(1, 4)):
            changed[random.randrange(len(changed))] = random.randrange(256)
        damaged.append(bytes(changed))
    refused: list[ApiError] = []
    for item in damaged:
        try:
            checked(item)
        except ApiError as error:
            refused.append(error)
    assert len(refused) > len(damaged) / 2
    assert all(400 <= error.status < 500 and error.message for error in refused)


@pytest.mark.parametrize(
    "value",
    [
        {"data": [1, "a"], "dtype": "float32"},
        {"data": [1.5], "dtype": "int64"},
        {"data": [1], "dtype": "int8"},
        {"data": [1], "dtype": "float32", "shape": [2]},
        {"data": [1], "dtype": "float32", "shape": [-1]},
        {"data": [1], "dtype": "float32", "shape": [1], "sparse_crow_indices": [0, 1]},
        {"data": [2**70], "dtype": "int64"},
        {"data": True, "dtype": "float32"},
        {"data": [True], "dtype": "float32"},
        [1],
        {"data": [1], "dtype": "float32", "extra": 1},
        {"data": [1], "dtype": ["float32"]},
    ],
)
def test_a_bad_tensor_is_refused(value):
    with pytest.raises(ApiError, match="x"):
        tensor_from_json("x", value)


def test_compressed_bodies():
    zstandard = pytest.importorskip("zstandard") if calls.has_zstd() else None
    if zstandard is None:
        with pytest.raises(ApiError, match="expected none"):
            inflated(b"x", "zstd", most=10)
        return
    for frame in (
        zstandard.ZstdCompressor().compress(GOOD),
        zstandard.ZstdCompressor(write_content_size=False).compress(GOOD),
    ):
        assert inflated(frame, "zstd", most=1000) == GOOD
        for end in range(len(frame)):
            with pytest.raises(ApiError):
                inflated(frame[:end], "zstd", most=1000)
    bomb = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(10**7))
    with pytest.raises(ApiError) as caught:
        inflated(bomb, "zstd", most=10**6)
    assert caught.value.status == 413


def test_an_unknown_encoding_is_refused():
    assert inflated(b"x", "identity", most=10) == b"x"
    with pytest.raises(ApiError, match="gzip"):
        inflated(b"x", "gzip", most=10)


def test_results_of_a_pass():
    outputs = [
        {"logprobs": np.array([-1, -2], np.float32)},
        {"logprobs": np.array([-3], np.float32)},
        {"logprobs": np.array([[-1, -2], [-3, -4], [-5, -6]], np.float32)},
    ]
    found = pass_to_json(pass_to_protobuf(outputs, {"loss:sum": 2.5}))
    assert found["metrics"] == {"loss:sum": 2.5}
    assert [item["logprobs"]["data"] for item in found["loss_fn_outputs"]] == [
        [-1, -2],
        [-3],
        [-1, -2, -3, -4, -5, -6],
    ]
    assert found["loss_fn_outputs"][2]["logprobs"]["shape"] == [3, 2]


def test_results_of_a_sample():
    result = SampleResult(
        [SampledTokens((4, 2), (-0.5, -0.25), True)],
        np.array([np.nan, -1.5], np.float32),
        [(), ((7, -0.5), (8, -1.0))],
        top_width=3,
    )
    parts: dict[int, Any] = dict(fields(memoryview(sample_to_protobuf(result))))
    sequence: dict[int, Any] = dict(fields(parts[1]))
    assert sequence[1] == 0
    assert np.frombuffer(sequence[2], np.int32).tolist() == [4, 2]
    assert np.frombuffer(sequence[3], np.float32).tolist() == [-0.5, -0.25]
    scores = np.frombuffer(parts[2], np.float32)
    assert np.isnan(scores[0])
    assert scores[1] == -1.5
    table: dict[int, Any] = dict(fields(parts[3]))
    assert np.frombuffer(table[1], np.int32).tolist() == [0, 0, 0, 7, 8, 0]
    assert np.frombuffer(table[2], np.float32)[-1] == -99999.0
    assert sample_to_json(result)["prompt_logprobs"] == [None, -1.5]


PROMPT = {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]}


def test_a_sample_request():
    call = read_sample({"prompt": PROMPT, "num_samples": 3, "sampling_params": {"max_tokens": 5, "top_k": -1}})
    assert (call.prompt, call.num_samples, call.params.top_k, call.params.top_p) == ([1, 2, 3], 3, 0, 1.0)
    assert (call.params.logprobs, call.params.prompt_logprobs, call.params.ignore_eos) == (0, None, False)
    assert read_sample({"prompt": PROMPT, "sampling_params": {"stop": []}}).params.ignore_eos
    assert read_sample({"prompt": PROMPT, "sampling_params": {"stop": [3, 4]}}).params.stop_ids == (3, 4)
    assert read_sample({"prompt": PROMPT, "sampling_params": {"stop": "ab"}}).stops == ("ab",)
    seeds = [
        read_sample({"prompt": PROMPT, "sampling_params": {"seed": seed}}).params.seed for seed in (7, 2**40, 2**40)
    ]
    assert seeds[0] == 7
    assert seeds[1] == seeds[2] < 2**32


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_samples": 0}, "num_samples"),
        ({"num_samples": True}, "num_samples"),
        ({"prompt": {"chunks": [{"type": "image"}]}}, "image"),
        ({"prompt": [1]}, "prompt"),
        ({"sampling_params": None}, "sampling_params"),
        ({"sampling_params": {"temperature": "hot"}}, "temperature"),
        ({"sampling_params": {"stop": [1.5]}}, "stop"),
        ({"sampling_params": {"stop": list(range(17))}}, "16"),
        ({"sampling_params": {"min_p": 0.1}}, "min_p"),
        ({"topk_prompt_logprobs": 21}, "topk_prompt_logprobs"),
        ({"prompt_logprobs_last_n": 1}, "prompt_logprobs"),
        ({"prompt_logprobs": True, "prompt_logprobs_last_n": 3}, "1 to 2"),
        ({"prompt_alt_tokens_k": 2}, "not supported"),
        ({"target_prompt_logprobs": {"data": [1], "dtype": "int64", "shape": [1, 1]}}, "target_prompt_logprobs"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_bad_sample_request_is_refused(changes, named):
    with pytest.raises(ApiError, match=named):
        read_sample({"prompt": PROMPT, "sampling_params": {"max_tokens": 5}, **changes})


def test_micro_batches_are_hardly_padded():
    for most in (1, 2, 16, 42, 64):
        for rows in range(1, 200):
            sizes = micro_sizes(rows, most=most)
            assert 0 <= sum(sizes) - rows <= sizes[-1] / 8
            assert all(size & size - 1 == 0 and size <= most for size in sizes)
            assert sizes == sorted(sizes, reverse=True)
