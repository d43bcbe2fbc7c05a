"""Write any opened checkpoint as a folder whose routed experts are in another tool's form.

Shard by shard: a run that was ended leaves the finished files beside the target, and the same command goes on with
them. The folder takes its place once it is whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stepjax.checkpoint.graft import Grafted
from stepjax.checkpoint.hf_config import plain_matrices, to_hf
from stepjax.checkpoint.reader import Checkpoint, ProgressCallback
from stepjax.checkpoint.source import WeightSource
from stepjax.checkpoint.weight_files import INDEX, inside, json_bytes, read_json
from stepjax.checkpoint.writer import MAX_SHARD_BYTES, ShardWriter, check_target, copy_companions
from stepjax.config import ModelConfig, text_config
from stepjax.errors import CheckpointError
from stepjax.packings.written import Written, WrittenForm, WrittenFp8
from stepjax.weights.dtypes import DTYPES
from stepjax.weights.finite import not_finite
from stepjax.weights.inventory import TensorSpec, inventory
from stepjax.weights.quantised import Quantised
from stepjax.whole_file import sync, write_whole

Encode = Callable[[str, int, np.ndarray], tuple[np.ndarray, ...]]

_PLAN = "plan.json"  # of the work folder: what is being written, so that only the same is continued
_LISTS = ("layer_types", "rope_theta", "partial_rotary_factors", "swiglu_limits", "swiglu_limits_shared")


@dataclass(frozen=True)
class _Weight:
    """One weight of the model and the tensors that hold it, those of a matrix after each other."""

    spec: TensorSpec
    tensors: tuple[TensorSpec, ...]
    roles: tuple[Written, ...]  # of one matrix; () of a weight that is written as it is

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors)


def write_form(
    folder: Path | str,
    source: WeightSource,
    form: WrittenForm,
    *,
    changed: Mapping[str, Any] | None = None,
    encode: Encode | None = None,
    companions: Mapping[str, bytes] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: ProgressCallback | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Path:
    """Write ``source`` with its experts in ``form`` and return the folder. Other weights become bfloat16.

    Args:
      changed: values of some weights instead of the source's, by path; their matrices are computed when they are asked
        for. With it, a run that was ended begins anew.
      encode: makes the tensors of one expert's matrix, float32, of its path and number, in place of the form's own
        rounding. With it, a run that was ended begins anew.
      companions: content of files by name, where the source is no folder that has them.
      say: told once that an earlier run is continued.

    Raises:
      CheckpointError: a weight is not finite, or the folder cannot be written.
      ConfigError: the form cannot hold the experts.
    """
    folder = Path(os.path.abspath(folder))
    check_target(folder, overwrite=False)
    plan, again = _plan(source, form), changed is None and encode is None
    files = _files(plan, max_shard_bytes)
    with _work_folder(folder, _fingerprint(source, form, files) if again else None, say) as work:
        target = work / "new"
        done = {name for name in files if (target / name).exists()}
        left = sum(tensor.num_bytes for name in files if name not in done for tensor in files[name])
        _check_free(folder, left)
        if done:
            say(f"{folder}: continuing with {len(done)} of {len(files)} files that an earlier run wrote")
        _write_files(target, plan, files, done, _Values(source, form, changed or {}, encode), progress)
        _write_small_files(target, source, form, files, companions or {})
        sync(target)
        if folder.exists():
            folder.rmdir()  # empty, as was checked
        os.rename(target, folder)
        sync(folder.parent)
    return folder


def _plan(source: WeightSource, form: WrittenForm) -> list[_Weight]:
    held = set(source.paths)
    return [_planned(spec, form) for spec in inventory(source.config) if spec.path in held]


def _planned(spec: TensorSpec, form: WrittenForm) -> _Weight:
    if spec.part != "experts":
        return _Weight(spec, (spec,), ())
    count, rows, columns = spec.shape
    form = form.of(spec.path)
    roles = form.tensors(rows, columns)
    module = spec.hub_name.removesuffix(".weight")

    def tensor(name: str, written: Written, lead: tuple[int, ...]) -> TensorSpec:
        return dataclasses.replace(
            spec, hub_name=f"{name}.{written.role}", shape=(*lead, *written.shape), dtype=written.dtype
        )

    if form.stacked:
        return _Weight(spec, tuple(tensor(module, role, (count,)) for role in roles), roles)
    names = (module.replace(".moe.", f".moe.experts.{expert}.") for expert in range(count))
    return _Weight(spec, tuple(tensor(name, role, ()) for name in names for role in roles), roles)


def _files(plan: Sequence[_Weight], max_shard_bytes: int) -> dict[str, list[TensorSpec]]:
    """File name → its tensors, in the order of the inventory."""
    groups: list[list[TensorSpec]] = [[]]
    filled = 0
    for tensor in (tensor for weight in plan for tensor in weight.tensors):
        if groups[-1] and filled + tensor.num_bytes > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.num_bytes
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups, start=1)}


@dataclass(frozen=True)
class _Values:
    """Where the values of weights come from."""

    source: WeightSource
    form: WrittenForm
    changed: Mapping[str, Any]
    encode: Encode | None

    def tensors(self, weight: _Weight) -> Iterator[np.ndarray]:
        """The tensors of a weight, in its order."""
        if not weight.roles:
            yield self._whole(weight.spec)
            return
        count = weight.spec.shape[0]
        if not self.form.stacked:
            for expert in range(count):
                yield from self._encoded(weight, expert)
            return
        stacks = [np.empty(tensor.shape, DTYPES[tensor.dtype]) for tensor in weight.tensors]
        for expert in range(count):
            for stack, array in zip(stacks, self._encoded(weight, expert), strict=True):
                stack[expert] = array
        yield from stacks

    def _encoded(self, weight: _Weight, expert: int) -> tuple[np.ndarray, ...]:
        path = weight.spec.path
        if copied := self._copied(weight, expert):
            return copied
        matrix = self._matrix(path, expert)
        if self.encode:
            return self.encode(path, expert, matrix)
        largest = float(np.abs(matrix).max(initial=0))
        partner = path.replace(".gate", ".up") if path.endswith(".gate") else path.replace(".up", ".gate")
        if self.form.shares and partner != path:
            largest = max(largest, float(np.abs(self._matrix(partner, expert)).max(initial=0)))
        return self.form.of(path).encode(matrix, largest)

    def _copied(self, weight: _Weight, expert: int) -> tuple[np.ndarray, ...] | None:
        """The tensors of a matrix that is in the form already: to round it again would change it."""
        path = weight.spec.path
        source = self.source.backbone if isinstance(self.source, Grafted) else self.source
        if self.encode or path in self.changed or not isinstance(source, Checkpoint):
            return None
        if path in source.packed:
            arrays = source.packed.stored_matrix(path, expert, self.form.of(path), weight.roles)
            return tuple(arrays) if arrays else None
        if isinstance(self.form, WrittenFp8) and source.format(path) == self.form.format:
            index = slice(expert, expert + 1), slice(None), slice(None)
            held = source.read_kept(path, dtype=np.float32, index=index, copy=True)
            return tuple(leaf[0] for leaf in held.leaves) if isinstance(held, Quantised) else None
        return None

    def _matrix(self, path: str, expert: int) -> np.ndarray:
        """One expert's matrix, float32."""
        if path in self.changed:
            matrix = np.asarray(self.changed[path][(expert,)], np.float32)
        else:
            index = slice(expert, expert + 1), slice(None), slice(None)
            matrix = self.source.read(path, dtype=np.float32, index=index, copy=True)[0]
        if not_finite({path: matrix}):
            raise CheckpointError(f"{self.source.folder}: {path} of expert {expert} has values that are not finite")
        return matrix

    def _whole(self, spec: TensorSpec) -> np.ndarray:
        dtype = DTYPES[spec.dtype]
        if spec.path in self.changed:
            return np.asarray(self.changed[spec.path]).astype(dtype)
        return self.source.read(spec.path, dtype=dtype, copy=True)


def _write_files(
    target: Path,
    plan: Sequence[_Weight],
    files: Mapping[str, Sequence[TensorSpec]],
    done: set[str],
    values: _Values,
    progress: ProgressCallback | None,
) -> None:
    target.mkdir(exist_ok=True)
    place = {tensor.hub_name: name for name, tensors in files.items() if name not in done for tensor in tensors}
    left = {name: len(tensors) for name, tensors in files.items()}
    total = sum(weight.num_bytes for weight in plan)
    written = 0
    with contextlib.ExitStack() as opened:
        writers: dict[str, ShardWriter] = {}
        for weight in plan:
            wanted = [tensor for tensor in weight.tensors if tensor.hub_name in place]
            arrays = values.tensors(weight) if wanted else iter(())
            for tensor, array in zip(weight.tensors if wanted else (), arrays, strict=True):
                name = place.get(tensor.hub_name)
                if name is None:
                    continue
                if name not in writers:
                    writers[name] = ShardWriter(target / f"{name}.unfinished", files[name])
                    opened.callback(writers[name].close)
                writers[name].write(tensor, array)
                left[name] -= 1
                if not left[name]:
                    os.rename(target / f"{name}.unfinished", target / name)
            written += weight.num_bytes
            if progress:
                progress(written, total)


def _write_small_files(
    target: Path,
    source: WeightSource,
    form: WrittenForm,
    files: Mapping[str, Sequence[TensorSpec]],
    companions: Mapping[str, bytes],
) -> None:
    for path in target.iterdir():
        if path.name not in files:  # of a run that was ended here
            path.unlink()
    if source.folder.is_dir():
        copy_companions(source.folder, target)
    plain = plain_matrices(source.config)
    hub = _hub_config(source)
    settings = form.settings(source.config, plain)
    content = {"config.json": hub | ({"quantization_config": settings} if settings else {})}
    content |= form.files(source.config, plain)
    places = {tensor.hub_name: name for name, tensors in files.items() for tensor in tensors}
    total = sum(tensor.num_bytes for tensors in files.values() for tensor in tensors)
    content[INDEX] = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    texts = {name: json_bytes(value) for name, value in content.items()}
    for name, text in {**companions, **texts}.items():
        write_whole(target / name, text)


def _hub_config(source: WeightSource) -> dict[str, Any]:
    """``config.json`` of the text model: the source's own fields, and lists that name every layer."""
    ours = to_hf(dataclasses.replace(source.config, fp8_block=None))
    if not source.folder.is_dir():
        config = source.config if source.has_mtp else dataclasses.replace(source.config, mtp_layers=())
        return to_hf(dataclasses.replace(config, fp8_block=None))
    hub = dict(text_config(read_json(inside(source.folder, "config.json"))))
    hub["architectures"] = ours["architectures"]  # a vision half is not written
    hub.pop("quantization_config", None)
    if _same(ModelConfig.from_hf(hub), source.config):
        return hub
    hub |= {name: ours[name] for name in (*_LISTS, "num_nextn_predict_layers")}
    assert _same(ModelConfig.from_hf(hub), source.config), "lists of all layers describe the model"
    return hub


def _same(one: ModelConfig, other: ModelConfig) -> bool:
    """Whether two configurations are of one model; the window is read in two ways and stays as it is in the file."""
    first, second = (dataclasses.replace(config.with_window(1), fp8_block=None) for config in (one, other))
    return first == second


def _fingerprint(source: WeightSource, form: WrittenForm, files: Mapping[str, Sequence[TensorSpec]]) -> str:
    """What a run writes and of what, as a hash."""
    folders = [source.folder, *getattr(source, "donors", ())]
    stats = []
    for folder in folders:
        paths = sorted(folder.iterdir()) if folder.is_dir() else [folder]
        stats += [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths if path.is_file()]
    tensors = [(name, [(t.hub_name, t.dtype, t.shape) for t in group]) for name, group in files.items()]
    return hashlib.sha256(json.dumps([repr(form), stats, tensors]).encode()).hexdigest()


@contextlib.contextmanager
def _work_folder(folder: Path, fingerprint: str | None, say: Callable[[str], None]) -> Iterator[Path]:
    """A folder beside ``folder`` that is kept when a run is ended, and removed after success or an error of ours."""
    work = folder.parent / f".{folder.name}.partial"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        plan = work / _PLAN
        if not (plan.is_file() and fingerprint is not None and plan.read_text(encoding="utf-8") == fingerprint):
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            plan.write_text(fingerprint or "", encoding="utf-8")
        for path in work.glob("new/*.unfinished"):
            path.unlink()
        try:
            yield work
        except BaseException as error:
            finished = any((work / "new").glob("*.safetensors"))
            if not finished or not isinstance(error, OSError | KeyboardInterrupt) or fingerprint is None:
                shutil.rmtree(work, ignore_errors=True)
            elif not isinstance(error, OSError):
                say(f"{folder}: ended; finished files are kept in {work}, and the same command continues with them")
            raise
        shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        kept = f"; finished files are kept in {work}, and the same command continues" if work.exists() else ""
        raise CheckpointError(f"{folder}: could not be written ({error}){kept}") from None


def _check_free(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder.parent).free
    if free < num_bytes:
        raise CheckpointError(
            f"{folder}: needs {num_bytes:,} bytes, but the disk has {free:,} free; choose another disk"
        )
