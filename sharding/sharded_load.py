"""From safetensors to arrays on a mesh: each process reads the slices that its own devices hold, each of them once."""

from __future__ import annotations

import re
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from stepjax.checkpoint.read_ahead import AHEAD, read_ahead
from stepjax.checkpoint.reader import ExpertForms, ProgressCallback, read_as
from stepjax.checkpoint.slices import Index
from stepjax.checkpoint.source import WeightSource
from stepjax.weights.expert_format import ExpertFormat
from stepjax.weights.fp8_rows import is_dense_map
from stepjax.weights.plain import PLAIN
from stepjax.weights.quantised import Quantised, Weight, leaf_shardings, quantised_from

# Weights whose first axis is the experts as the router numbers them.
_BY_EXPERT = re.compile(r"layers\.(\d+)\.moe\.(?:experts\.(?:gate|up|down)|router\.(?:weight|bias))")

Read = np.ndarray | Quantised
ExpertOrder = Mapping[int, Sequence[int]]  # by layer: our expert (or slot) j holds the stored expert order[j]


@dataclass(frozen=True)
class LoadReport:
    """What one process did to load its part."""

    process: int
    num_weights: int
    bytes_read: int  # of the files, scales included; a slice that several devices hold counts once
    placed_bytes: int  # on this process's devices
    seconds: float
    peak_growth_bytes: int  # of resident memory, from the start to its peak; a CPU's arrays are part of it

    @property
    def gb_per_s(self) -> float:
        """Read speed in 10⁹ bytes a second."""
        return self.bytes_read / max(self.seconds, 1e-9) / 1e9


def load_sharded(
    checkpoint: WeightSource,
    shardings: Mapping[str, Sharding],
    dtype: Any,
    *,
    experts: ExpertForms = None,
    dense: ExpertFormat = PLAIN,
    expert_order: ExpertOrder | None = None,
    progress: ProgressCallback | None = None,
) -> tuple[dict[str, Weight], LoadReport]:
    """Every weight on its devices.

    Args:
      shardings: by our path, one for each weight of the checkpoint. A quantised weight must not be cut inside what
        shares a scale (`stepjax.sharding.rules` refuses that).
      experts: how to hold the routed experts: all of them, or each weight by its path; None: as the checkpoint has
        them in memory.
      dense: how to hold the linear maps beside them (`stepjax.checkpoint.reader.read_as`).
      expert_order: relabel experts while reading, so that busy ones lie on different devices; answers do not change.
        If an order names experts twice, their weights are read as often, and the router's stay as they are stored.
      progress: called with (bytes read, bytes that this process will read).
    """
    assert set(shardings) == set(checkpoint.paths), set(shardings) ^ set(checkpoint.paths)
    began, before = time.perf_counter(), _resident_bytes()
    read = _Reader(checkpoint, dtype, experts=experts, dense=dense, order=expert_order or {})
    slices = [piece for path in checkpoint.paths for piece in _slices(read, path, shardings[path])]
    total, done, placed_bytes = sum(piece.num_bytes for piece in slices), 0, 0
    arrays: dict[str, list[Any]] = {}
    limit = (1 + AHEAD) * _largest(slices)
    for piece, value in read_ahead(slices, read, lambda piece: piece.num_bytes, limit=limit):
        copies = [jax.device_put(value if part is None else _columns(value, part), to) for to, part in piece.devices]
        arrays.setdefault(piece.path, []).extend(jax.block_until_ready(copies))
        placed_bytes += sum(copy.nbytes for copy in copies)
        done += piece.num_bytes
        if progress:
            progress(done, total)
    params = {path: _assembled(read.shape(path), shardings[path], pieces) for path, pieces in arrays.items()}
    report = LoadReport(
        process=jax.process_index(),
        num_weights=len(params),
        bytes_read=total,
        placed_bytes=placed_bytes,
        seconds=time.perf_counter() - began,
        peak_growth_bytes=_peak_bytes() - before,
    )
    return params, report


@dataclass(frozen=True)
class _Slice:
    """A part of a weight, and the devices of this process that hold it, or some columns of it."""

    path: str
    index: Index
    devices: tuple[tuple[Any, slice | None], ...]  # None: all columns
    num_bytes: int  # in the file


def _slices(read: _Reader, path: str, sharding: Sharding) -> Iterator[_Slice]:
    shape = read.shape(path)
    holders: dict[tuple[tuple[int, int], ...], list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        ranges, columns = [part.indices(size)[:2] for part, size in zip(index or (), shape, strict=True)], None
        if read.whole_rows(path) and ranges[-1] != (0, shape[-1]):  # read once, whoever holds which columns
            columns, ranges[-1] = slice(*ranges[-1]), (0, shape[-1])
        holders.setdefault(tuple((start, stop) for start, stop in ranges), []).append((device, columns))
    for ranges, devices in holders.items():
        index = tuple(slice(start, stop) for start, stop in ranges)
        num_bytes = sum(read.checkpoint.stored_bytes(path, part) for part in read.stored(path, index))
        yield _Slice(path, index, tuple(devices), num_bytes)


def _largest(slices: Sequence[_Slice]) -> int:
    """Bytes of the weight of which this process reads most."""
    by_weight: Counter[str] = Counter()
    for piece in slices:
        by_weight[piece.path] += piece.num_bytes
    return max(by_weight.values())


@dataclass(frozen=True)
class _Reader:
    """Reads slices into memory of their own: pages of a view would count as resident and could change with the file."""

    checkpoint: WeightSource
    dtype: Any
    experts: ExpertForms
    dense: ExpertFormat
    order: ExpertOrder

    def __call__(self, piece: _Slice) -> Read:
        parts = [self._part(piece.path, index) for index in self.stored(piece.path, piece.index)]
        return parts[0] if len(parts) == 1 else jax.tree.map(lambda *pieces: np.concatenate(pieces), *parts)

    def _part(self, path: str, index: Index) -> Read:
        return read_as(self.checkpoint, path, self.dtype, self.experts, dense=self.dense, index=index, copy=True)

    def whole_rows(self, path: str) -> bool:
        """Whether a weight is quantised while it is read, with scales of whole rows, which all of a row decides."""
        return self.dense.quantised and is_dense_map(path)

    def shape(self, path: str) -> tuple[int, ...]:
        """Of a whole weight as it is held: as many experts as the order names."""
        first, *rest = self.checkpoint.shape(path)
        order = self._order(path)
        return (first if order is None else len(order), *rest)

    def _order(self, path: str) -> Sequence[int] | None:
        """The stored experts of a weight, one after the other. Copies have one row of the router between them."""
        match = _BY_EXPERT.fullmatch(path)
        order = self.order.get(int(match[1])) if match else None
        return None if order is None or (".router." in path and len(set(order)) < len(order)) else order

    def stored(self, path: str, index: Index) -> list[Index]:
        """Where a slice lies in the file: more than one run of experts if they are relabelled or copied."""
        order = self._order(path)
        if order is None:
            return [index]
        chosen = list(order[index[0]])
        starts = [i for i, expert in enumerate(chosen) if i == 0 or expert != chosen[i - 1] + 1]
        runs = zip(starts, [*starts[1:], len(chosen)], strict=True)
        return [(slice(chosen[i], chosen[i] + j - i), *index[1:]) for i, j in runs]


def _assembled(shape: tuple[int, ...], sharding: Sharding, pieces: list[Any]) -> Any:
    """The global array (or quantised weight) of which this process holds ``pieces``."""
    first = pieces[0]
    if not isinstance(first, Quantised):
        return jax.make_array_from_single_device_arrays(shape, sharding, pieces)
    parts = zip(*(piece.leaves for piece in pieces), strict=True)
    places = leaf_shardings(first.format, sharding, ndim=len(shape))
    leaves = zip(first.format.shapes(shape), places, parts, strict=True)
    whole = [jax.make_array_from_single_device_arrays(size, place, list(held)) for size, place, held in leaves]
    return quantised_from(whole, first.format)


def _columns(value: Any, part: slice) -> Quantised:
    """Some columns of a quantised weight whose scales are those of whole rows."""
    return replace(value, q=np.ascontiguousarray(value.q[..., part]))


def _resident_bytes() -> int:
    """Resident memory now, where the system tells it (Linux), else its peak so far."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return _peak_bytes()
    return pages * resource.getpagesize()


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
