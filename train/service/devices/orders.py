"""What the processes of a server do together for the models of clients: orders of plain values and arrays.

Process 0 carries each out and sends it to the others, as it does with the orders of its engine. Weights do not travel
in an order: it has their shapes, and the devices broadcast them.
"""

from __future__ import annotations

import base64
import dataclasses
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from stepjax.adapters.lora import LoraConfig
from stepjax.train.losses.target_losses import TargetInputs
from stepjax.train.packing.rows import PackedRows
from stepjax.train.service.devices.micro_batches import MicroBatch
from stepjax.train.service.devices.programs import AdamNumbers, TeacherLoss
from stepjax.train.service.state_files import HostState


@dataclass(frozen=True)
class PlaceOrder:
    """Put a model's state onto the devices, in place of what it had."""

    model: str
    lora: LoraConfig
    state: HostState
    launches: ClassVar[bool] = False  # whether it runs a program, and so needs its turn on the devices


@dataclass(frozen=True)
class HoldOrder:
    """Put an adapter that is only read onto the devices."""

    name: str
    lora: LoraConfig
    factors: dict[str, np.ndarray]
    launches: ClassVar[bool] = False


@dataclass(frozen=True)
class PassOrder:
    """A pass over a micro-batch, whose gradients are added to those of earlier ones."""

    model: str  # or an adapter that is held, for scores
    micro: MicroBatch
    index: int  # of the loss; −1: ``taught``
    numbers: tuple[float, ...]  # of the loss
    taught: TeacherLoss | None = None
    teacher: str | None = None  # an adapter that is held; None: the base
    forward_only: bool = False  # no gradients
    launches: ClassVar[bool] = True


@dataclass(frozen=True)
class StepOrder:
    """A step of AdamW with the gradients of a model, which are gone afterwards."""

    model: str
    numbers: AdamNumbers
    launches: ClassVar[bool] = True


@dataclass(frozen=True)
class ClearOrder:
    """Drop the gradients of a model."""

    model: str
    launches: ClassVar[bool] = False


@dataclass(frozen=True)
class ReadOrder:
    """Copy a model's state to process 0."""

    model: str
    launches: ClassVar[bool] = False


@dataclass(frozen=True)
class DropOrder:
    """Forget a model, or an adapter that is held."""

    name: str
    launches: ClassVar[bool] = False


@dataclass(frozen=True)
class FingerprintOrder:
    """Compute the digest of the base model's weights."""

    launches: ClassVar[bool] = False


ModelOrder = PlaceOrder | HoldOrder | PassOrder | StepOrder | ClearOrder | ReadOrder | DropOrder | FingerprintOrder
_PLAIN = {kind.__name__: kind for kind in (ClearOrder, ReadOrder, DropOrder, FingerprintOrder)}


def encode_order(order: ModelOrder) -> dict[str, Any]:
    """The order as JSON values."""
    content: dict[str, Any] = {"order": type(order).__name__}
    match order:
        case PlaceOrder(model, lora, state):
            shapes = {name: value.shape for name, value in state.arrays().items()}
            about = {"count": state.count, "num_tokens": state.num_tokens}
            return content | {"model": model, "lora": dataclasses.asdict(lora), "shapes": shapes, "about": about}
        case HoldOrder(name, lora, factors):
            shapes = {path: value.shape for path, value in factors.items()}
            return content | {"name": name, "lora": dataclasses.asdict(lora), "shapes": shapes}
        case PassOrder():
            fields = {field.name: getattr(order, field.name) for field in dataclasses.fields(order)}
            taught = None if order.taught is None else dataclasses.asdict(order.taught)
            micro = [*order.micro.rows, *order.micro.inputs, order.micro.experts]
            arrays = [None if value is None else _encoded(value) for value in micro]
            return content | fields | {"micro": arrays, "taught": taught}
        case StepOrder(model, numbers):
            return content | {"model": model, "numbers": [float(value) for value in numbers]}
        case _:
            return content | dataclasses.asdict(order)


def decode_order(content: Mapping[str, Any]) -> ModelOrder:
    """The order that `encode_order` encoded, with zeros in place of weights, which are broadcast."""
    fields = dict(content)
    kind = fields.pop("order")
    if kind in _PLAIN:
        return _PLAIN[kind](**fields)
    if kind == "StepOrder":
        return StepOrder(fields["model"], AdamNumbers(*map(np.float32, fields["numbers"])))
    if kind == "PassOrder":
        return _pass_order(fields)
    lora = LoraConfig(**fields["lora"])
    zeros = {name: np.zeros(shape, np.float32) for name, shape in fields["shapes"].items()}
    if kind == "HoldOrder":
        return HoldOrder(fields["name"], lora, zeros)
    return PlaceOrder(fields["model"], lora, HostState.of_arrays(zeros, **fields["about"]))


def _pass_order(fields: dict[str, Any]) -> PassOrder:
    *arrays, experts = [None if value is None else _decoded(value) for value in fields.pop("micro")]
    rows = len(PackedRows._fields)
    micro = MicroBatch(PackedRows(*arrays[:rows]), TargetInputs(*arrays[rows:]), experts)
    taught, numbers = fields.pop("taught"), tuple(fields.pop("numbers"))
    return PassOrder(micro=micro, numbers=numbers, taught=None if taught is None else TeacherLoss(**taught), **fields)


def _encoded(value: np.ndarray) -> list[Any]:
    return [value.dtype.str, value.shape, base64.b64encode(zlib.compress(value.tobytes(), 1)).decode()]


def _decoded(content: list[Any]) -> np.ndarray:
    dtype, shape, data = content
    return np.frombuffer(zlib.decompress(base64.b64decode(data)), dtype).reshape(shape)
