"""Adapters that an engine serves together: their factors, stacked on the device, and the names and slots in use.

A stack has a fixed number of slots of a fixed rank, so that loading an adapter compiles nothing. A sequence uses the
block of its own slot (`stepjax.weights.adapted`). Requests that began with an adapter finish with it, even if it is
unloaded or replaced; its slot is free when they have ended, and no answer is computed with two versions.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import threading
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from stepjax.adapters.lora import TARGETS, LoraConfig, adapted_paths, check_fit, targets
from stepjax.checkpoint.hf_config import as_stored
from stepjax.errors import RequestError
from stepjax.model.layer_tables import flat_paths, stacked_path
from stepjax.model.step3p5 import axes_of
from stepjax.sharding.expert_order import slot_experts
from stepjax.weights.adapted import Adapted, factor_axes

if TYPE_CHECKING:
    from stepjax.infer.session import Session

NONE = -1  # the adapter slot of sequences without an adapter


@dataclass(frozen=True)
class StackSize:
    """Number of adapter slots, and their largest ranks."""

    num_slots: int
    rank: int
    expert_rank: int


class AdapterStack:
    """The factors of all slots, beside the weights of a model."""

    def __init__(self, session: Session, size: StackSize):
        self.size = size
        lora = LoraConfig(rank=size.rank, targets=_targets(session), experts="per_expert", expert_rank=size.expert_rank)
        self._targets = {target.path: target for target in targets(as_stored(session.config), lora)}
        self._experts = _held_experts(session, self._targets)
        axes, layout = axes_of(session.model), session.model.layout
        self._period = session.model.period
        self.params: dict[str, Any] = dict(session.table)
        for path, weight in session.table.items():
            flat = flat_paths(path, self._period)
            if (target := self._targets.get(flat[0])) is None:
                continue
            stack = (len(flat),) if path != flat[0] else ()
            a_shape, b_shape = target.a_shape, target.b_shape
            if flat[0] in self._experts:
                a_shape, b_shape = ((session.config.num_slots, *shape[1:]) for shape in (a_shape, b_shape))
            *lead, rank, size_in = (*stack, *a_shape)
            shapes = (*lead, size.num_slots * rank, size_in), (*stack, *b_shape[:-1], size.num_slots * rank)
            axes_of_factors = factor_axes(axes[path], a_ndim=len(shapes[0]), b_ndim=len(shapes[1]))
            a, b = (
                _zeros(shape, session.dtype, layout.parameter(*names))
                for shape, names in zip(shapes, axes_of_factors, strict=True)
            )
            self.params[path] = Adapted(weight, a, b, slots=size.num_slots)

    @property
    def num_bytes(self) -> int:
        """Bytes of all slots' factors, on all devices together."""
        return sum(w.a.nbytes + w.b.nbytes for w in self.params.values() if isinstance(w, Adapted))

    def check(self, adapter: Mapping[str, Any]) -> None:
        """Raise RequestError unless an adapter fits a slot, ConfigError if it belongs to another model."""
        for path in adapted_paths(adapter):
            target, a, b = self._targets.get(path), adapter[f"{path}.a"], adapter[f"{path}.b"]
            if target is None:
                raise RequestError(f"adapter: {path} cannot be adapted here")
            check_fit(path, target.shape, a.shape, b.shape)
            if a.shape[-2] > target.rank:
                raise RequestError(
                    f"adapter: has rank {a.shape[-2]} at {path}, but the engine has room for {target.rank}; give it a "
                    "larger adapter rank"
                )

    def write(self, slot: int, adapter: Mapping[str, Any], lora: LoraConfig) -> None:
        """Put an adapter's factors into a slot; what it does not adapt becomes zero there.

        The arrays are new ones: a step that is under way still has the old.
        """
        for path, target in self._targets.items():
            a, b = np.zeros(target.a_shape, np.float32), np.zeros(target.b_shape, np.float32)
            if f"{path}.a" in adapter:
                rank = adapter[f"{path}.a"].shape[-2]
                a[..., :rank, :] = np.asarray(adapter[f"{path}.a"], np.float32)
                b[..., :rank] = np.asarray(adapter[f"{path}.b"], np.float32) * np.float32(lora.scale(rank))
            held = stacked_path(path, self._period)
            self.params = self.params | {held.path if held else path: self._written(path, slot, a, b)}

    def change(self, params: Mapping[str, Any]) -> None:
        """Go on with other arrays. Adapters that are loaded from now on find the experts where ``copies`` says."""
        self.params = {**self.params, **params}
        for path in self._experts:
            if (table := params.get(f"{path.partition('.experts.')[0]}.copies")) is not None:
                slots = len(self._experts[path])
                self._experts[path] = slot_experts(np.asarray(table), slots)

    def warm(self) -> None:
        """Compile what `write` runs; no slot is changed."""
        for path, target in self._targets.items():
            self._written(path, 0, np.zeros(target.a_shape, np.float32), np.zeros(target.b_shape, np.float32))

    def _written(self, path: str, slot: int, a: np.ndarray, b: np.ndarray) -> Adapted:
        """A weight with these factors in a slot; the stack keeps its own."""
        if path in self._experts:
            a, b = a[self._experts[path]], b[self._experts[path]]
        held = stacked_path(path, self._period)
        weight, first = self.params[held.path if held else path], slot * self._targets[path].rank
        layer = 0
        if held:
            a, b, layer = a[None], b[None], held.turn
        put_a, put_b = _put(weight.a, axis=-2), _put(weight.b, axis=-1)
        return dataclasses.replace(
            weight,
            a=put_a(weight.a, _placed(a, weight.a), layer, first),
            b=put_b(weight.b, _placed(b, weight.b), layer, first),
        )


def _held_experts(session: Session, paths: Iterable[str]) -> dict[str, np.ndarray]:
    """By weight of experts some of which have copies: the expert in each slot."""
    held: dict[str, np.ndarray] = {}
    for path in paths if session.config.expert_slots else ():
        if ".moe.experts." in path:
            table = session.params[f"{path.partition('.experts.')[0]}.copies"]
            held[path] = slot_experts(np.asarray(table), session.config.expert_slots)
    return held


class AdapterPin:
    """A version of an adapter that a request has been promised. While a pin exists, no other adapter takes its slot."""

    def __init__(self, key: str):
        self.key, self.ended = key, False

    def end(self) -> None:
        """End it before it is garbage; no later `Engine.add` may use it. Answers that have begun keep their version."""
        self.ended = True


class AdapterNames:
    """The slot and the version of each adapter name, and which versions are still in use. Plain Python; `pin` and
    `names` may be called from any thread.
    """

    def __init__(self, num_slots: int):
        self._num_slots = num_slots
        self._lock = threading.Lock()  # of _keys and _pins
        self._pins: weakref.WeakSet[AdapterPin] = weakref.WeakSet()
        self._keys: dict[str, str] = {}  # name → the version that new requests use
        self._slots: dict[str, int] = {}  # version → slot, also of versions that only running answers use
        self._versions = itertools.count(1)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._keys)

    def key(self, name: str) -> str:
        """The version of an adapter that a new request uses.

        Raises:
          RequestError: no adapter has that name.
        """
        return self.pin(name).key if name else ""

    def pin(self, name: str) -> AdapterPin:
        """The version that is loaded now, kept for a request that has not begun.

        Raises:
          RequestError: no adapter has that name.
        """
        with self._lock:
            if name not in self._keys:
                known = ", ".join(self._keys) or "none"
                raise RequestError(f"adapter: {name[:80]!a} is not loaded; loaded are {known}")
            pin = AdapterPin(self._keys[name])
            self._pins.add(pin)
        return pin

    def slot(self, key: str) -> int:
        """The slot of a version."""
        return self._slots[key] if key else NONE

    def reserve(self, name: str, in_use: Collection[str], *, replace: bool) -> int:
        """A free slot for an adapter.

        Raises:
          RequestError: the name or all slots are in use.
        """
        if not name or len(name) > 256 or not name.isprintable():
            raise RequestError(f"adapter: the name {name[:80]!a} is empty, too long or not printable")
        if name in self._keys and not replace:
            raise RequestError(f"adapter: {name[:80]!a} is loaded already; unload it first, or ask to replace it")
        in_use = {*in_use, *self._pinned()}
        self._release(in_use)
        taken = {*self._slots.values()}
        free = next((slot for slot in range(self._num_slots) if slot not in taken), None)
        if free is None and name in self._keys and self._keys[name] not in in_use:
            return self._slots[self._keys[name]]  # no running answer uses the old version
        if free is None:
            raise RequestError(  # without names: some are not for every client to see
                f"adapter: all {self._num_slots} slots are taken, by {len(self._keys)} adapters or by versions that "
                "still answer; unload one, or give the engine more"
            )
        return free

    def enter(self, name: str, slot: int) -> None:
        """From now on, new requests for ``name`` use the adapter in ``slot``."""
        for key in [key for key, held in self._slots.items() if held == slot]:
            del self._slots[key]
        key = f"{name}@{next(self._versions)}"
        with self._lock:
            self._keys[name], self._slots[key] = key, slot

    def remove(self, name: str) -> None:
        """Hide an adapter from new requests.

        Raises:
          RequestError: no adapter has that name.
        """
        self.key(name or "\0")
        with self._lock:
            del self._keys[name]

    def _pinned(self) -> set[str]:
        """Versions that requests have been promised."""
        with self._lock:
            return {pin.key for pin in self._pins if not pin.ended}

    def _release(self, in_use: Collection[str]) -> None:
        kept = {*self._keys.values(), *in_use}
        self._slots = {key: slot for key, slot in self._slots.items() if key in kept}


def _targets(session: Session) -> tuple[str, ...]:
    """The targets that a model has."""
    dense = any(not layer.moe for layer in session.config.layers)
    moe = any(layer.moe for layer in session.config.layers)
    return tuple(name for name in TARGETS if (name != "dense" or dense) and (name != "shared" or moe))


def _zeros(shape: tuple[int, ...], dtype: Any, where: Any) -> jax.Array:
    """Committed to its place, as what `_put` returns: else the second adapter would be loaded by another program."""
    zeros = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=where)()
    return jax.device_put(zeros, zeros.sharding)


def _placed(value: np.ndarray, like: jax.Array) -> jax.Array:
    """``value`` with the dtype and the sharding of ``like``; each process makes its own shards."""
    value = value.astype(like.dtype)
    return jax.make_array_from_callback(value.shape, like.sharding, lambda index: value[index])


@functools.cache
def _putter(axis: int, where: Any) -> Callable[..., jax.Array]:
    def put(stack: jax.Array, value: jax.Array, layer: Any, start: Any) -> jax.Array:
        at = [jnp.int32(0)] * stack.ndim
        at[0], at[axis] = jnp.int32(layer), jnp.int32(start)
        return jax.lax.dynamic_update_slice(stack, value, at)

    return jax.jit(put, out_shardings=where)


def _put(stack: jax.Array, *, axis: int) -> Callable[..., jax.Array]:
    return _putter(axis, stack.sharding)
