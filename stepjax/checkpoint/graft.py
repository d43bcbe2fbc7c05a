"""A checkpoint without MTP layers, with those of another that was made of the same base.

Quantised releases often declare MTP layers and hold none. Their drafts are only good with the base that they were
trained with, so routers and norms, which no release quantises, must agree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stepjax.checkpoint.slices import Index
from stepjax.checkpoint.source import WeightSource
from stepjax.config import ModelConfig
from stepjax.errors import CheckpointError
from stepjax.weights.expert_format import ExpertFormat

if TYPE_CHECKING:
    from stepjax.weights.quantised import Quantised

ALIKE = 0.01  # largest distance of two fingerprints over their size: rounding to bfloat16 or float16 takes less


class Grafted:
    """The weights of a backbone and the MTP layers of a donor, as one checkpoint.

    Raises:
      CheckpointError: the donor has no MTP layers, or is of another base; the message names the first difference.
    """

    def __init__(self, backbone: WeightSource, donor: WeightSource):
        if not donor.has_mtp:
            raise CheckpointError(f"{donor.folder}: has no MTP layers to take; name a checkpoint that has them")
        check_same_base(backbone, donor)
        self.backbone, self._donor = backbone, donor
        self.folder: Path = backbone.folder
        self.config: ModelConfig = dataclasses.replace(backbone.config, mtp_layers=donor.config.mtp_layers)
        self.has_mtp = True
        self.donors = (donor.folder,)
        absent = "the model loads without them and cannot draft for itself"
        notes = tuple(note for note in backbone.notes if absent not in note)
        self.notes = (*notes, f"{backbone.folder}: the MTP layers are those of {donor.folder}")
        drafts = tuple(path for path in donor.paths if path.startswith("mtp."))
        self.paths: tuple[str, ...] = (*(path for path in backbone.paths if not path.startswith("mtp.")), *drafts)

    @property
    def experts(self) -> ExpertFormat:
        return self.backbone.experts

    @property
    def resident_experts(self) -> ExpertFormat:
        return self.backbone.resident_experts

    @property
    def by_path(self) -> bool:
        return self.backbone.by_path

    @property
    def left_out(self) -> Mapping[str, int]:
        return self.backbone.left_out

    @property
    def num_bytes(self) -> int:
        return sum(map(self.stored_bytes, self.paths))

    def shape(self, path: str) -> tuple[int, ...]:
        return self._of(path).shape(path)

    def stored_bytes(self, path: str, index: Index | None = None) -> int:
        return self._of(path).stored_bytes(path, index)

    def format(self, path: str) -> ExpertFormat:
        return self._of(path).format(path)

    def resident(self, path: str) -> ExpertFormat:
        return self._of(path).resident(path)

    def stored_as(self, path: str) -> str:
        return self._of(path).stored_as(path)

    def read(self, path: str, *, dtype: Any, index: Index | None = None, copy: bool = False) -> np.ndarray:
        """As the checkpoint that a weight comes from reads it."""
        return self._of(path).read(path, dtype=dtype, index=index, copy=copy)

    def read_kept(
        self, path: str, *, dtype: Any, index: Index | None = None, copy: bool = False, held: ExpertFormat | None = None
    ) -> np.ndarray | Quantised:
        """The same."""
        return self._of(path).read_kept(path, dtype=dtype, index=index, copy=copy, held=held)

    def _of(self, path: str) -> WeightSource:
        return self._donor if path.startswith("mtp.") else self.backbone


def check_same_base(one: WeightSource, other: WeightSource) -> None:
    """Raise CheckpointError unless two checkpoints were made of the same base: settings, routers and norms agree."""
    for field in dataclasses.fields(ModelConfig):
        ours, theirs = getattr(one.config, field.name), getattr(other.config, field.name)
        if field.name not in ("mtp_layers", "fp8_block") and ours != theirs:
            raise CheckpointError(f"{other.folder}: is of another model than {one.folder}: {field.name} differs")
    shared = {*one.paths} & {*other.paths}
    for path in (path for path in one.paths if path in shared and _is_fingerprint(path)):
        ours, theirs = (source.read(path, dtype=np.float32) for source in (one, other))
        distance = float(np.linalg.norm(ours - theirs) / max(float(np.linalg.norm(ours)), 1e-30))
        if not distance <= ALIKE:
            raise CheckpointError(
                f"{other.folder}: is of another base than {one.folder}: {path} differs by {distance:.1%} of its size, "
                f"expected {ALIKE:.0%} at most; name a checkpoint of the same base"
            )


def _is_fingerprint(path: str) -> bool:
    return not path.startswith("mtp.") and (path.endswith(("norm.weight", "router.weight")))
