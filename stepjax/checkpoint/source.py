"""What loading asks of an opened checkpoint, whatever the files are that hold it."""

from __future__ import annotations

from abc import ABC, abstractmethod
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


class CheckpointFiles(ABC):
    """What folders and GGUF files have alike: one way to read a weight, widened or as it is held."""

    @property
    @abstractmethod
    def paths(self) -> tuple[str, ...]:
        """Every weight of the model that the files hold."""

    @abstractmethod
    def stored_bytes(self, path: str, index: Index | None = None) -> int:
        """Bytes in the files of a weight, or of its part at ``index``, including scales."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights in the files."""
        return sum(map(self.stored_bytes, self.paths))

    def read(self, path: str, *, dtype: Any, index: Index | None = None, copy: bool = False) -> np.ndarray:
        """One weight, or the part of it at ``index``, in ``dtype``. The router's bias is always float32.

        A plain weight that a file holds whole in ``dtype`` comes back as a read-only view of it, not yet in memory.

        Args:
          index: one slice per axis, without steps.
          copy: read into new memory rather than map the file, where nothing else makes new memory.

        Raises:
          CheckpointError: a scale in a GGUF file is not finite.
        """
        value = self._read(path, dtype, index, copy=copy, keep=False, held=None)
        assert isinstance(value, np.ndarray)
        return value

    def read_kept(
        self, path: str, *, dtype: Any, index: Index | None = None, copy: bool = False, held: ExpertFormat | None = None
    ) -> np.ndarray | Quantised:
        """As `read`, with a quantised weight left as `Quantised` with numpy leaves.

        Args:
          index: must begin and end where a weight's scales or blocks do.
          held: of a weight that is held `by_path`: its own format, or a refinement of it, for smaller parts.
        """
        return self._read(path, dtype, index, copy=copy, keep=True, held=held)

    @abstractmethod
    def _read(
        self, path: str, dtype: Any, index: Index | None, *, copy: bool, keep: bool, held: ExpertFormat | None
    ) -> np.ndarray | Quantised:
        """`read`, or with ``keep`` `read_kept`."""
