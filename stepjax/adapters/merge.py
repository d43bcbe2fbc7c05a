"""Add an adapter to a checkpoint's weights and write the sum as a checkpoint, an expert at a time.

A weight is widened to float32, its part of B·A added, and stored again as it was: in bfloat16 or FP8 blocks.
What has no adapter is copied byte for byte, MTP layers included. Memory holds the adapter and one weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stepjax.adapters.lora import LoraConfig, adapted_paths, check_fit
from stepjax.checkpoint.form_writer import write_form
from stepjax.checkpoint.reader import Checkpoint, ProgressCallback
from stepjax.checkpoint.writer import MAX_SHARD_BYTES, Share, save
from stepjax.errors import CheckpointError
from stepjax.packings.written import FORMS, WrittenForm
from stepjax.weights.dtypes import DTYPES
from stepjax.weights.expert_format import ExpertFormat
from stepjax.weights.finite import not_finite
from stepjax.weights.int_groups import IntGroups


@dataclass(frozen=True)
class MergeReport:
    """What became of an adapter in the precision of its base."""

    folder: Path
    num_weights: int  # that were changed
    lost: float  # norm of what rounding took from bfloat16 weights' changes, over that of these, in this process's
    # share; NaN: it has none


def merge_checkpoint(
    source: Path | str,
    target: Path | str,
    adapter: Mapping[str, Any],
    lora: LoraConfig,
    *,
    form: WrittenForm | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    share: Share | None = None,
    progress: ProgressCallback | None = None,
) -> MergeReport:
    """Write the checkpoint at ``source`` with an adapter added to its weights.

    Args:
      form: how the routed experts are written, by one process; None: as they are stored, and in bfloat16 where another
        tool quantised them.
      share: the part that this process writes; it reads only that part.

    Raises:
      CheckpointError, ConfigError: the adapter is of another model, or the target cannot be written.
    """
    checkpoint = Checkpoint(source)
    sums = Merged(checkpoint, adapter, lora)
    form = form or _form_of_integers(checkpoint)
    if form is not None:
        if share is not None:
            raise CheckpointError(f"merge: several processes run, but one alone writes --form {form.name}")
        written = write_form(target, checkpoint, form, changed=sums, max_shard_bytes=max_shard_bytes, progress=progress)
        return MergeReport(written, len(sums), sums.lost)
    folder = save(
        target,
        checkpoint.config,
        sums,
        source=source,
        experts=_experts(checkpoint, sums),
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
        share=share,
        progress=progress,
    )
    return MergeReport(folder, len(sums), sums.lost)


def _form_of_integers(checkpoint: Checkpoint) -> WrittenForm | None:
    """Integers that an earlier version spelled in its own way are written as compressed-tensors spells them."""
    held = checkpoint.experts
    if checkpoint.by_path or not isinstance(held, IntGroups):
        return None
    return FORMS[held.name].with_group(held.columns) if held.columns else FORMS[held.name]


def _experts(checkpoint: Checkpoint, sums: Mapping[str, Any]) -> ExpertFormat | None:
    """How adapted experts are stored again. Other quantised weights, as some FP8 releases have, are refused."""
    formats = {path: checkpoint.format(path) for path in sums if path not in checkpoint.packed}
    other = next((path for path, format in formats.items() if format.quantised and ".experts." not in path), None)
    if other:
        raise CheckpointError(
            f"merge: {other} is quantised in {checkpoint.folder}; only routed experts are quantised again, so widen "
            "the checkpoint first (stepjax convert --experts bf16)"
        )
    return next((format for format in formats.values() if format.quantised), None)


class Merged(Mapping[str, Any]):
    """The sums by path, each computed when it is asked for."""

    def __init__(self, checkpoint: Checkpoint, adapter: Mapping[str, Any], lora: LoraConfig):
        self._checkpoint, self._adapter, self._lora = checkpoint, adapter, lora
        self._paths = adapted_paths(adapter)
        self._rounded = self._changed = 0.0
        for path in self._paths:
            if path not in checkpoint.paths:
                raise CheckpointError(f"merge: the adapter has factors of {path}, but {checkpoint.folder} has none")
            check_fit(path, checkpoint.shape(path), adapter[f"{path}.a"].shape, adapter[f"{path}.b"].shape)

    def __getitem__(self, path: str) -> Any:
        if path not in self._paths:
            raise KeyError(path)
        return _Sum(self, path, self._checkpoint.shape(path))

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)

    @property
    def lost(self) -> float:
        return math.sqrt(self._rounded / self._changed) if self._changed else math.nan

    def matrix(self, path: str, lead: tuple[int, ...]) -> np.ndarray:
        """One matrix of a weight, float32 [out, in]: that of an expert, or the weight itself."""
        base, delta = self._parts(path, lead)
        return _finite(path, base + delta)

    def rounded(self, path: str, lead: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """`matrix` in ``dtype``; what rounding takes is counted."""
        base, delta = self._parts(path, lead)
        out = _finite(path, (base + delta).astype(dtype))
        self._rounded += float(np.square(out.astype(np.float32) - base - delta, dtype=np.float64).sum())
        self._changed += float(np.square(delta, dtype=np.float64).sum())
        return out

    def _parts(self, path: str, lead: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        shape = self._checkpoint.shape(path)
        index = (*(slice(i, i + 1) for i in lead), *(slice(0, size) for size in shape[len(lead) :]))
        base = self._checkpoint.read(path, dtype=np.float32, index=index, copy=True).reshape(shape[len(lead) :])
        a, b = (self._adapter[f"{path}.{factor}"] for factor in "ab")
        a, b = (np.asarray(x[lead] if x.ndim > 2 else x, np.float32) for x in (a, b))
        return base.astype(np.float32, copy=False), np.float32(self._lora.scale(a.shape[-2])) * (b @ a)


def _finite(path: str, matrix: np.ndarray) -> np.ndarray:
    if not_finite({path: matrix}):
        raise CheckpointError(f"merge: the sum of {path} and its adapter has values that are not finite")
    return matrix


@dataclass(frozen=True)
class _Sum:
    """A weight whose shape is known, and whose matrices are computed one at a time."""

    merged: Merged
    path: str
    shape: tuple[int, ...]

    def __getitem__(self, lead: tuple[int, ...]) -> np.ndarray:
        return self.merged.matrix(self.path, lead)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        out = np.empty(self.shape, dtype or DTYPES["BF16"])
        for lead in np.ndindex(self.shape[:-2]):
            out[lead] = self.merged.rounded(self.path, lead, out.dtype)
        return out
