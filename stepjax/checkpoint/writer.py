"""Write a model as the hub serves it: every tensor under the release's name, in shards with an index.

The names and files are in the documentation (docs/architecture.md, Checkpoint layout).

A folder appears whole or not at all: it is written beside its place, flushed to the disk and then renamed. Tensors are
written one at a time, so memory holds one of them and not a shard.

The parts, in order: a process's share of the files, a shard, a weight as its tensors, `save`, the plan of what is
written and from where, the shards and their index, ``config.json``, the checks of source and target, and the folder
that appears.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from stepjax.checkpoint.hf_config import quantization_config, to_hf
from stepjax.checkpoint.reader import Checkpoint, ProgressCallback, read_config
from stepjax.checkpoint.weight_files import INDEX, inside, json_bytes, read_json
from stepjax.config import VISION_TYPE, ModelConfig, text_config
from stepjax.errors import CheckpointError, ConfigError
from stepjax.weights.dtypes import DTYPES, ITEM_BYTES
from stepjax.weights.expert_format import ExpertFormat
from stepjax.weights.formats import named_in
from stepjax.weights.inventory import TensorSpec, inventory, quantized
from stepjax.weights.plain import PLAIN
from stepjax.weights.quantised import Quantised, format_of, quantise, quantised_from
from stepjax.whole_file import sync

MAX_SHARD_BYTES = 9 * 2**30  # about the release's 44 files
# What makes the folder usable elsewhere. Python files of the release are copied as data and never imported.
_COMPANIONS = (
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
    "*.py",
    "LICENSE*",
)

Weights = Mapping[str, Any]  # our path → numpy or jax array, or Quantised


@dataclass(frozen=True)
class Share:
    """One process's part in writing a folder that all of them see: every ``count``-th file."""

    index: int
    count: int
    wait: Callable[[str], None]  # until all processes have come to this point


class ShardWriter:
    """A file for ``tensors``; it is opened with the first of them, and flushed to the disk and closed with the last."""

    def __init__(self, path: Path, tensors: Sequence[TensorSpec]):
        self.path = path
        # Wide dtypes first: then every tensor begins at a multiple of its element size, as readers that map it like.
        ordered = sorted(tensors, key=lambda tensor: -ITEM_BYTES[tensor.dtype])
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
        """Write one tensor; the order is free, and each is written exactly once."""
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
        """Close a file that did not get all its tensors; a finished one is closed already."""
        if self._file is not None:
            self._file.close()


@dataclass(frozen=True)
class _Weight:
    """One weight to be written: as one tensor, or as a quantised tensor and its scales."""

    tensors: tuple[TensorSpec, ...]
    format: ExpertFormat
    get: Callable[[], Any]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors)

    def arrays(self) -> Iterator[tuple[TensorSpec, np.ndarray]]:
        """The tensors with their values, in the stored dtype."""
        value = self.get()
        if isinstance(value, Quantised) and value.format != self.format:
            value = quantised_from(list(map(np.asarray, value.leaves)), value.format).dequantize_numpy(DTYPES["BF16"])
        if not self.format.quantised:
            yield self.tensors[0], np.asarray(value).astype(DTYPES[self.tensors[0].dtype], copy=False)
            return
        if not isinstance(value, Quantised):
            by_matrix = hasattr(value, "__getitem__") and not hasattr(value, "dtype")  # computes each when read
            value = quantise(value if by_matrix else np.asarray(value), self.format)
        if not np.isfinite(np.asarray(value.scale).astype(np.float32)).all():
            raise CheckpointError(
                f"export: {self.tensors[0].path} has values that are not finite and cannot be quantised"
            )
        for tensor, leaf in zip(self.tensors, (value.q, value.scale), strict=True):
            yield tensor, np.asarray(leaf)


def save(
    folder: Path | str,
    config: ModelConfig,
    params: Weights,
    *,
    source: Path | str | None = None,
    experts: ExpertFormat | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    companions: Mapping[str, bytes] | None = None,
    share: Share | None = None,
    progress: ProgressCallback | None = None,
) -> Path:
    """Write ``params`` as a checkpoint folder and return its path.

    Weights become BF16 and the router's bias F32, as in the release; quantised weights are written as they are, and
    widened where the release's layout has no names for their format, as for those of other tools.

    Args:
      params: by our path. An entry may be computed on access; it is read twice, to be checked and to be written.
      source: the checkpoint the model came from. Weights that ``params`` lacks are copied from it unchanged (MTP layers
        that were not trained, say), as are its ``config.json``, tokenizer, template and remote code.
      experts: how the routed experts are written, in a format that is `spelled`. What ``source`` has in another format
        is widened first; `PLAIN` widens every quantised weight. None leaves them as they are.
      max_shard_bytes: of one file; a larger tensor gets a file of its own.
      overwrite: replace a checkpoint at ``folder``; anything else there is never replaced.
      companions: content of more files by name, such as a tokenizer's, where ``source`` gives none.
      share: this process's part, when several processes make the same call; None: everything. Process 0 puts the
        folder in its place. If one fails, the others wait until they are ended, as `stepjax.sharding.watchdog` does.

    Raises:
      CheckpointError: a weight is missing, unknown or misshapen, or the folder cannot be written; nothing is left.
      ConfigError: the format cannot hold the experts, or no folder is written in it.
    """
    folder = Path(os.path.abspath(folder))  # not resolved: a link in its place is refused below
    source = Path(source) if source is not None else None
    check_target(folder, overwrite=overwrite)
    if source is not None:
        _check_same_model(config, source)
    plan = _plan(config, params, source=source, experts=experts)
    with _appearing_together(folder, num_bytes=sum(weight.num_bytes for weight in plan), share=share) as target:
        if share is None or share.index == 0:
            if source is not None:
                copy_companions(source, target)
            for name, content in (companions or {}).items():
                _write(target / name, content)
            _write(target / "config.json", _config_file(config, source=source, format=_format_of(plan)))
        _write_shards(target, plan, max_shard_bytes=max_shard_bytes, share=share, progress=progress)
    return folder


def _plan(config: ModelConfig, params: Weights, *, source: Path | None, experts: ExpertFormat | None) -> list[_Weight]:
    """Every weight of the inventory with the place it comes from; refuses whatever does not fit."""
    specs = inventory(config)
    unknown = sorted(set(params) - {spec.path for spec in specs})
    if unknown:
        raise CheckpointError(
            f"export: {unknown[0]} is not a weight of this configuration ({len(unknown)} such in all)"
        )
    absent = [spec for spec in specs if spec.path not in params]
    origin = _origin(absent, source)
    if origin is not None and not origin.has_mtp and not any(path.startswith("mtp.") for path in params):
        specs = tuple(spec for spec in specs if not spec.path.startswith("mtp."))  # the source has none either
    plan = []
    for spec in specs:
        wanted = experts if spec.part == "experts" or experts == PLAIN else None
        if wanted is not None:
            wanted.check_shape(spec.shape)
            if not wanted.spelled:
                raise ConfigError(
                    f"export: the release's layout has no names for {wanted.name}; use `write_form` (stepjax convert "
                    f"--form {wanted.name})"
                )
        if spec.path in params:
            plan.append(_from_params(spec, params, wanted))
        else:
            assert origin is not None
            plan.append(_from_source(spec, origin, wanted))
    formats = {str(weight.format) for weight in plan if weight.format.quantised}
    if len(formats) > 1:
        raise CheckpointError(f"export: weights are quantised as {' and '.join(sorted(formats))}, expected one format")
    written = _format_of(plan)
    named = named_in(quantization_config(config, written) or {})
    if named is not None and named.name != written.name:
        raise ConfigError(
            f"export: a folder of {written.name} would be read as {named.name}; give the format a `named_by` that "
            "knows its `quantization_config`"
        )
    return plan


def _origin(absent: list[TensorSpec], source: Path | None) -> Checkpoint | None:
    """The checkpoint that gives what ``params`` lacks."""
    if not absent:
        return None
    if source is None:
        raise CheckpointError(
            f"export: {len(absent)} weights are missing, first {absent[0].path}; pass source=, the checkpoint folder "
            "they are to be copied from"
        )
    return Checkpoint(source)


def _from_params(spec: TensorSpec, params: Weights, wanted: ExpertFormat | None) -> _Weight:
    value = params[spec.path]
    if tuple(value.shape) != spec.shape:
        raise CheckpointError(f"export: {spec.path} has shape {list(value.shape)}, expected {list(spec.shape)}")
    format = format_of(value)
    if not format.quantised or not format.spelled:
        format = wanted or PLAIN
    elif not spec.may_be(format):
        raise CheckpointError(f"export: {spec.path} is quantised, but this weight is stored as {spec.dtype} only")
    else:
        scales = quantized(spec, format)[1]
        if tuple(value.scale.shape) != scales.shape:
            shapes = f"{list(value.scale.shape)}, expected {list(scales.shape)}"
            raise CheckpointError(f"export: {scales.path} has shape {shapes}")
    return _Weight(quantized(spec, format), format, lambda: params[spec.path])


def _from_source(spec: TensorSpec, origin: Checkpoint, wanted: ExpertFormat | None) -> _Weight:
    held = origin.format(spec.path)
    stored = PLAIN if spec.path in origin.packed or not held.spelled else held  # others are widened
    format, dtype = wanted or stored, DTYPES[spec.dtype]
    read = origin.read_kept if stored == format and stored.quantised else origin.read
    return _Weight(quantized(spec, format), format, lambda: read(spec.path, dtype=dtype))


def _format_of(plan: list[_Weight]) -> ExpertFormat:
    return next((weight.format for weight in plan if weight.format.quantised), PLAIN)


def _write_shards(
    target: Path, plan: list[_Weight], *, max_shard_bytes: int, share: Share | None, progress: ProgressCallback | None
) -> None:
    total = sum(weight.num_bytes for weight in plan)
    places = _places(target, [tensor for weight in plan for tensor in weight.tensors], max_shard_bytes)
    files = list(dict.fromkeys(places.values()))
    shared = {id(file) for i, file in enumerate(files) if share is None or i % share.count == share.index}
    names = {name for name, file in places.items() if id(file) in shared}
    plan = [weight for weight in plan if any(tensor.hub_name in names for tensor in weight.tensors)]
    done, to_do = 0, sum(weight.num_bytes for weight in plan)
    with contextlib.ExitStack() as writers:
        for writer in files:
            writers.callback(writer.close)
        for weight in plan:
            for tensor, value in weight.arrays():
                if tensor.hub_name in names:
                    places[tensor.hub_name].write(tensor, value)
            done += weight.num_bytes
            if progress:
                progress(done, to_do)
    if share is not None and share.index:
        return
    weight_map = {name: places[name].path.name for name in sorted(places)}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write(target / INDEX, (json.dumps(index, indent=2) + "\n").encode())


def _places(target: Path, tensors: list[TensorSpec], max_shard_bytes: int) -> dict[str, ShardWriter]:
    """Hub name → the shard it goes to; shards are filled in the order of the inventory."""
    groups: list[list[TensorSpec]] = [[]]
    filled = 0
    for tensor in tensors:
        if groups[-1] and filled + tensor.num_bytes > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.num_bytes
    writers = [ShardWriter(target / f"model-{i:05}.safetensors", group) for i, group in enumerate(groups, start=1)]
    return {tensor.hub_name: writer for writer, group in zip(writers, groups, strict=True) for tensor in group}


def _config_file(config: ModelConfig, *, source: Path | None, format: ExpertFormat) -> bytes:
    """The source's ``config.json`` to the byte, except for a quantization_config that no longer holds."""
    about = quantization_config(config, format)
    if source is None:
        hub = to_hf(dataclasses.replace(config, fp8_block=None))
    else:
        path = inside(source, "config.json")
        hub, described = read_json(path), read_config(source)
        if hub.get("model_type") == VISION_TYPE:
            hub = dict(text_config(hub)) | {"architectures": ["Step3p5ForCausalLM"]}  # its vision half is not written
            hub.pop("quantization_config", None)
            return json_bytes(hub | ({"quantization_config": about} if about else {}))
        same_blocks = described.fp8_block is not None and format.configured(described) == described
        if hub.get("quantization_config") == about or same_blocks:
            return path.read_bytes()
    hub.pop("quantization_config", None)
    return json_bytes(hub | ({"quantization_config": about} if about else {}))


def _check_same_model(config: ModelConfig, source: Path) -> None:
    """The source's config.json goes with the weights, hence must describe them.

    The window may differ: 512 in the file is read as 512 keys or 513 by different stacks, and stays 512 in the file.
    """
    origin = read_config(source)
    ours, theirs = (dataclasses.replace(described.with_window(1), fp8_block=None) for described in (config, origin))
    for field in dataclasses.fields(ModelConfig):
        if getattr(ours, field.name) != getattr(theirs, field.name):
            raise CheckpointError(
                f"{source / 'config.json'}: describes another model than the one to be exported: {field.name} differs; "
                "pass as source the checkpoint the model came from"
            )


def check_target(folder: Path, *, overwrite: bool) -> None:
    """Raise `CheckpointError` unless a checkpoint may be written at ``folder``."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise CheckpointError(f"{folder}: exists and is not a folder; choose another name")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise CheckpointError(f"{folder}: is not empty; choose another folder, or ask to overwrite it")
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: is not a checkpoint (it has no config.json) and is not overwritten; choose another folder"
        )


@contextlib.contextmanager
def _appearing_together(folder: Path, *, num_bytes: int, share: Share | None) -> Iterator[Path]:
    """`_appearing`, with one folder for all processes, which process 0 makes and puts in its place."""
    if share is None:
        with _appearing(folder, num_bytes=num_bytes) as target:
            yield target
        return
    work = folder.parent / f".{folder.name}.together.partial"
    if share.index:
        share.wait("begin")
        yield work / "new"
        share.wait("written")
    else:
        with _appearing(folder, num_bytes=num_bytes, work=work) as target:
            share.wait("begin")
            yield target
            share.wait("written")
    share.wait("placed")


@contextlib.contextmanager
def _appearing(folder: Path, *, num_bytes: int, work: Path | None = None) -> Iterator[Path]:
    """A folder to write into; it takes the place of ``folder`` after success and is removed after an error."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder.parent).free
        if free < num_bytes:
            raise CheckpointError(
                f"{folder}: needs {num_bytes:,} bytes, but the disk has {free:,} free; choose another disk"
            )
        if work is None:
            work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
        else:
            shutil.rmtree(work, ignore_errors=True)  # of a run that was killed
            work.mkdir()
        try:
            (work / "new").mkdir()  # with the user's permissions; mkdtemp's are private
            yield work / "new"
            sync(work / "new")
            if folder.exists():
                os.rename(folder, work / "old")
            try:
                os.rename(work / "new", folder)
            except OSError:
                if (work / "old").exists():
                    os.rename(work / "old", folder)
                raise
            sync(folder.parent)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(f"{folder}: could not be written ({error}); nothing was left behind") from None


def copy_companions(source: Path, target: Path) -> None:
    """Copy what makes a folder usable elsewhere: tokenizer, template, remote code as data."""
    names = sorted({path.name for pattern in _COMPANIONS for path in source.glob(pattern) if path.is_file()})
    for name in names:
        _write(target / name, inside(source, name).read_bytes())


def _write(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
