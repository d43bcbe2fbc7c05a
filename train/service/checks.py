"""What a call must be before it is queued: its data against the model, its loss against the table of losses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from stepjax.train.losses.divergence import Kind
from stepjax.train.losses.target_losses import CONFIG_NAMES, TARGET_LOSSES, TargetLoss
from stepjax.train.service.devices.micro_batches import Datum
from stepjax.train.service.devices.programs import TeacherLoss
from stepjax.train.service.wire.calls import Config, GivenDatum, Span, TrainCall
from stepjax.train.service.wire.tensors import NamedTensor, bad

# Losses over the whole vocabulary, which are an extension: name → kind of divergence.
TEACHER_LOSSES: dict[str, Kind] = {"reverse_kl": "reverse", "forward_kl": "forward", "jsd": "jsd"}
_REFUSED = {
    "stable_reinforce": "its formula is not public; use importance_sampling, ppo or cispo",
    "custom": "it needs a loss that the server stores; losses of your own run in the client (forward_backward_custom)",
}
MAX_TARGETS = 256  # of a position; exact distillation over the vocabulary is the loss reverse_kl


@dataclass(frozen=True)
class CheckedLoss:
    """The loss of a call, with numbers for its program."""

    index: int  # in `TARGET_LOSSES`; -1: `taught`
    numbers: tuple[float, ...]  # of `CONFIG_NAMES`
    taught: TeacherLoss | None = None
    teacher: str = ""  # of `taught`: the base model's name, or a path


@dataclass(frozen=True)
class ModelRoom:
    """What data must fit."""

    context: int  # tokens of the longest datum
    num_tokens: int  # ids are below


@dataclass(frozen=True)
class CheckedCall:
    """A call that can run."""

    data: list[Datum]
    loss: CheckedLoss
    forward_only: bool

    @property
    def num_tokens(self) -> int:
        return sum(len(datum.tokens) for datum in self.data)


def check_call(call: TrainCall, room: ModelRoom) -> CheckedCall:
    """The call as arrays.

    Raises:
      ApiError: an unknown loss or setting, a missing or unknown input, wrong shapes, ids that the model does not have,
        numbers that are not finite, or no data.
    """
    loss = check_loss(call.loss, call.config)
    if not call.data:
        raise bad("data", "is empty, expected at least one datum")
    rule = TARGET_LOSSES.get(call.loss) or TargetLoss(call.loss, ("weights",), {})
    data = [_datum(item, f"data[{place}]", rule, room) for place, item in enumerate(call.data)]
    if loss.taught is not None and any(datum.width > 1 for datum in data):
        raise bad("target_tokens", f"{call.loss} takes one target a position, found several")
    return CheckedCall(data, loss, call.forward_only)


def check_loss(name: str, config: Config) -> CheckedLoss:
    """The loss of a name with its settings."""
    if name in _REFUSED:
        raise bad("loss_fn", f"{name!r} is not served: {_REFUSED[name]}")
    if name in TEACHER_LOSSES:
        return _teacher_loss(name, config)
    rule = TARGET_LOSSES.get(name)
    if rule is None:
        known = ", ".join((*TARGET_LOSSES, *TEACHER_LOSSES))
        raise bad("loss_fn", f"{name[:80]!a} is unknown; there are {known}")
    settings = _settings(name, config, rule.config)
    if "clip_low_threshold" in settings and not 0 <= settings["clip_low_threshold"] <= settings["clip_high_threshold"]:
        raise bad("loss_fn_config", "expected 0 ≤ clip_low_threshold ≤ clip_high_threshold")
    numbers = tuple(settings.get(key, 0.0) for key in CONFIG_NAMES)
    return CheckedLoss(list(TARGET_LOSSES).index(name), numbers)


def _settings(name: str, config: Config, known: Mapping[str, float | None]) -> dict[str, float]:
    settings: dict[str, float] = {}
    for key, value in config.items():
        if key not in known:
            there = f"it has {', '.join(known)}" if known else "it has none"
            raise bad("loss_fn_config", f"{key[:80]!a} is no setting of {name}; {there}")
        if isinstance(value, str) or not math.isfinite(value) or abs(value) > 1e30:
            raise bad("loss_fn_config", f"{key} is {str(value)[:40]!a}, expected a finite number")
        settings[key] = float(value)
    for key, default in known.items():
        if key not in settings:
            if default is None:
                raise bad("loss_fn_config", f"{name} needs {key}, which has no default")
            settings[key] = default
    return settings


def _teacher_loss(name: str, config: Config) -> CheckedLoss:
    config = dict(config)
    teacher = config.pop("teacher", "")
    if not isinstance(teacher, str) or not teacher:
        raise bad("loss_fn_config", f"{name} needs teacher: the name of the base model, or a tinker:// path")
    settings = _settings(name, config, {"beta": 0.5} if name == "jsd" else {})
    beta = settings.get("beta", 0.5)
    if not 0 < beta < 1:
        raise bad("loss_fn_config", f"beta is {beta}, expected a number between 0 and 1, the ends excluded")
    return CheckedLoss(-1, (0.0,) * len(CONFIG_NAMES), TeacherLoss(TEACHER_LOSSES[name], beta), teacher)


def _datum(item: GivenDatum, what: str, rule: TargetLoss, room: ModelRoom) -> Datum:
    tokens, count = item.tokens, len(item.tokens)
    if not count:
        raise bad(f"{what}.model_input", "has no tokens")
    if count > room.context:
        raise bad(f"{what}.model_input", f"has {count} tokens, but the context has {room.context}; shorten it")
    _check_ids(f"{what}.model_input", tokens, room)
    known = {"target_tokens", *rule.inputs, "weights"}
    unknown = {*item.inputs} - known
    if unknown:
        raise bad(
            f"{what}.loss_fn_inputs", f"{min(unknown)[:80]!a} is no input of {rule.name}; it takes {_list(known)}"
        )
    optional = "weights" if rule.name in TEACHER_LOSSES else "sequence_ratio_mask"  # both are 1 if they are absent
    for name in ("target_tokens", *rule.inputs):
        if name not in item.inputs and name != optional:
            raise bad(f"{what}.loss_fn_inputs", f"{name} is missing, which {rule.name} needs")
    targets = _rows(item.inputs["target_tokens"], count)
    if targets.dtype != np.int64:
        raise bad(f"{what}.target_tokens", "has dtype float32, expected int64")
    flat = targets.ndim == 1
    if not flat and rule.is_rl and targets.shape[1] != 1:
        raise bad(f"{what}.target_tokens", f"{rule.name} takes one target a position, found {targets.shape[1]}")
    targets = targets.reshape(count, -1)
    if not 1 <= targets.shape[1] <= MAX_TARGETS:
        raise bad(f"{what}.target_tokens", f"has {targets.shape[1]} targets a position, expected 1 to {MAX_TARGETS}")
    _check_ids(f"{what}.target_tokens", targets, room)
    weights = _numbers(item.inputs.get("weights"), f"{what}.weights", targets.shape, count, 1.0)
    column = (count,)
    return Datum(
        tokens.astype(np.int32),
        targets.astype(np.int32),
        weights,
        _numbers(item.inputs.get("logprobs"), f"{what}.logprobs", column, count, 0.0),
        _numbers(item.inputs.get("advantages"), f"{what}.advantages", column, count, 0.0),
        _numbers(item.inputs.get("sequence_ratio_mask"), f"{what}.sequence_ratio_mask", column, count, 1.0),
        flat,
        _spans(item, f"{what}.model_input_spans"),
    )


def _spans(item: GivenDatum, name: str) -> tuple[Span, ...]:
    """The spans, which have to tile the tokens."""
    if any(not 0 <= part < 2**31 for span in item.spans for part in (span.offset, span.length)):
        raise bad(name, "has an offset or a length below 0")
    covered = sum(span.length for span in item.spans)
    if item.spans and covered != len(item.tokens):
        raise bad(name, f"covers {covered} tokens, but the input has {len(item.tokens)}")
    return item.spans


def _check_ids(name: str, ids: np.ndarray, room: ModelRoom) -> None:
    outside = ids[(ids < 0) | (ids >= room.num_tokens)]
    if len(outside):
        raise bad(name, f"has the token id {int(outside.ravel()[0])}, expected ids from 0 to {room.num_tokens - 1}")


def _rows(tensor: NamedTensor, count: int) -> np.ndarray:
    value = tensor.value
    if value.ndim not in (1, 2) or len(value) != count:
        raise bad(
            tensor.name, f"has shape {list(value.shape)[:8]}, but the input has {count} tokens; expected one row each"
        )
    return value


def _numbers(tensor: NamedTensor | None, name: str, shape: Sequence[int], count: int, missing: float) -> np.ndarray:
    if tensor is None:
        return np.full(shape, missing, np.float32)
    value = _rows(tensor, count).astype(np.float32)
    if value.size != int(np.prod(shape)):
        raise bad(name, f"has shape {list(value.shape)}, expected {list(shape)}")
    if not np.isfinite(value).all():
        raise bad(name, "has a value that is not finite")
    return value.reshape(shape)


def _list(names: set[str]) -> str:
    return ", ".join(sorted(names))
