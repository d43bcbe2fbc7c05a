"""Write one .safetensors file tensor by tensor.

The header comes first in the file and follows from shapes and dtypes alone, so no tensor has to wait for another.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from stepjax.errors import CheckpointError
from stepjax.safetensors_file import DTYPES
from stepjax.weights import TensorSpec


class ShardWriter:
    """A file for ``tensors``; it is opened with the first of them, and flushed to the disk and closed with the last."""

    def __init__(self, path: Path, tensors: Sequence[TensorSpec]):
        self.path = path
        # Wide dtypes first: then every tensor begins at a multiple of its element size, as readers that map it like.
        ordered = sorted(tensors, key=lambda tensor: -DTYPES[tensor.dtype].itemsize)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
        self._starts: dict[str, int] = {}
        position = 0
        for tensor in ordered:
            end = position + tensor.num_bytes
            header[tensor.hub_name] = {
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "data_offsets": [position, end],
            }
            self._starts[tensor.hub_name] = position
            position = end
        text = json.dumps(header, separators=(",", ":")).encode()
        self._header = text + b" " * (-len(text) % 8)
        self._file: BinaryIO | None = None

    def write(self, tensor: TensorSpec, value: np.ndarray) -> None:
        """Write one tensor, in any order; each exactly once."""
        if value.shape != tensor.shape or value.dtype != DTYPES[tensor.dtype]:
            raise CheckpointError(
                f"export: {tensor.path} is now {value.dtype} {list(value.shape)}, expected {tensor.dtype} "
                f"{list(tensor.shape)}; it changed while it was exported"
            )
        if self._file is None:
            self._file = self.path.open("xb")
            self._file.write(len(self._header).to_bytes(8, "little") + self._header)
        self._file.seek(8 + len(self._header) + self._starts.pop(tensor.hub_name))
        self._file.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
        if not self._starts:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def close(self) -> None:
        """Give up on a file that did not get all its tensors; a finished one is closed already."""
        if self._file is not None:
            self._file.close()
