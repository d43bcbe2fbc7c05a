"""A checkpoint folder, opened: validated as a whole before the first array is made, then read one weight at a time.

Nothing here imports jax until weights are wanted, so that a broken folder is refused at once.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np

from stepjax.checkpoint.hub_names import Recipe, Resolution, StoredPart, resolve_names
from stepjax.checkpoint.safetensors_file import Entry, regular_size
from stepjax.checkpoint.slices import Index, absolute_index, covering, num_elements
from stepjax.checkpoint.source import WeightSource
from stepjax.checkpoint.weight_files import inside, open_shards
from stepjax.config import ModelConfig
from stepjax.errors import CheckpointError
from stepjax.weights.dtypes import ITEM_BYTES
from stepjax.weights.expert_format import ExpertFormat
from stepjax.weights.formats import FORMATS
from stepjax.weights.plain import PLAIN

if TYPE_CHECKING:
    import jax

    from stepjax.weights.quantised import Quantised, Weight

ProgressCallback = Callable[[int, int], None]  # bytes of weights that are done, and total bytes

MAX_CONFIG_BYTES = 2**20
_FLOATS = ("BF16", "F32", "F16")
_LISTED = 5  # problems that a message names


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
        self._formats: dict[str, ExpertFormat] = {}
        problems = [*shards.problems, *self._name_problems(names), *self._tensor_problems(config)]
        self._refuse(problems, config)
        self.has_mtp = names.has_mtp
        self.config, notes = self.experts.configured(config), self.experts.notes(config, self.folder / "config.json")
        if names.num_mtp and not names.has_mtp:
            absent = f"{self.folder}: has none of its {names.num_mtp} MTP tensors"
            notes.append(f"{absent}; the model loads without them and cannot draft for itself")
        self.notes = (*shards.notes, *notes)  # notes for the user, one line each

    @property
    def paths(self) -> tuple[str, ...]:
        """Every weight of the model that the folder holds, by our path."""
        return tuple(self._recipes)

    @property
    def experts(self) -> ExpertFormat:
        """The format of the routed experts in the files. Some may still be plain, and other weights quantised."""
        of_experts = (format for path, format in self._formats.items() if ".experts." in path)
        return next(of_experts, next(iter(self._formats.values()), PLAIN))

    @property
    def resident_experts(self) -> ExpertFormat:
        """Their format in memory, unless another is requested."""
        return self.experts if self.experts.kept_as_stored else PLAIN

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights in the files."""
        return sum(map(self.stored_bytes, self.paths))

    def shape(self, path: str) -> tuple[int, ...]:
        """Shape of a weight."""
        return self._recipe(path).spec.shape

    def stored_bytes(self, path: str, index: Index | None = None) -> int:
        """Bytes in the files of a weight, or of its part at ``index``, including scales."""
        recipe = self._recipe(path)
        where = absolute_index(index, recipe.spec.shape)
        if not recipe.scales:
            return num_elements(where) * ITEM_BYTES[self._entry(recipe.parts[0].name).dtype]
        format = self._formats[path]
        unit = format.unit_of(recipe.spec.shape)
        cover, _ = covering(where, recipe.spec.shape, unit)
        scales = num_elements(_scale_index(cover, unit)) * ITEM_BYTES[self._entry(recipe.scales[0]).dtype]
        return num_elements(cover) * format.bits // 8 + scales

    def format(self, path: str) -> ExpertFormat:
        """The format of this weight in the files."""
        return self._formats.get(self._recipe(path).spec.path, PLAIN)

    @overload
    def read(
        self, path: str, *, dtype: Any, keep: Literal[False] = False, index: Index | None = None, copy: bool = False
    ) -> np.ndarray: ...
    @overload
    def read(
        self, path: str, *, dtype: Any, keep: bool, index: Index | None = None, copy: bool = False
    ) -> np.ndarray | Quantised: ...
    def read(
        self, path: str, *, dtype: Any, keep: bool = False, index: Index | None = None, copy: bool = False
    ) -> np.ndarray | Quantised:
        """One weight, or the part of it at ``index``, in ``dtype``. The router's bias is always float32.

        A weight stored whole in ``dtype`` comes back as a read-only view of the file, not yet in memory.

        Args:
          keep: leave a quantised weight as `Quantised` with numpy leaves; ``index`` must then begin and end where its
            scales do.
          index: one slice per axis, without steps.
          copy: read into new memory rather than map the file.
        """
        recipe = self._recipe(path)
        where = absolute_index(index, recipe.spec.shape)
        if not recipe.scales:
            value = self._slab(recipe.parts, where, copy=copy)
            return value.astype(np.float32 if recipe.spec.dtype == "F32" else dtype, copy=False)
        from stepjax.weights.quantised import Quantised

        format = self._formats[path]
        unit = format.unit_of(recipe.spec.shape)
        cover, inner = covering(where, recipe.spec.shape, unit)
        *rows, columns = cover
        stored_columns = slice(*(edge // format.values_per_element for edge in (columns.start, columns.stop)))
        values = self._slab(recipe.parts, (*rows, stored_columns), copy=copy)
        scales = self._scales(recipe, cover, unit, copy=copy).astype(format.numpy_dtypes[1], copy=False)
        weight = Quantised(values, scales, format)
        if keep:
            assert cover == where, f"{path}: {index} does not begin and end at units of {unit}"
            return weight
        return weight.dequantize_numpy(dtype)[inner]

    def _recipe(self, path: str) -> Recipe:
        if path not in self._recipes:
            raise CheckpointError(f"{self.folder}: has no weight {path}; its weights are those of `paths`")
        return self._recipes[path]

    def _entry(self, name: str) -> Entry:
        return self._files[name].entries[name]

    def _slab(self, parts: tuple[StoredPart, ...], where: Index, *, copy: bool) -> np.ndarray:
        """The part of a weight at ``where``, in the format of the files."""
        rank = len(parts[0].shape)

        def read(part: StoredPart) -> np.ndarray:
            file, index = self._files[part.name], _shifted(where[-rank:], part.start)
            return file.read(part.name, index) if copy else file.view(part.name)[index]

        slabs = [read(part) for part in (parts[where[0]] if rank < len(where) else parts)]
        return np.stack(slabs) if rank < len(where) else slabs[0]

    def _scales(self, recipe: Recipe, where: Index, unit: tuple[int, int], *, copy: bool) -> np.ndarray:
        """The scales of a part whose ends are ends of scales."""
        scales = tuple(
            StoredPart(name, self._entry(name).shape, part.start // unit[0])
            for name, part in zip(recipe.scales, recipe.parts, strict=True)
        )
        return self._slab(scales, _scale_index(where, unit), copy=copy)

    def _name_problems(self, names: Resolution) -> list[str]:
        files = self._files
        return [
            *(
                f"{files[b].path}: tensor {b} holds the same weight as {a}, expected one of them"
                for a, b in names.clashes
            ),
            *(f"{self.folder}: tensor {name} is missing" for name in names.missing),
            *(f"{files[name].path}: tensor {name} is not a weight of this model" for name in names.surplus),
        ]

    def _tensor_problems(self, config: ModelConfig) -> list[str]:
        """Problems of shapes, dtypes and scales. It reads the scales, which are 46 MB in the FP8 release."""
        problems = []
        for recipe in self._recipes.values():
            if not recipe.scales:
                problems += [self._plain_problem(recipe, part) for part in recipe.parts]
                continue
            for part, scales in zip(recipe.parts, recipe.scales, strict=True):
                format, problem = self._quantised_problem(recipe, part, scales, config)
                if problem:
                    problems.append(problem)
                else:
                    self._formats[recipe.spec.path] = format
        return [problem for problem in problems if problem]

    def _plain_problem(self, recipe: Recipe, part: StoredPart) -> str:
        """What is wrong with a tensor without scales; "" if nothing is."""
        entry, where = self._entry(part.name), self._where(part.name)
        if entry.dtype in _FLOATS:
            shapes = f"{list(entry.shape)}, expected {list(part.shape)}"
            return "" if entry.shape == part.shape else f"{where} has shape {shapes}"
        for format in FORMATS.values():
            if format.quantised and format.value_dtype == entry.dtype and recipe.spec.may_be(format):
                return f"{where} is {entry.dtype} without its scales {part.name}{format.scale_suffix}"
        return f"{where} is {entry.dtype}, expected {' or '.join(_FLOATS)}"

    def _quantised_problem(
        self, recipe: Recipe, part: StoredPart, scales: str, config: ModelConfig
    ) -> tuple[ExpertFormat, str]:
        """The format of a stored tensor with scales, and what is wrong with the two; "" if nothing is."""
        formats = [format for format in FORMATS.values() if format.scale_suffix == recipe.scale_suffix]
        values, scale = self._entry(part.name), self._entry(scales)
        where, where_scale = self._where(part.name), self._where(scales)
        format = next((format for format in formats if format.value_dtype == values.dtype), formats[0])
        if not recipe.spec.may_be(format):
            return format, f"{where} has scales {scales}, but this weight is never quantised in {format.name}"
        if format.value_dtype != values.dtype:
            expected = " or ".join(format.value_dtype for format in formats)
            return format, f"{where} is {values.dtype}, expected {expected} since it has scales {scales}"
        format = format.fitted(config, part.shape, scale.shape)
        value_shape, scale_shape = format.shapes(part.shape)
        unit_rows, _ = format.unit_of(part.shape)
        if values.shape != value_shape:
            shapes = f"{list(values.shape)}, expected {list(value_shape)} for {list(part.shape)} in {format.bits} bits"
            return format, f"{where} has shape {shapes}"
        if scale.shape != scale_shape:
            shapes = f"{list(scale.shape)}, expected {list(scale_shape)} {format.shape_note(config)}"
            return format, f"{where_scale} has shape {shapes}"
        if scale.dtype not in format.scale_dtypes:
            return format, f"{where_scale} is {scale.dtype}, expected {' or '.join(format.scale_dtypes)}"
        if part.rows and part.rows % unit_rows:
            return format, f"{where_scale} has blocks across gate and up: {part.rows} rows, {unit_rows} a block"
        same_kind = next((other for other in self._formats.values() if type(other) is type(format)), format)
        if format != same_kind:
            return format, f"{where} is not held as other weights are: {format}, expected {same_kind}"
        problem = format.scale_problem(self._files[scales].view(scales))
        return format, problem and f"{where_scale} {problem}"

    def _where(self, name: str) -> str:
        return f"{self._files[name].path}: tensor {name}"

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
    checkpoint: WeightSource,
    dtype: Any,
    *,
    experts: ExpertFormat | None = None,
    progress: ProgressCallback | None = None,
) -> dict[str, Weight]:
    """Every weight as jax arrays on the default device, one at a time: beside the model, memory holds one weight.

    Args:
      experts: how to hold the routed experts; None: as `Checkpoint.resident_experts` says.
    """
    import jax

    params, done, total = {}, 0, checkpoint.num_bytes
    for path in checkpoint.paths:
        value = read_as(checkpoint, path, dtype, experts or checkpoint.resident_experts)
        params[path] = jax.tree.map(_place, value)
        done += checkpoint.stored_bytes(path)
        if progress:
            progress(done, total)
    return params


def read_as(
    checkpoint: WeightSource,
    path: str,
    dtype: Any,
    experts: ExpertFormat,
    *,
    index: Index | None = None,
    copy: bool = False,
) -> np.ndarray | Quantised:
    """`WeightSource.read`, with the routed experts in a format: kept where they are so, else made from ``dtype``.

    Raises:
      ConfigError: the format cannot hold the weight.
    """
    value = checkpoint.read(path, dtype=dtype, keep=experts.keeps(checkpoint.format(path)), index=index, copy=copy)
    made = experts.quantised and not experts.mixed and ".experts." in path
    if not made or not isinstance(value, np.ndarray):
        return value
    from stepjax.weights.quantised import quantise

    return quantise(value, experts)


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


def _shifted(where: Index, start: int) -> Index:
    """``where`` within a stored tensor that begins ``start`` rows earlier on its out axis."""
    if not start:
        return where
    rows = where[-2]
    return (*where[:-2], slice(rows.start + start, rows.stop + start), where[-1])


def _scale_index(where: Index, unit: tuple[int, int]) -> Index:
    """The place of the scales of a part whose ends are ends of scales."""
    rows, columns = unit
    return (
        *where[:-2],
        slice(where[-2].start // rows, -(-where[-2].stop // rows)),
        slice(where[-1].start // columns, -(-where[-1].stop // columns)),
    )
