"""Write a model as one GGUF file for llama.cpp, tensor by tensor and matrix by matrix.

The file appears whole or not at all. A run that was ended leaves what it wrote beside the target, and the same command
goes on with it. Vectors and the router are in float32, as llama.cpp wants them. The routed experts
have the type that is asked for; in a file of blocks every other matrix is Q8_0, whose error is a hundredth of a percent
of what 4 bits cost, or BF16 where its rows do not divide into blocks.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stepjax.checkpoint.gguf.file import ALIGNMENT, FLOATS, MAGIC
from stepjax.checkpoint.gguf.names import ROPE_FACTORS, always_float32, gguf_name, is_norm
from stepjax.checkpoint.gguf.settings import ARCHITECTURE, rope_factors, to_metadata
from stepjax.checkpoint.reader import ProgressCallback
from stepjax.checkpoint.source import WeightSource
from stepjax.errors import CheckpointError
from stepjax.weights.gguf_blocks import GGUF_TYPES, GgufBlocks
from stepjax.weights.gguf_encoding import ENCODERS
from stepjax.weights.inventory import TensorSpec, inventory
from stepjax.whole_file import sync

VERSION = 3
_QUANTIZATION_VERSION = 2  # of ggml's block layouts

# Names of forms, with llama.cpp's number of the file type that is nearest.
_FLOAT_FORMS = {"f32": 0, "f16": 1, "bf16": 32}
_BLOCK_FORMS = {"q4_0": 2, "q8_0": 7, "q4_k": 14, "q6_k": 18, "mxfp4": 38}
FORMS = (*_FLOAT_FORMS, *_BLOCK_FORMS)
assert set(_BLOCK_FORMS) == set(ENCODERS)

_FLOAT_CODES = {name.lower(): code for code, (name, _) in FLOATS.items()}
_TYPE_CODES = {  # of metadata, by numpy's name
    "uint32": 4,
    "int32": 5,
    "float32": 6,
    "bool": 7,
    "float64": 12,
}
_STRING, _ARRAY = 8, 9
_VALUES = 2**22  # of a matrix that are read at a time
_THREADS = min(8, os.cpu_count() or 1)  # each with some copies of so many values


@dataclass(frozen=True)
class _Planned:
    """A tensor of the file."""

    name: str
    code: int
    shape: tuple[int, ...]
    blocks: GgufBlocks | None
    spec: TensorSpec | None  # None: the factors of the frequencies

    @property
    def num_bytes(self) -> int:
        *lead, columns = self.shape
        row = self.blocks.file_bytes(columns) if self.blocks else columns * FLOATS[self.code][1].itemsize
        return int(np.prod(lead, dtype=np.int64)) * row


def write_gguf(
    path: Path | str,
    source: WeightSource,
    *,
    form: str,
    vocabulary: Mapping[str, Any] | None = None,
    name: str = "",
    overwrite: bool = False,
    progress: ProgressCallback | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Path:
    """Write the weights of ``source`` and return the path.

    Args:
      form: the type of the routed experts, one of `FORMS`. What the source has in these very blocks is copied.
      vocabulary: the metadata of the tokenizer (`stepjax.checkpoint.gguf.vocabulary.to_vocabulary`).
      name: of the model, for people.
      overwrite: replace a file at ``path``.
      say: told once that an earlier run is continued.

    Raises:
      CheckpointError: the file cannot be written, or a weight has values that are not finite.
      ConfigError: the model or a weight does not fit the form.
    """
    path = Path(path)
    if path.is_dir() or (path.exists() and not overwrite):
        raise CheckpointError(f"{path}: exists; choose another name, or ask to overwrite it")
    values = _metadata(source, form=form, vocabulary=vocabulary or {}, name=name or path.stem)
    plan = _plan(source, form)
    header, starts, total = _header(values, plan)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _unfinished(path, _fingerprint(source, header)) as partial:
            done = _whole_tensors(partial, starts, plan)
            _check_room(path, total - (starts[done] if done else 0))
            if done:
                say(f"{path}: continuing after {done} of {len(plan)} tensors that an earlier run wrote")
            with partial.open("r+b") as file:
                file.seek(0)
                file.write(header)
                for tensor, start in list(zip(plan, starts, strict=True))[done:]:
                    file.truncate(start)
                    file.seek(start)
                    for piece in _pieces(tensor, source):
                        file.write(piece)
                    if progress:
                        progress(file.tell(), total)
                file.truncate(total)
            sync(partial)
            os.replace(partial, path)
        sync(path.parent)
    except OSError as error:
        kept = "; what was written is kept, and the same command continues" if _partial_of(path).exists() else ""
        raise CheckpointError(f"{path}: could not be written ({error}){kept}") from None
    return path


def _partial_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


@contextlib.contextmanager
def _unfinished(path: Path, fingerprint: str) -> Iterator[Path]:
    """A file beside ``path`` that is kept when a run is ended, and removed after an error of ours.

    What an earlier run wrote of the same, by its fingerprint, is in it.
    """
    partial, plan = _partial_of(path), path.with_name(f".{path.name}.plan")
    if not (plan.is_file() and partial.is_file() and plan.read_text(encoding="utf-8") == fingerprint):
        partial.write_bytes(b"")
        plan.write_text(fingerprint, encoding="utf-8")
    try:
        yield partial
    except Exception as error:
        if not isinstance(error, OSError):
            partial.unlink(missing_ok=True)
            plan.unlink(missing_ok=True)
        raise
    plan.unlink(missing_ok=True)


def _whole_tensors(partial: Path, starts: Sequence[int], plan: Sequence[_Planned]) -> int:
    """Tensors at the beginning of the file that an earlier run surely wrote: all but the last of those it holds."""
    size = partial.stat().st_size
    held = sum(start + tensor.num_bytes <= size for start, tensor in zip(starts, plan, strict=True))
    return max(0, held - 1)


def _fingerprint(source: WeightSource, header: bytes) -> str:
    """What a run writes and of what, as a hash."""
    folders = [source.folder, *getattr(source, "donors", ())]
    files = [file for folder in folders for file in (sorted(folder.iterdir()) if folder.is_dir() else [folder])]
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
    return hashlib.sha256(header + repr(stats).encode()).hexdigest()


def _metadata(source: WeightSource, *, form: str, vocabulary: Mapping[str, Any], name: str) -> dict[str, Any]:
    general = {
        "general.architecture": ARCHITECTURE,
        "general.type": "model",
        "general.name": name,
        "general.quantization_version": np.uint32(_QUANTIZATION_VERSION),
        "general.file_type": np.uint32((_FLOAT_FORMS | _BLOCK_FORMS)[form]),
        "general.alignment": np.uint32(ALIGNMENT),
    }
    model = to_metadata(source.config, mtp=source.has_mtp)
    if not vocabulary:
        vocabulary = {"tokenizer.ggml.model": "no_vocab"}
    return general | model | dict(vocabulary)


def _plan(source: WeightSource, form: str) -> list[_Planned]:
    config = source.config
    full = next(layer for layer in config.layers if layer.window is None)
    width = full.head_dim
    plan = [_Planned(ROPE_FACTORS, _FLOAT_CODES["f32"], (width // 2,), None, None)] if full.rope.scaling else []
    for spec in inventory(config):
        if spec.path.startswith("mtp.") and not source.has_mtp:
            continue
        blocks = _blocks_of(spec, form)
        if blocks:
            blocks.check_shape(spec.shape)
        code = blocks.layout.code if blocks else _FLOAT_CODES[_float_of(spec, form)]
        plan.append(_Planned(gguf_name(spec.hub_name), code, spec.shape, blocks, spec))
    return plan


def _blocks_of(spec: TensorSpec, form: str) -> GgufBlocks | None:
    if form in _FLOAT_FORMS or always_float32(spec):
        return None
    if spec.part == "experts":
        return GGUF_TYPES[form]
    rest = GGUF_TYPES["q8_0"]
    return None if spec.shape[-1] % rest.layout.values else rest


def _float_of(spec: TensorSpec, form: str) -> str:
    if always_float32(spec):
        return "f32"
    return form if form in _FLOAT_FORMS else "bf16"


def _header(values: Mapping[str, Any], plan: Sequence[_Planned]) -> tuple[bytes, list[int], int]:
    """Everything before the data, where each tensor begins, and the size of the file."""
    keys = b"".join(_text(key) + _value(value) for key, value in values.items())
    offsets, end = [], 0
    for tensor in plan:
        offsets.append(end)
        end = _aligned(end + tensor.num_bytes)
    table = b"".join(
        _text(tensor.name)
        + struct.pack(f"<I{len(tensor.shape)}QIQ", len(tensor.shape), *tensor.shape[::-1], tensor.code, offset)
        for tensor, offset in zip(plan, offsets, strict=True)
    )
    header = MAGIC + struct.pack("<IQQ", VERSION, len(plan), len(values)) + keys + table
    header += bytes(_aligned(len(header)) - len(header))
    return header, [len(header) + offset for offset in offsets], len(header) + end


def _aligned(position: int) -> int:
    return -(-position // ALIGNMENT) * ALIGNMENT


def _text(text: str) -> bytes:
    content = text.encode("utf-8")
    return struct.pack("<Q", len(content)) + content


def _value(value: Any) -> bytes:
    """A typed value: text, a list of texts, a numpy scalar or a numpy vector."""
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    if isinstance(value, list):
        return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_text, value))
    array = np.asarray(value)
    code, content = _TYPE_CODES[array.dtype.name], array.astype(array.dtype.newbyteorder("<")).tobytes()
    if array.ndim:
        return struct.pack("<IIQ", _ARRAY, code, len(array)) + content
    return struct.pack("<I", code) + content


def _pieces(tensor: _Planned, source: WeightSource) -> Iterator[Any]:
    """The bytes of a tensor, a few rows at a time."""
    spec = tensor.spec
    if spec is None:
        full = next(layer for layer in source.config.layers if layer.window is None)
        yield rope_factors(full, width=full.head_dim).astype("<f4").tobytes()
        return
    runs = list(_runs(spec.shape))
    with ThreadPoolExecutor(_THREADS) as pool:  # numpy releases the interpreter's lock
        for first in range(0, len(runs), _THREADS):
            parts = pool.map(lambda index: _stored(tensor, spec, source, index), runs[first : first + _THREADS])
            for part in parts:
                yield np.ascontiguousarray(part).reshape(-1).view(np.uint8).data


def _stored(tensor: _Planned, spec: TensorSpec, source: WeightSource, index: tuple[slice, ...]) -> np.ndarray:
    from stepjax.weights.quantised import Quantised

    if tensor.blocks is not None and source.format(spec.path) == tensor.blocks:
        held = source.read_kept(spec.path, dtype=np.float32, index=index)
        assert isinstance(held, Quantised)
        return tensor.blocks.joined(held.q, held.scale)
    wide = source.read(spec.path, dtype=np.float32, index=index)
    if not np.isfinite(wide).all():
        raise CheckpointError(f"export: {spec.path} has values that are not finite")
    if tensor.blocks is not None:
        rows = wide.reshape(-1, wide.shape[-1])
        return tensor.blocks.joined(*tensor.blocks.quantise_matrix(rows))
    wide = wide + np.float32(1) if is_norm(spec) else wide
    dtype = FLOATS[tensor.code][1]
    if dtype == np.float16 and np.abs(wide).max(initial=0) > np.finfo(np.float16).max:
        raise CheckpointError(f"export: {spec.path} has values beyond float16; choose bf16")
    return wide.astype(dtype)


def _runs(shape: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """The weight as parts of whole rows of one matrix each, in the order in which they lie."""
    if len(shape) == 1:
        yield (slice(0, shape[0]),)
        return
    *lead, rows, columns = shape
    step = max(1, _VALUES // columns)
    for place in np.ndindex(*lead):
        for start in range(0, rows, step):
            yield (
                *(slice(i, i + 1) for i in place),
                slice(start, min(start + step, rows)),
                slice(0, columns),
            )


def _check_room(path: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if free < num_bytes:
        raise CheckpointError(f"{path}: needs {num_bytes:,} bytes, but the disk has {free:,} free; choose another disk")
