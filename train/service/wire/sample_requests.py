"""The body of a sample request: how many answers, to which prompt, sampled how, with which scores."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from stepjax.infer.sampling.params import MAX_LOGPROBS, MAX_STOP_IDS, SamplingParams
from stepjax.infer.serve.limits import LIMITS
from stepjax.train.service.wire.calls import prompt_tokens
from stepjax.train.service.wire.tensors import NamedTensor, bad, tensor_from_json

MAX_SAMPLES = 1024  # answers of one request
_FIELDS = {
    "num_samples",
    "prompt",
    "sampling_params",
    "base_model",
    "model_path",
    "sampling_session_id",
    "seq_id",
    "prompt_logprobs",
    "topk_prompt_logprobs",
    "topk_sample_logprobs",
    "target_prompt_logprobs",
    "prompt_alt_tokens_k",
    "prompt_logprobs_last_n",
    "record_stability_info",
    "type",
}


@dataclass(frozen=True)
class SampleCall:
    """A sample request."""

    prompt: list[int]
    num_samples: int
    params: SamplingParams  # of one answer; the i-th has seed + i
    stops: tuple[str, ...]  # strings that end an answer
    prompt_logprobs: bool
    top_prompt: int
    last_n: int | None
    targets: NamedTensor | None  # int64 [prompt − 1, K]; −1: nothing is asked


def read_sample(body: Mapping[str, Any]) -> SampleCall:
    """The request of a parsed body.

    Raises:
      ApiError: a field is not valid, or not served.
      RequestError: a sampling parameter is out of its range.
    """
    unknown = {*body} - _FIELDS
    if unknown:
        raise bad(min(unknown)[:80], "is no field of a sample request")
    prompt = prompt_tokens(body.get("prompt"), "prompt")
    if _integer(body, "prompt_alt_tokens_k", 0, 0, 2**31):
        raise bad("prompt_alt_tokens_k", "is not supported here; sample at each position instead")
    num_samples = _integer(body, "num_samples", 1, 1, MAX_SAMPLES)
    top_sample = _integer(body, "topk_sample_logprobs", 0, 0, MAX_LOGPROBS)
    top_prompt = _integer(body, "topk_prompt_logprobs", 0, 0, MAX_LOGPROBS)
    wants = _flag(body, "prompt_logprobs")
    _flag(body, "record_stability_info")
    last_n = None
    if body.get("prompt_logprobs_last_n") is not None:
        if not wants:
            raise bad("prompt_logprobs_last_n", "needs prompt_logprobs with it")
        last_n = _integer(body, "prompt_logprobs_last_n", 1, 1, max(1, len(prompt) - 1))
    scored = wants or top_prompt > 0
    params, stops = _params(body.get("sampling_params"), top_sample, top_prompt if scored else None)
    targets = body.get("target_prompt_logprobs")
    return SampleCall(
        prompt,
        num_samples,
        params,
        stops,
        wants,
        top_prompt,
        last_n,
        None if targets is None else _targets(targets, len(prompt)),
    )


def _params(given: Any, top_sample: int, top_prompt: int | None) -> tuple[SamplingParams, tuple[str, ...]]:
    if not isinstance(given, Mapping):
        raise bad("sampling_params", "expected an object")
    unknown = {*given} - {"max_tokens", "seed", "stop", "temperature", "top_k", "top_p"}
    if unknown:
        raise bad(f"sampling_params.{min(unknown)[:80]}", "is no sampling parameter of this interface")
    stop, strings, ids = given.get("stop"), (), ()
    if isinstance(stop, str):
        strings = (stop,)
    elif isinstance(stop, list):
        strings = tuple(item for item in stop if isinstance(item, str))
        ids = tuple(item for item in stop if isinstance(item, int) and not isinstance(item, bool))
        if len(strings) + len(ids) != len(stop):
            raise bad("sampling_params.stop", "expected strings or token ids")
    elif stop is not None:
        raise bad("sampling_params.stop", "expected a string, a list of strings, a list of token ids, or null")
    most, longest = int(LIMITS["stop"].high), int(LIMITS["stop_bytes"].high)
    if len(strings) > most or len(ids) > MAX_STOP_IDS:
        raise bad("sampling_params.stop", f"expected at most {most} strings or {MAX_STOP_IDS} token ids")
    if any(not text or len(text.encode("utf-8", "replace")) > longest for text in strings):
        raise bad("sampling_params.stop", f"expected strings of 1 to {longest} bytes")
    top_k = _integer(given, "top_k", -1, -1, 2**30)
    max_tokens = _integer(given, "max_tokens", 2**20, 1, 2**31)
    params = SamplingParams(
        max_tokens=min(max_tokens, 2**20),
        temperature=_number(given, "temperature", 1.0),
        top_p=_number(given, "top_p", 1.0),
        top_k=max(top_k, 0),
        min_p=0.0,
        seed=_seed(given.get("seed")),
        stop_ids=ids,
        ignore_eos=stop == [],
        logprobs=top_sample,
        prompt_logprobs=top_prompt,
    )
    return params, strings


def _seed(seed: Any) -> int:
    """A seed of 32 bits: those below 2³² as they are, others by a digest of them."""
    if seed is None:
        return secrets.randbits(32)
    if isinstance(seed, bool) or not isinstance(seed, int) or abs(seed) >= 2**64:
        raise bad("sampling_params.seed", "expected an integer of at most 64 bits")
    if 0 <= seed < 2**32:
        return seed
    return int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4], "big")


def _targets(value: Any, prompt: int) -> NamedTensor:
    name = "target_prompt_logprobs"
    tensor = tensor_from_json(name, value)
    ids = tensor.value
    if ids.dtype != np.int64 or ids.ndim != 2 or len(ids) != prompt - 1 or not ids.shape[1]:
        raise bad(name, f"has dtype {ids.dtype} and shape {list(ids.shape)}, expected int64 [{prompt - 1}, K]")
    return tensor


def _integer(body: Mapping[str, Any], name: str, default: int, low: int, high: int) -> int:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise bad(name, f"is {str(value)[:40]!a}, expected an integer from {low} to {high}")
    return value


def _number(body: Mapping[str, Any], name: str, default: float) -> float:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise bad(f"sampling_params.{name}", f"is {str(value)[:40]!a}, expected a number")
    return float(value)


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise bad(name, "expected true or false")
    return bool(value)
