"""A model in GGUF, opened: its names, shapes and settings are checked before the first array is made.

It is read as a checkpoint folder is (`stepjax.checkpoint.reader.Checkpoint`): one weight, or a part of one, at a time.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stepjax.checkpoint.gguf.file import GgufTensor
from stepjax.checkpoint.gguf.names import ROPE_FACTORS, GgufPart, find, gguf_name, is_norm
from stepjax.checkpoint.gguf.parts import open_files
from stepjax.checkpoint.gguf.settings import check_architecture, to_hub
from stepjax.checkpoint.slices import Index, absolute_index, covering, num_elements
from stepjax.checkpoint.source import CheckpointFiles
from stepjax.config import ModelConfig
from stepjax.errors import CheckpointError, ConfigError
from stepjax.weights.expert_format import ExpertFormat
from stepjax.weights.gguf_blocks import GgufBlocks
from stepjax.weights.inventory import TensorSpec, inventory
from stepjax.weights.plain import PLAIN

if TYPE_CHECKING:
    from stepjax.weights.quantised import Quantised

_LISTED = 5  # problems that a message names
_ROW_VALUES = 2**22  # that are widened at a time
_EMBEDDING = "token_embd.weight"


class GgufCheckpoint(CheckpointFiles):
    """A GGUF file, or the parts of one, whose every tensor has been checked against its metadata.

    Args:
      drafts: take a file that holds MTP layers only, as llama.cpp's converter makes them for drafting.

    Raises:
      CheckpointError: a file is damaged, or its tensors are not those of its settings.
      ConfigError: its metadata are not those of this model.
    """

    def __init__(self, path: Path | str, *, drafts: bool = False):
        self.folder = Path(path)
        self.files = open_files(self.folder)
        file = self.files.first.path
        try:
            self.hub, notes = self._settings()
            self.config = ModelConfig.from_hf(self.hub)
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from None
        self._specs = {spec.path: spec for spec in inventory(self.config)}
        self._parts = self._find()
        mtp = {path for path in self._specs if path.startswith("mtp.")}
        self.has_mtp = any(self._parts[path].name in self.files.files for path in mtp if _is_own(self._specs[path]))
        if not self.has_mtp:
            self._specs = {path: spec for path, spec in self._specs.items() if path not in mtp}
        trunk = any(name.startswith("blk.0.") for name in self.files.files)
        if not trunk and self.has_mtp and drafts:
            self._specs = {
                path: spec for path, spec in self._specs.items() if self._parts[path].name in self.files.files
            }
        elif not trunk and self.has_mtp:
            raise CheckpointError(
                f"{file}: holds MTP layers only (a draft file); name the file of the whole model, and this one with "
                "--mtp-from"
            )
        self._refuse(self._problems())
        if mtp and not self.has_mtp:
            absent = f"has none of its {len(mtp)} MTP tensors; the model loads without them and cannot draft for itself"
            notes.append(absent)
        self.notes = tuple(f"{file}: {note}" for note in (*notes, *self._widened_note()))

    @property
    def paths(self) -> tuple[str, ...]:
        """Every weight of the model that the file holds, by our path."""
        return tuple(self._specs)

    @property
    def experts(self) -> ExpertFormat:
        """The format of the routed experts. A file may have several; it is then the one with the largest blocks."""
        formats = Counter(self.format(path) for path in self.paths if ".experts." in path)
        held = [format for format in formats if isinstance(format, GgufBlocks)]
        return max(held, key=lambda format: (format.layout.values, formats[format]), default=PLAIN)

    @property
    def resident_experts(self) -> ExpertFormat:
        """Their format in memory, unless another is requested."""
        return self.experts

    def shape(self, path: str) -> tuple[int, ...]:
        """Shape of a weight."""
        return self._spec(path).shape

    def stored_bytes(self, path: str, index: Index | None = None) -> int:
        """Bytes in the files of a weight, or of its part at ``index``."""
        spec, entry = self._spec(path), self._entry(path)
        where = absolute_index(index, spec.shape)
        if entry.blocks is None:
            return num_elements(where) * entry.dtype.itemsize
        layout = entry.blocks.layout
        outer, _ = covering(where, spec.shape, (1, layout.values))
        return num_elements(outer) // layout.values * layout.num_bytes

    def format(self, path: str) -> ExpertFormat:
        """The format of this weight in the files."""
        return self._entry(path).blocks or PLAIN

    def resident(self, path: str) -> ExpertFormat:
        """The format of this weight in memory: blocks stay where a product of experts takes them."""
        blocks = self._entry(path).blocks
        return blocks.held if blocks is not None and ".experts." in path else PLAIN

    def stored_as(self, path: str) -> str:
        """GGUF's name of a weight's type, such as Q4_K."""
        return self.type_name(path)

    @property
    def by_path(self) -> bool:
        """Whether routed experts are held as `resident` says: each weight stays in its own type."""
        return True

    @property
    def left_out(self) -> dict[str, int]:
        """Tensors of the files that are not read, by what they are."""
        return {"factors of the frequencies, which are computed": 1} if ROPE_FACTORS in self.files.files else {}

    def type_name(self, path: str) -> str:
        """GGUF's name of a weight's type, such as Q4_K."""
        self._spec(path)
        return self._entry(path).type_name

    def _read(
        self, path: str, dtype: Any, index: Index | None, *, copy: bool, keep: bool, held: ExpertFormat | None
    ) -> np.ndarray | Quantised:
        spec, entry = self._spec(path), self._entry(path)
        where = absolute_index(index, spec.shape)
        part = self._parts[path]
        stored = self.files.files[part.name].view(part.name)
        if part.start:
            stored = stored[part.start :]
        if entry.blocks is None:
            return self._floats(spec, stored[where], dtype, copy=copy)
        outer, inner = covering(where, spec.shape, (1, entry.blocks.layout.values))
        *rows, columns = outer
        num_bytes = slice(*(entry.blocks.file_bytes(edge) for edge in (columns.start, columns.stop)))
        blocks = stored[(*rows, num_bytes)]
        if keep:
            return self._held(path, blocks, where[-1], held or entry.blocks)
        return self._widened(path, blocks, inner[-1], np.float32 if spec.dtype == "F32" else dtype)

    def _held(self, path: str, blocks: np.ndarray, columns: slice, held: ExpertFormat) -> Quantised:
        """The weight of some blocks in their own format, or of those of their ``columns`` in a refinement of it."""
        from stepjax.weights.quantised import Quantised, quantised_from

        format = self._entry(path).blocks
        assert format is not None
        values, scales = self._split(path, blocks)
        unit = held.unit[1] or 1
        assert columns.start % unit == columns.stop % unit == 0, f"{path}: {columns} are no whole units of {held}"
        if held == format:
            return Quantised(values, scales, format)
        finer = format.refine(values, scales, held)
        whole = blocks.shape[-1] // format.layout.num_bytes * format.layout.values
        start = columns.start % format.layout.values
        shares = [array.shape[-1] / whole for array in finer]  # elements of a column
        stop = start + columns.stop - columns.start
        cut = [array[..., int(start * share) : int(stop * share)] for array, share in zip(finer, shares, strict=True)]
        return quantised_from([np.ascontiguousarray(array) for array in cut], held)

    def _floats(self, spec: TensorSpec, value: np.ndarray, dtype: Any, *, copy: bool) -> np.ndarray:
        if is_norm(spec):
            value = value.astype(np.float32) - np.float32(1)
        value = value.astype(np.float32 if spec.dtype == "F32" else dtype, copy=False)
        return np.array(value) if copy and not value.flags.owndata else value

    def _split(self, path: str, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        format, name = self._entry(path).blocks, self._parts[path].name
        assert format is not None
        values, scales = format.split(blocks)
        if problem := format.scale_problem(scales):
            raise CheckpointError(
                f"{self.files.files[name].path}: tensor {name} {problem}; download the file again, or make it anew"
            )
        return values, scales

    def _widened(self, path: str, blocks: np.ndarray, columns: slice, dtype: Any) -> np.ndarray:
        """Values of rows of blocks, a few rows at a time, to keep float32 copies small."""
        format = self._entry(path).blocks
        assert format is not None
        rows = blocks.reshape(-1, blocks.shape[-1])
        wide = blocks.shape[-1] // format.layout.num_bytes * format.layout.values
        out = np.empty((len(rows), len(range(*columns.indices(wide)))), dtype)
        step = max(1, _ROW_VALUES // max(1, wide))
        for start in range(0, len(rows), step):
            values, scales = self._split(path, rows[start : start + step])
            value = format.widen(values, scales, np)[:, columns]
            out[start : start + step] = value.astype(dtype) if not is_norm(self._spec(path)) else value - 1
        return out.reshape(*blocks.shape[:-1], -1)

    def _settings(self) -> tuple[dict[str, Any], list[str]]:
        check_architecture(self.files.metadata)
        embedding = self.files.files.get(_EMBEDDING)
        if embedding is None or len(embedding.entries[_EMBEDDING].shape) != 2:
            raise CheckpointError(f"{self.files.first.path}: tensor {_EMBEDDING} is missing; download the file again")
        factors = None
        if held := self.files.files.get(ROPE_FACTORS):
            if held.entries[ROPE_FACTORS].blocks is not None:
                raise CheckpointError(f"{held.path}: tensor {ROPE_FACTORS} is quantised, expected F32")
            factors = np.asarray(held.view(ROPE_FACTORS), np.float32)
        vocab_size = embedding.entries[_EMBEDDING].shape[0]
        return to_hub(self.files.metadata, vocab_size=vocab_size, rope_factors=factors)

    def _find(self) -> dict[str, GgufPart]:
        rows = []
        for layer in self.config.all_layers:
            kv_rows = layer.num_kv_heads * layer.head_dim
            rows.append((layer.num_heads * layer.head_dim, kv_rows, kv_rows))
        none = (0, 0, 0)
        return {
            path: find(spec, self.files.files, qkv_rows=none if spec.layer is None else rows[spec.layer])
            for path, spec in self._specs.items()
        }

    def _problems(self) -> list[str]:
        files, problems = self.files.files, []
        for path, spec in self._specs.items():
            part = self._parts[path]
            if part.name not in files:
                problems.append(f"{self.files.first.path}: tensor {part.name} is missing")
                continue
            entry, where = files[part.name].entries[part.name], f"{files[part.name].path}: tensor {part.name}"
            if entry.shape != part.shape:
                problems.append(f"{where} has shape {list(entry.shape)}, expected {list(part.shape)}")
            elif len(spec.shape) == 1 and entry.blocks is not None:
                problems.append(f"{where} is {entry.type_name}, expected F32 for a vector")
        known = {part.name for part in self._parts.values()} | {ROPE_FACTORS}
        problems += [
            f"{files[name].path}: tensor {name} is not a weight of this model" for name in sorted(set(files) - known)
        ]
        return problems

    def _refuse(self, problems: list[str]) -> None:
        if not problems:
            return
        config = self.config
        model = f"{len(config.layers)} + {len(config.mtp_layers)} layers, {config.num_experts} experts"
        advice = f"download the file again; if it is whole, its metadata ({model}) are of another model"
        if len(problems) == 1:
            raise CheckpointError(f"{problems[0]}; {advice}")
        more = f"\n  and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        listed = "\n  ".join(problems[:_LISTED])
        raise CheckpointError(f"{self.folder}: {len(problems)} tensors are wrong:\n  {listed}{more}\n{advice}")

    def _widened_note(self) -> list[str]:
        """What does not stay in its blocks."""
        types = Counter(
            self.type_name(path) for path in self.paths if ".experts." not in path and self._entry(path).blocks
        )
        if not types:
            return []
        listed = ", ".join(f"{count} in {name}" for name, count in sorted(types.items()))
        return [f"the routed experts keep their bits; of the other tensors {listed} are widened to the model's dtype"]

    def _spec(self, path: str) -> TensorSpec:
        if path not in self._specs:
            raise CheckpointError(f"{self.folder}: has no weight {path}; its weights are those of `paths`")
        return self._specs[path]

    def _entry(self, path: str) -> GgufTensor:
        name = self._parts[path].name
        return self.files.files[name].entries[name]


def _is_own(spec: TensorSpec) -> bool:
    """Whether no other tensor can stand for an MTP layer's."""
    return gguf_name(spec.hub_name).startswith("blk.") and "shared_head" not in spec.hub_name
