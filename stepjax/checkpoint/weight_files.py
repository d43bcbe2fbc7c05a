"""The weight files of a checkpoint folder: which ones they are, and which tensor lies in which.

A name in an index is input from a stranger: it may only name a file of this folder.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepjax.checkpoint.safetensors_file import MAX_HEADER_BYTES, SafetensorsFile, regular_size, strict_json
from stepjax.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Four tensors for each of 3 · 288 matrices in 42 layers, in the spelling of a vision-language class: 18 MB.
MAX_INDEX_BYTES = 32 * 2**20
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".npz")
_FILE_NAME = re.compile(r"[\w][\w.+=-]*\.safetensors", re.ASCII)


@dataclass(frozen=True)
class Shards:
    """Checked files of a folder."""

    files: Mapping[str, SafetensorsFile]  # by tensor
    problems: tuple[str, ...]  # contradictions between the index and the files
    notes: tuple[str, ...]  # what is odd but harmless


def open_shards(folder: Path) -> Shards:
    """Open every weight file of ``folder`` and locate its tensors.

    Raises:
      CheckpointError: there are no safetensors files, or one of them is damaged.
    """
    weight_map, notes = _index(folder)
    if weight_map is None:
        names = [SINGLE] if (folder / SINGLE).exists() else sorted(path.name for path in folder.glob("*.safetensors"))
        if not names:
            raise CheckpointError(_no_weights(folder))
    else:
        names = sorted(set(weight_map.values()))
        unused = sorted({path.name for path in folder.glob("*.safetensors")} - set(names))
        if unused:
            notes.append(f"{folder / INDEX} names {len(names)} files; not read: {', '.join(unused[:5])}")
    opened, damaged = {}, []
    for name in names:
        try:
            opened[name] = SafetensorsFile(inside(folder, name))
        except CheckpointError as error:
            damaged.append(str(error))
    if damaged:
        more = f"\n  and {len(damaged) - 5} more files" if len(damaged) > 5 else ""
        raise CheckpointError("\n  ".join(damaged[:5]) + more)
    files, problems = _locate(opened)
    if weight_map is not None:
        problems += _compare(folder, weight_map, opened)
    return Shards(files, tuple(problems), tuple(notes))


def has_weights(folder: Path) -> bool:
    """Whether a folder has safetensors, or weights in a form that is never read."""
    pickles = {*_PICKLES} - {".npz"}  # scores of tokens lie in .npz files too
    return any(file.suffix in {".safetensors", *pickles} for file in folder.iterdir())


def inside(folder: Path, name: str) -> Path:
    """The file ``name`` of ``folder``, which no link may lead out of.

    The hub's cache is the exception: ``snapshots/<revision>/`` and its folders hold links into the ``blobs/`` beside.
    """
    path, real = folder / name, folder.resolve()
    if not path.is_symlink():
        return path
    target = Path(os.path.realpath(path))  # Path.resolve raises on a loop of links
    homes = [
        real,
        *(above.parent.parent / "blobs" for above in (real, *real.parents) if above.parent.name == "snapshots"),
    ]
    if not any(target.is_relative_to(home) for home in homes):
        raise CheckpointError(f"{path}: is a link out of the folder, to {target}; replace it by the file itself")
    return path


def _index(folder: Path) -> tuple[dict[str, str] | None, list[str]]:
    """Tensor → file name as the index has it, or None without an index; and notes."""
    path = folder / INDEX
    if not path.exists() and not path.is_symlink():
        return None, []
    index = read_json(inside(folder, INDEX))
    weight_map: Any = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: has no weight_map of tensor names to file names; download it again")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _FILE_NAME.fullmatch(file):
            raise CheckpointError(
                f"{path}: tensor {name[:120]!r} is said to be in {str(file)[:120]!r}, expected the plain name of a "
                ".safetensors file in the same folder; do not use this checkpoint unless you know who made it"
            )
    absent = sorted(file for file in {*weight_map.values()} if not (folder / file).exists())
    if absent:
        listed = ", ".join(absent[:5]) + (" …" if len(absent) > 5 else "")
        held = [name for name, file in weight_map.items() if file == absent[0]]
        raise CheckpointError(
            f"{folder}: {len(absent)} of {len(set(weight_map.values()))} weight files are missing: {listed}; "
            f"{absent[0]} holds {len(held)} tensors, as {held[0]}; download the missing files"
        )
    return weight_map, []


def json_bytes(value: Any) -> bytes:
    """As the hub's files have it: indented, in UTF-8, with a last line end."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of bounded size; errors name the file."""
    limit = MAX_INDEX_BYTES if path.name == INDEX else MAX_HEADER_BYTES
    if regular_size(path) > limit:
        raise CheckpointError(f"{path}: is larger than {limit} bytes; download it again")
    try:
        value = strict_json(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: is not valid JSON ({error}); download it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a JSON {type(value).__name__}, expected an object")
    return value


def _no_weights(folder: Path) -> str:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    if pickles:
        return (
            f"{folder}: its weights are {', '.join(pickles[:5])}, which can run code when opened and are never read; "
            "convert them to safetensors, or download a safetensors release"
        )
    return f"{folder}: holds no .safetensors file; download the weights, or name another folder"


def _locate(opened: Mapping[str, SafetensorsFile]) -> tuple[dict[str, SafetensorsFile], list[str]]:
    files: dict[str, SafetensorsFile] = {}
    problems = []
    for file in opened.values():
        for name in file.entries:
            if name in files:
                problems.append(f"{file.path}: tensor {name} is also in {files[name].path.name}, expected it once")
            files[name] = file
    return files, problems


def _compare(folder: Path, weight_map: Mapping[str, str], opened: Mapping[str, SafetensorsFile]) -> list[str]:
    """Both ways: what the index promises is in its file, and what a file holds is in the index."""
    problems = [
        f"{folder / file}: tensor {name} is not in this file, although {INDEX} says so"
        for name, file in weight_map.items()
        if name not in opened[file].entries
    ]
    for file, content in opened.items():
        for name in content.entries:
            if weight_map.get(name) != file:
                said = f"says {weight_map[name]}" if name in weight_map else "lacks it"
                problems.append(f"{folder / file}: tensor {name} is in this file, but {INDEX} {said}")
    return problems
