"""What loading asks of an opened checkpoint, whatever the files are that hold it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from stepjax.checkpoint.slices import Index
from stepjax.config import ModelConfig
from stepjax.weights.expert_format import ExpertFormat

if TYPE_CHECKING:
    from stepjax.weights.quantised import Quantised


class WeightSource(Protocol):
    """Weights by our path, with the configuration that they were checked against."""

    folder: Path  # or the file
    config: ModelConfig
    has_mtp: bool
    notes: tuple[str, ...]  # for the user, one line each

    @property
    def paths(self) -> tuple[str, ...]:
        """Every weight of the model that the files hold."""
        ...

    @property
    def experts(self) -> ExpertFormat:
        """The format of the routed experts in the files."""
        ...

    @property
    def resident_experts(self) -> ExpertFormat:
        """Their format in memory, unless another is requested."""
        ...

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights in the files."""
        ...

    def shape(self, path: str) -> tuple[int, ...]:
        """Shape of a weight."""
        ...

    def stored_bytes(self, path: str, index: Index | None = None) -> int:
        """Bytes in the files of a weight, or of its part at ``index``, including scales."""
        ...

    def format(self, path: str) -> ExpertFormat:
        """The format of this weight in the files."""
        ...

    def resident(self, path: str) -> ExpertFormat:
        """The format of this weight in memory, unless another is requested for the routed experts."""
        ...

    def stored_as(self, path: str) -> str:
        """What this weight is in the files, for people."""
        ...

    @property
    def by_path(self) -> bool:
        """Whether routed experts are held as `resident` says of each weight, perhaps with smaller units."""
        ...

    @property
    def left_out(self) -> Mapping[str, int]:
        """Tensors of the files that are not read, by what they are."""
        ...

    def read(self, path: str, *, dtype: Any, index: Index | None = None, copy: bool = False) -> np.ndarray:
        """One weight, or the part of it at ``index``, in ``dtype``.

        Args:
          copy: read into new memory rather than map the file.
        """
        ...

    def read_kept(
        self, path: str, *, dtype: Any, index: Index | None = None, copy: bool = False, held: ExpertFormat | None = None
    ) -> np.ndarray | Quantised:
        """As `read`, with a quantised weight left in its format, or, of weights that are held `by_path`, in ``held``, a
        refinement of it.
        """
        ...
