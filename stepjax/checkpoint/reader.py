"""A checkpoint folder, opened: validated as a whole before the first array is made, then read one weight at a time.

Nothing here imports jax until weights are wanted, so that a broken folder is refused at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stepjax.checkpoint.hub_names import Recipe, Resolution, StoredPart, resolve_names
from stepjax.checkpoint.packed_weights import PackedWeights
from stepjax.checkpoint.read_ahead import AHEAD, read_ahead
from stepjax.checkpoint.safetensors_file import Entry, regular_size
from stepjax.checkpoint.slices import Index, absolute_index, covering, num_elements
from stepjax.checkpoint.source import CheckpointFiles, WeightSource
from stepjax.checkpoint.weight_files import inside, open_shards, read_json
from stepjax.config import VISION_TYPE, ModelConfig, text_config
from stepjax.errors import CheckpointError, ConfigError
from stepjax.packings.rules import QuantRules, quant_rules
from stepjax.weights.dtypes import ITEM_BYTES
from stepjax.weights.expert_format import ExpertFormat
from stepjax.weights.formats import FORMATS, named_in
from stepjax.weights.fp8_rows import is_dense_map
from stepjax.weights.plain import PLAIN

if TYPE_CHECKING:
    from stepjax.weights.quantised import Quantised, Weight

ExpertForms = ExpertFormat | Mapping[str, ExpertFormat] | None  # of all routed experts, or of each weight by its path
ProgressCallback = Callable[[int, int], None]  # bytes of weights that are done, and total bytes

MAX_CONFIG_BYTES = 2**20
_FLOATS = ("BF16", "F32", "F16")
_LISTED = 5  # problems that a message names


class Checkpoint(CheckpointFiles):
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
        hub = read_json(inside(self.folder, "config.json"))
        names = resolve_names(config, shards.files, vision=hub.get("model_type") == VISION_TYPE)
        self._files, self._recipes = shards.files, names.recipes
        rules, self._named = _rules(self.folder, hub)
        self._settings = rules.settings
        self.packed = PackedWeights(shards.files, rules)
        self._formats: dict[str, ExpertFormat] = {}
        problems = [*shards.problems, *self._name_problems(names), *self._tensor_problems(config)]
        self._refuse(problems, config)
        self.has_mtp = names.has_mtp
        native = PLAIN if len(self.packed) else self.experts  # packings say by their own settings what they are
        self.config = native.configured(config)
        notes = [] if len(self.packed) else native.notes(config, self.folder / "config.json")
        self.left_out = {"vision": len(names.vision), "scales of activations": len(names.unused)}  # tensors, by kind
        if names.num_mtp and not names.has_mtp:
            absent = f"{self.folder}: has none of its {names.num_mtp} MTP tensors"
            notes.append(f"{absent}; the model loads without them and cannot draft for itself")
        notes += self._left_out(names)
        self.notes = (*shards.notes, *notes)  # notes for the user, one line each

    @property
    def paths(self) -> tuple[str, ...]:
        """Every weight of the model that the folder holds, by our path."""
        return tuple(self._recipes)

    @property
    def experts(self) -> ExpertFormat:
        """The format of the routed experts in the files. Some may still be plain, and other weights quantised."""
        formats = (self.format(path) for path in sorted(self.paths, key=lambda path: ".experts." not in path))
        return next((format for format in formats if format.quantised), PLAIN)

    @property
    def resident_experts(self) -> ExpertFormat:
        """Their format in memory, unless another is requested."""
        return self.experts if self.experts.kept_as_stored else PLAIN

    @property
    def by_path(self) -> bool:
        """Whether routed experts are held as `resident` says of each weight, perhaps with smaller units."""
        return len(self.packed) > 0

    def resident(self, path: str) -> ExpertFormat:
        """The format of one weight in memory, unless another is requested for the routed experts."""
        stored = self.format(path)
        return stored if ".experts." in path and stored.kept_as_stored else PLAIN

    def shape(self, path: str) -> tuple[int, ...]:
        """Shape of a weight."""
        return self._recipe(path).spec.shape

    def stored_bytes(self, path: str, index: Index | None = None) -> int:
        """Bytes in the files of a weight, or of its part at ``index``, including scales."""
        recipe = self._recipe(path)
        where = absolute_index(index, recipe.spec.shape)
        if path in self.packed:
            return self.packed.num_bytes(path, num_elements(where) / recipe.spec.num_elements)
        if not recipe.scales:
            return num_elements(where) * ITEM_BYTES[self._entry(recipe.parts[0].name).dtype]
        format = self._formats[path]
        unit = format.unit_of(recipe.spec.shape)
        cover, _ = covering(where, recipe.spec.shape, unit)
        scales = num_elements(_scale_index(cover, unit)) * ITEM_BYTES[self._entry(recipe.scales[0]).dtype]
        return num_elements(cover) * format.bits // 8 + scales

    def format(self, path: str) -> ExpertFormat:
        """The format of this weight in the files, or the one that holds the numbers of another tool's packing."""
        recipe = self._recipe(path)
        return self.packed.held(path) if path in self.packed else self._formats.get(recipe.spec.path, PLAIN)

    def stored_as(self, path: str) -> str:
        """What a weight is in the files, for people: its packing, its format, or the dtype of a plain one."""
        if path in self.packed:
            return self.packed.name(path)
        stored = self.format(path)
        return stored.name if stored.quantised else self._entry(self._recipe(path).parts[0].name).dtype

    def _read(
        self, path: str, dtype: Any, index: Index | None, *, copy: bool, keep: bool, held: ExpertFormat | None
    ) -> np.ndarray | Quantised:
        recipe = self._recipe(path)
        where = absolute_index(index, recipe.spec.shape)
        if path in self.packed:
            return (
                self._read_packed(path, where, held or self.format(path)) if keep else self._widened(path, where, dtype)
            )
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

    def _read_packed(self, path: str, where: Index, held: ExpertFormat) -> Quantised:
        from stepjax.weights.quantised import quantised_from

        cover, _ = covering(where, self.shape(path), held.unit_of(self.shape(path)))
        assert cover == where, f"{path}: {where} does not begin and end at units of {held}"
        return quantised_from(self.packed.read(path, where, held), held)

    def _widened(self, path: str, where: Index, dtype: Any) -> np.ndarray:
        """A part of a packed weight in ``dtype``, one matrix at a time."""
        out = np.empty([span.stop - span.start for span in where], dtype)
        for lead in np.ndindex(out.shape[:-2]):
            one = (
                *(slice(span.start + i, span.start + i + 1) for i, span in zip(lead, where, strict=False)),
                *where[-2:],
            )
            out[lead] = self.packed.widened(path, one, dtype).reshape(out.shape[-2:])
        return out

    def _left_out(self, names: Resolution) -> list[str]:
        """Notes on what the files hold beside the weights of this model, and what no form in memory holds."""
        notes = []
        if names.vision:
            notes.append(f"{self.folder}: the vision encoder is left out ({len(names.vision)} tensors); text only")
        if names.unused:
            listed = ", ".join(sorted({name.rpartition(".")[2] for name in names.unused}))
            notes.append(
                f"{self.folder}: {len(names.unused)} scales of activations or caches ({listed}) are not used; both "
                "stay in the dtype of the model"
            )
        widened = [path for path in self.paths if path in self.packed and not self.resident(path).quantised]
        if widened:
            kinds = ", ".join(dict.fromkeys(map(self.packed.name, widened)))
            notes.append(f"{self.folder}: {len(widened)} quantised weights are widened while loading ({kinds})")
        return notes

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
            if self._is_packed(recipe):
                problems += self.packed.problems(recipe) or self._packing_problem(recipe, config)
                continue
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
        for format in (*filter(None, [self._named]), *FORMATS.values()):
            if (
                format.quantised
                and format.scale_suffix
                and format.value_dtype == entry.dtype
                and recipe.spec.may_be(format)
            ):
                return f"{where} is {entry.dtype} without its scales {part.name}{format.scale_suffix}"
        return f"{where} is {entry.dtype}, expected {' or '.join(_FLOATS)}"

    def _quantised_problem(
        self, recipe: Recipe, part: StoredPart, scales: str, config: ModelConfig
    ) -> tuple[ExpertFormat, str]:
        """The format of a stored tensor with scales, and what is wrong with the two; "" if nothing is."""
        where, stored = self._where(part.name), self._entry(part.name).dtype
        formats = [format for format in FORMATS.values() if format.scale_suffix == recipe.scale_suffix]
        if self._named is not None and self._named.scale_suffix == recipe.scale_suffix:
            formats = [self._named]  # others of this suffix are not in the folder
        of_dtype = [format for format in formats if format.value_dtype == stored]
        if not of_dtype and recipe.spec.may_be(formats[0]):
            expected = " or ".join(dict.fromkeys(format.value_dtype for format in formats))
            return formats[0], f"{where} is {stored}, expected {expected} since it has scales {scales}"
        results = [self._mismatch(format, recipe, part, scales, config) for format in of_dtype or formats[:1]]
        fitting = [format for format, problem in results if not problem]
        if not fitting:
            return results[0]
        if len(fitting) > 1:
            return fitting[0], f"{where} {_may_be(*(format.name for format in fitting))}"
        return fitting[0], self._value_problem(fitting[0], where, scales)

    def _is_packed(self, recipe: Recipe) -> bool:
        """Whether a weight lies in another tool's packing: it looks so, and config.json does not say one of ours."""
        ours = self._named is not None and recipe.scales and recipe.scale_suffix == self._named.scale_suffix
        return not ours and any(map(self.packed.has, recipe.parts))

    def _packing_problem(self, recipe: Recipe, config: ModelConfig) -> list[str]:
        """That a weight in a packing could as well be in a format of the table, where config.json is silent."""
        if self._settings or not recipe.scales:
            return []
        part, scales = recipe.parts[0], recipe.scales[0]
        formats = [format for format in FORMATS.values() if format.scale_suffix == recipe.scale_suffix]
        formats = [format for format in formats if format.value_dtype == self._entry(part.name).dtype]
        results = [self._mismatch(format, recipe, part, scales, config) for format in formats]
        names = [format.name for format, problem in results if not problem]
        packing = f"another tool's {self.packed.name(recipe.spec.path)}"
        return [f"{self._where(part.name)} {_may_be(packing, *names)}"] if names else []

    def _mismatch(
        self, format: ExpertFormat, recipe: Recipe, part: StoredPart, scales: str, config: ModelConfig
    ) -> tuple[ExpertFormat, str]:
        """A format with the sizes of a stored tensor and its scales, and where shapes or dtypes are not its own."""
        values, scale = self._entry(part.name), self._entry(scales)
        where, where_scale = self._where(part.name), self._where(scales)
        if not recipe.spec.may_be(format):
            return format, f"{where} has scales {scales}, but this weight is never quantised in {format.name}"
        if format is not self._named or "name" not in self._settings:  # sizes come with a name
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
        return format, ""

    def _value_problem(self, format: ExpertFormat, where: str, scales: str) -> str:
        """What is wrong with the scales' values, or with a format whose sizes differ from those of other weights."""
        same_kind = next((other for other in self._formats.values() if type(other) is type(format)), format)
        if format != same_kind:
            return f"{where} is not held as other weights are: {format}, expected {same_kind}"
        problem = format.scale_problem(self._files[scales].view(scales))
        return problem and f"{self._where(scales)} {problem}"

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


def _may_be(*names: str) -> str:
    """Ends the message that nothing tells formats apart."""
    return (
        f"may be {' or '.join(names)}, which have the same names, shapes and dtypes; name one in config.json: "
        "quantization_config, as `stepjax convert` does"
    )


def _rules(folder: Path, hub: Mapping[str, Any]) -> tuple[QuantRules, ExpertFormat | None]:
    """What the folder's configuration files say of quantised weights, and the format of ours that they name."""
    names = [name for name in ("hf_quant_config.json", "quantize_config.json") if (folder / name).exists()]
    beside = {name: read_json(inside(folder, name)) for name in names}
    try:
        rules = quant_rules(text_config(hub), beside)
        return rules, named_in(rules.settings)
    except ConfigError as error:
        raise ConfigError(f"{folder / 'config.json'}: {error}") from None


def load_params(
    checkpoint: WeightSource,
    dtype: Any,
    *,
    experts: ExpertForms = None,
    dense: ExpertFormat = PLAIN,
    progress: ProgressCallback | None = None,
) -> dict[str, Weight]:
    """Every weight as jax arrays on the default device, one at a time, while threads read those that follow: beside the
    model, memory holds little more than one weight.

    Args:
      experts: how to hold the routed experts, all of them or each weight by its path; None: as `Checkpoint.resident`
        says.
      dense: how to hold the linear maps beside them (`read_as`).
    """
    import jax

    params, done = {}, 0
    sizes = {path: checkpoint.stored_bytes(path) for path in checkpoint.paths}

    def read(path: str) -> np.ndarray | Quantised:
        return jax.tree.map(_in_memory, read_as(checkpoint, path, dtype, experts, dense=dense, copy=True))

    limit = (1 + AHEAD) * max(sizes.values())
    for path, value in read_ahead(checkpoint.paths, read, sizes.__getitem__, limit=limit):
        params[path] = jax.block_until_ready(jax.device_put(value))
        done += sizes[path]
        if progress:
            progress(done, sum(sizes.values()))
    return params


def read_as(
    checkpoint: WeightSource,
    path: str,
    dtype: Any,
    experts: ExpertForms,
    *,
    dense: ExpertFormat = PLAIN,
    index: Index | None = None,
    copy: bool = False,
) -> np.ndarray | Quantised:
    """`WeightSource.read`, with the routed experts in a format: kept where they are so, else made from ``dtype``.

    Args:
      dense: what the linear maps beside the experts are quantised to, from float32 (`stepjax.weights.fp8_rows`).

    Raises:
      ConfigError: the format cannot hold the weight.
    """
    if dense.quantised and is_dense_map(path):
        from stepjax.weights.quantised import quantise

        return quantise(checkpoint.read(path, dtype=np.float32, index=index, copy=copy), dense)
    form = wanted_form(checkpoint, path, experts)
    stored = checkpoint.format(path)
    if checkpoint.by_path:
        kept = form.quantised and ".experts." in path and form in (stored, stored.refined(form.unit[1] or 0))
    else:
        kept = form.quantised and form == stored
    if kept:
        value = checkpoint.read_kept(path, dtype=dtype, index=index, copy=copy, held=form)
    else:
        value = checkpoint.read(path, dtype=dtype, index=index, copy=copy)
    if not form.quantised or ".experts." not in path or not isinstance(value, np.ndarray):
        return value
    from stepjax.weights.quantised import quantise

    return quantise(value, form)


def wanted_form(checkpoint: WeightSource, path: str, experts: ExpertForms) -> ExpertFormat:
    """How a weight is to be held; a form for the experts is also asked of others that are stored so."""
    if experts is None:
        return checkpoint.resident(path) if checkpoint.by_path else checkpoint.resident_experts
    return experts.get(path, PLAIN) if isinstance(experts, Mapping) else experts


def _in_memory(value: np.ndarray) -> np.ndarray:
    """``value``, and no longer in the file, which may change or shrink: XLA:CPU takes aligned memory over as it is."""
    return value if value.flags.writeable else np.array(value)


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
