"""A checkpoint folder, opened: validated as a whole before the first array is made, then read one weight at a time.

Nothing here imports jax until weights are wanted, so that a broken folder is refused at once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np

from stepjax.checkpoint.hub_names import Piece, Recipe, Resolution, resolve_names
from stepjax.checkpoint.safetensors_file import DTYPES, Entry, regular_size
from stepjax.checkpoint.weight_files import inside, open_shards
from stepjax.config import ModelConfig
from stepjax.errors import CheckpointError
from stepjax.weights.inventory import FP8_BLOCK, Form, Groups, scale_shape

if TYPE_CHECKING:
    import jax

    from stepjax.weights.fp8 import BlockScaled, Weight
    from stepjax.weights.int_groups import Grouped

Index = tuple[slice, ...]
Change = Callable[[str, Any], Any]  # a weight by its path → the weight to keep
Progress = Callable[[int, int], None]  # bytes of weights done so far, bytes in all

MAX_CONFIG_BYTES = 2**20
_FLOATS = ("BF16", "F32", "F16")
_LISTED = 5  # problems that a message spells out


class Checkpoint:
    """A folder in the hub's layout whose every tensor has been checked against its configuration.

    Raises:
      ConfigError: ``config.json`` is missing, damaged or not of this model.
      CheckpointError: the weights are missing, damaged, or not those of the configuration.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder}: is not a folder; name the folder that holds config.json")
        try:
            config, shards = read_config(self.folder), open_shards(self.folder)
        except OSError as error:
            raise CheckpointError(f"{self.folder}: cannot be read ({error.strerror}); check its permissions") from None
        names = resolve_names(config, shards.files)
        self._files, self._recipes = shards.files, names.recipes
        self._groups: dict[str, Groups] = {}
        problems = [*shards.problems, *self._name_problems(names), *self._tensor_problems()]
        self._refuse(problems, config)
        self.has_mtp = names.has_mtp
        self._block, notes = self._find_block(config)
        self.config = dataclasses.replace(config, fp8_block=self._block)
        self._refuse(self._scale_problems(), config)
        if names.num_mtp and not names.has_mtp:
            absent = f"{self.folder}: has none of its {names.num_mtp} MTP tensors"
            notes.append(f"{absent}; the model loads without them and cannot draft for itself")
        self.notes = (*shards.notes, *notes)  # what the user should know, one line each

    @property
    def paths(self) -> tuple[str, ...]:
        """Every weight of the model that the folder holds, by our path."""
        return tuple(self._recipes)

    @property
    def fp8(self) -> bool:
        """Whether any weight is stored in FP8 blocks."""
        return self._block is not None

    @property
    def groups(self) -> Groups | None:
        """How the routed experts are stored in whole numbers, if they are."""
        return next(iter(self._groups.values()), None)

    @property
    def num_bytes(self) -> int:
        """Bytes that all weights take in the files."""
        return sum(map(self.stored_bytes, self.paths))

    def shape(self, path: str) -> tuple[int, ...]:
        """Shape of a weight."""
        return self._recipe(path).spec.shape

    def stored_bytes(self, path: str, index: Index | None = None) -> int:
        """Bytes that a weight, or its part at ``index``, takes in the files, scales of its blocks included."""
        recipe = self._recipe(path)
        where = _absolute(index, recipe.spec.shape)
        if not recipe.scales:
            return _size(where) * DTYPES[self._entry(recipe.pieces[0].name).dtype].itemsize
        unit = self._unit(recipe)
        cover, _ = _cover(where, recipe.spec.shape, unit)
        scales = _size(_of_scales(cover, unit)) * DTYPES[self._entry(recipe.scales[0]).dtype].itemsize
        form = self._groups.get(path)
        return _size(cover) * (form.bits if form else 8) // 8 + scales

    def form(self, path: str) -> Form | None:
        """How this weight is quantised in the files; None: it is not."""
        return (self._groups.get(path) or self._fp8_block) if self._recipe(path).scales else None

    def is_fp8(self, path: str) -> bool:
        """Whether this weight is stored in FP8 blocks."""
        return bool(self._recipe(path).scales) and path not in self._groups

    @overload
    def read(
        self, path: str, *, dtype: Any, keep: Literal[False] = False, index: Index | None = None, own: bool = False
    ) -> np.ndarray: ...
    @overload
    def read(
        self, path: str, *, dtype: Any, keep: bool, index: Index | None = None, own: bool = False
    ) -> np.ndarray | BlockScaled | Grouped: ...
    def read(
        self, path: str, *, dtype: Any, keep: bool = False, index: Index | None = None, own: bool = False
    ) -> np.ndarray | BlockScaled | Grouped:
        """One weight, or the part of it at ``index``, in ``dtype``; the router's bias is float32 always.

        A weight stored whole in ``dtype`` comes back as a read-only view of the file, not yet in memory.

        Args:
          keep: leave a quantised weight as `BlockScaled` or `Grouped` with numpy leaves; ``index`` must then begin and
            end where its scales do.
          index: one slice per axis, without steps.
          own: read into memory of its own rather than map the file.
        """
        recipe = self._recipe(path)
        where = _absolute(index, recipe.spec.shape)
        if not recipe.scales:
            value = self._slab(recipe.pieces, where, own=own)
            return value.astype(np.float32 if recipe.spec.dtype == "F32" else dtype, copy=False)
        unit = self._unit(recipe)
        cover, inner = _cover(where, recipe.spec.shape, unit)
        weight = self._grouped(recipe, cover, own=own) if recipe.grouped else self._block_scaled(recipe, cover, own=own)
        if keep:
            assert cover == where, f"{path}: {index} does not begin and end at blocks of {unit}"
            return weight
        from stepjax.weights.fp8 import widened

        return widened(weight, dtype)[inner]

    @property
    def _fp8_block(self) -> tuple[int, int]:
        assert self._block is not None
        return self._block

    def _unit(self, recipe: Recipe) -> tuple[int, int]:
        """Rows and columns that share a scale."""
        form = self._groups.get(recipe.spec.path)
        return (1, form.columns or recipe.spec.shape[-1]) if form else self._fp8_block

    def _recipe(self, path: str) -> Recipe:
        if path not in self._recipes:
            raise CheckpointError(f"{self.folder}: has no weight {path}; its weights are those of `paths`")
        return self._recipes[path]

    def _entry(self, name: str) -> Entry:
        return self._files[name].entries[name]

    def _slab(self, pieces: tuple[Piece, ...], where: Index, *, own: bool) -> np.ndarray:
        """The part of a weight at ``where``, as stored."""
        rank = len(pieces[0].shape)

        def part(piece: Piece) -> np.ndarray:
            file, index = self._files[piece.name], _shifted(where[-rank:], piece.start)
            return file.read(piece.name, index) if own else file.view(piece.name)[index]

        parts = [part(piece) for piece in (pieces[where[0]] if rank < len(where) else pieces)]
        return np.stack(parts) if rank < len(where) else parts[0]

    def _block_scaled(self, recipe: Recipe, where: Index, *, own: bool) -> BlockScaled:
        """The part of an FP8 weight at ``where``, which begins and ends at blocks."""
        from stepjax.weights.fp8 import BlockScaled

        scale = self._scales(recipe, where, own=own).astype(np.float32, copy=False)
        return BlockScaled(self._slab(recipe.pieces, where, own=own), scale, self._fp8_block)

    def _grouped(self, recipe: Recipe, where: Index, *, own: bool) -> Grouped:
        """The part of a weight in whole numbers at ``where``, which begins and ends at groups."""
        from stepjax.weights.int_groups import Grouped

        bits, columns = self._groups[recipe.spec.path].bits, where[-1]
        packed = (*where[:-1], slice(columns.start * bits // 8, columns.stop * bits // 8))
        return Grouped(self._slab(recipe.pieces, packed, own=own), self._scales(recipe, where, own=own), bits)

    def _scales(self, recipe: Recipe, where: Index, *, own: bool) -> np.ndarray:
        """The scales of a part that begins and ends where they do."""
        unit = self._unit(recipe)
        scales = tuple(
            Piece(name, self._entry(name).shape, piece.start // unit[0])
            for name, piece in zip(recipe.scales, recipe.pieces, strict=True)
        )
        return self._slab(scales, _of_scales(where, unit), own=own)

    def _name_problems(self, names: Resolution) -> list[str]:
        at = self._files
        return [
            *(f"{at[b].path}: tensor {b} holds the same weight as {a}, expected one of them" for a, b in names.clashes),
            *(f"{self.folder}: tensor {name} is missing" for name in names.missing),
            *(f"{at[name].path}: tensor {name} is not a weight of this model" for name in names.surplus),
        ]

    def _tensor_problems(self) -> list[str]:
        """Wrong shapes and dtypes; those of scales wait until the block is known."""
        problems = []
        for recipe in self._recipes.values():
            if recipe.grouped:
                problems += self._grouped_problems(recipe)
                continue
            fp8 = bool(recipe.scales)
            allowed = ("F8_E4M3",) if fp8 else _FLOATS
            for piece in recipe.pieces:
                entry = self._entry(piece.name)
                where = f"{self._files[piece.name].path}: tensor {piece.name}"
                if entry.shape != piece.shape:
                    problems.append(f"{where} has shape {list(entry.shape)}, expected {list(piece.shape)}")
                if fp8 and not recipe.spec.may_be_fp8:
                    problems.append(f"{where} has FP8 scales, but this weight is never quantised")
                elif entry.dtype == "F8_E4M3" and not fp8:
                    problems.append(f"{where} is {entry.dtype} without its scales {piece.name}_scale_inv")
                elif entry.dtype not in allowed:
                    also = " since it has FP8 scales" if fp8 else ""
                    problems.append(f"{where} is {entry.dtype}, expected {' or '.join(allowed)}{also}")
        return problems

    def _grouped_problems(self, recipe: Recipe) -> list[str]:
        """What is wrong with a weight in whole numbers; its form is noted where nothing is."""
        spec, problems = recipe.spec, []
        for name, piece in zip(recipe.scales, recipe.pieces, strict=True):
            stored, scale = self._entry(piece.name), self._entry(name)
            where, of_scale = (f"{self._files[each].path}: tensor {each}" for each in (piece.name, name))
            bits = {"I8": 8, "U8": 4}.get(stored.dtype, 0)
            form = Groups(bits, None if bits == 8 else _columns(piece.shape, scale))
            if spec.part != "experts":
                problems.append(f"{where} has scales of whole numbers, which routed experts alone may have")
            elif not form.bits:
                problems.append(f"{where} is {stored.dtype}, expected I8 or U8 since it has scales {name}")
            elif form.columns == 0 or (stored.shape, scale.shape) != form.shapes(piece.shape):
                found = f"{list(stored.shape)} and its scales {list(scale.shape)}"
                problems.append(f"{where} has shape {found}, which do not hold {list(piece.shape)} in {form.bits} bits")
            elif scale.dtype != form.dtypes[1]:
                problems.append(f"{of_scale} is {scale.dtype}, expected {form.dtypes[1]}")
            elif self._groups.setdefault(spec.path, form) != form or (self.groups or form) != form:
                problems.append(f"{where} is not held as other weights are: {form}, expected {self.groups}")
            elif not np.isfinite(self._files[name].view(name).astype(np.float32)).all():
                problems.append(f"{of_scale} has scales that are not finite")
        return problems

    def _find_block(self, config: ModelConfig) -> tuple[tuple[int, int] | None, list[str]]:
        """Rows and columns per scale, or None when nothing is stored in 8 bits: the tensors decide, not config.json."""
        quantised = [recipe for recipe in self._recipes.values() if recipe.scales and not recipe.grouped]
        file = self.folder / "config.json"
        if not quantised:
            unused = f"{file}: has a quantization_config, but no weight has FP8 scales; read as BF16"
            return None, [unused] if config.fp8_block else []
        if config.fp8_block:
            return config.fp8_block, []
        name = quantised[0].scales[0]
        if any(
            self._entry(scale).shape != scale_shape(piece.shape, FP8_BLOCK)
            for recipe in quantised
            for scale, piece in zip(recipe.scales, recipe.pieces, strict=True)
        ):
            raise CheckpointError(
                f"{file}: quantization_config is missing, but {self._files[name].path} has FP8 scales as {name} "
                f"{list(self._entry(name).shape)}, which are not of {FP8_BLOCK[0]}×{FP8_BLOCK[1]} blocks; add "
                "quantization_config.weight_block_size as the FP8 release has it"
            )
        return FP8_BLOCK, [f"{file}: has no quantization_config; {FP8_BLOCK[0]}×{FP8_BLOCK[1]} blocks fit the scales"]

    def _scale_problems(self) -> list[str]:
        """Scales of another shape or dtype, or that are not positive numbers. Reads them: 46 MB of the release."""
        problems = []
        for recipe in self._recipes.values():
            if recipe.grouped:
                continue
            for name, piece in zip(recipe.scales, recipe.pieces, strict=bool(recipe.scales)):
                entry, expected = self._entry(name), scale_shape(piece.shape, self._fp8_block)
                where = f"{self._files[name].path}: tensor {name}"
                if entry.shape != expected:
                    block = f"{self._fp8_block[0]}×{self._fp8_block[1]} (quantization_config.weight_block_size)"
                    found = f"has shape {list(entry.shape)}, expected {list(expected)}"
                    problems.append(f"{where} {found} for blocks of {block}")
                elif entry.dtype not in _FLOATS:
                    problems.append(f"{where} is {entry.dtype}, expected {' or '.join(_FLOATS)}")
                elif piece.rows and piece.rows % self._fp8_block[0]:
                    problems.append(
                        f"{where} has blocks across gate and up: {piece.rows} rows, {self._fp8_block[0]} a block"
                    )
                else:
                    scale = self._files[name].view(name).astype(np.float32)
                    if not np.all((scale > 0) & (scale < np.inf)):
                        problems.append(f"{where} has scales that are not positive numbers")
        return problems

    def _refuse(self, problems: list[str], config: ModelConfig) -> None:
        if not problems:
            return
        model = f"{len(config.layers)} + {len(config.mtp_layers)} layers, {config.num_experts} experts"
        advice = f"download these files again; if they are whole, config.json ({model}) is of another model"
        if len(problems) == 1:
            raise CheckpointError(f"{problems[0]}; {advice}")
        more = f"\n  and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        listed = "\n  ".join(problems[:_LISTED])
        raise CheckpointError(f"{self.folder}: {len(problems)} tensors are wrong:\n  {listed}{more}\n{advice}")


def read_config(folder: Path, name: str = "config.json") -> ModelConfig:
    """``config.json`` of a checkpoint folder."""
    path = inside(folder, name)
    # A missing file is reported by from_file; what exists must not block or fill the memory.
    if path.exists() and regular_size(path) > MAX_CONFIG_BYTES:
        raise CheckpointError(f"{path}: is larger than {MAX_CONFIG_BYTES} bytes; download it again")
    return ModelConfig.from_file(path)


def load_params(
    checkpoint: Checkpoint,
    dtype: Any,
    *,
    keep_fp8: bool = False,
    change: Change | None = None,
    progress: Progress | None = None,
) -> dict[str, Weight]:
    """Every weight as jax arrays on the default device, one at a time: beside the model, memory holds one weight.

    Args:
      keep_fp8: leave FP8 weights in their blocks. What is stored in whole numbers stays so always.
      change: applied to each weight by its path before it is placed, as to quantise it.
    """
    import jax

    params, done, total = {}, 0, checkpoint.num_bytes
    for path in checkpoint.paths:
        value = checkpoint.read(path, dtype=dtype, keep=keep_fp8 or not checkpoint.is_fp8(path))
        params[path] = jax.tree.map(_place, change(path, value) if change else value)
        done += checkpoint.stored_bytes(path)
        if progress:
            progress(done, total)
    return params


def _place(value: np.ndarray) -> jax.Array:
    """``value`` on the default device, and no longer in the file, which may change or shrink.

    XLA:CPU adopts host memory that happens to be aligned, even with ``may_alias=False`` (jax 0.10.2), whereas
    ``jnp.array`` copies what is not aligned twice.
    """
    import jax
    import jax.numpy as jnp

    placed = jax.block_until_ready(jax.device_put(value))
    in_file = not value.flags.writeable
    return jnp.copy(placed) if in_file and placed.unsafe_buffer_pointer() == value.ctypes.data else placed


def _absolute(index: Index | None, shape: tuple[int, ...]) -> Index:
    """``index`` with numbers in place of None and of negative ends."""
    index = index or (slice(None),) * len(shape)
    assert len(index) == len(shape), f"{len(index)} slices for shape {shape}"
    ranges = [each.indices(size) for each, size in zip(index, shape, strict=True)]
    assert all(step == 1 for _, _, step in ranges), f"{index} has steps"
    return tuple(slice(start, stop) for start, stop, _ in ranges)


def _size(where: Index) -> int:
    """Elements of a part."""
    return math.prod(each.stop - each.start for each in where)


def _shifted(where: Index, start: int) -> Index:
    """``where`` within a stored tensor that begins ``start`` rows earlier on its out axis."""
    if not start:
        return where
    rows = where[-2]
    return (*where[:-2], slice(rows.start + start, rows.stop + start), where[-1])


def _of_scales(where: Index, unit: tuple[int, int]) -> Index:
    """Where the scales of a part that begins and ends where they do lie."""
    rows, columns = unit
    return (
        *where[:-2],
        slice(where[-2].start // rows, -(-where[-2].stop // rows)),
        slice(where[-1].start // columns, -(-where[-1].stop // columns)),
    )


def _columns(shape: tuple[int, ...], scale: Entry) -> int:
    """Columns that share a scale of a weight of ``shape``: an even number, or 0 if there is none."""
    groups = scale.shape[-1] if scale.shape else 0
    columns = shape[-1] // groups if groups else 0
    return columns if columns * groups == shape[-1] and columns % 2 == 0 else 0


def _cover(where: Index, shape: tuple[int, ...], block: tuple[int, int]) -> tuple[Index, Index]:
    """The smallest run of whole blocks around ``where``, and the place of ``where`` in it."""
    outer, inner = list(where), [slice(None)] * len(where)
    for axis, size in zip((-2, -1), block, strict=True):
        start, stop = where[axis].start, where[axis].stop
        first = start // size * size
        outer[axis] = slice(first, min(-(-stop // size) * size, shape[axis]))
        inner[axis] = slice(start - first, stop - first)
    return tuple(outer), tuple(inner)
