"""The files of a model in GGUF: one, or the parts that llama.cpp's splitter makes of it."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepjax.checkpoint.gguf.file import GgufFile
from stepjax.checkpoint.weight_files import inside
from stepjax.errors import CheckpointError

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True)
class GgufFiles:
    """Checked files of one model."""

    first: GgufFile
    files: Mapping[str, GgufFile]  # by tensor

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Of the model, which the first part holds."""
        return self.first.metadata


def open_files(path: Path) -> GgufFiles:
    """Open ``path`` and, if it is a part, all the others beside it.

    Raises:
      CheckpointError: a file is missing or damaged, or the parts contradict each other.
    """
    match = _PART.fullmatch(path.name)
    opened = [GgufFile(file) for file in (_part_paths(path, match) if match else [path])]
    count = opened[0].metadata.get("split.count", 1)
    if count != len(opened):
        raise CheckpointError(
            f"{opened[0].path}: split.count is {count!r}, but its name says {len(opened)}; keep the name that the "
            "splitter gave it, as NAME-00001-of-00002.gguf"
        )
    files: dict[str, GgufFile] = {}
    for i, file in enumerate(opened):
        if len(opened) > 1 and (file.metadata.get("split.no"), file.metadata.get("split.count")) != (i, count):
            said = file.metadata.get("split.no"), file.metadata.get("split.count")
            raise CheckpointError(f"{file.path}: split.no and split.count are {said}, expected {(i, count)}")
        for name in file.entries:
            if name in files:
                raise CheckpointError(
                    f"{file.path}: tensor {name} is also in {files[name].path.name}, expected it once"
                )
            files[name] = file
    total = opened[0].metadata.get("split.tensors.count", len(files))
    if total != len(files):
        raise CheckpointError(f"{opened[0].path}: split.tensors.count is {total!r}, but the parts hold {len(files)}")
    return GgufFiles(opened[0], files)


def is_gguf(name: str | Path) -> bool:
    """Whether a file is one of GGUF by its name, in capitals too."""
    return Path(name).suffix.lower() == ".gguf"


def models_in(folder: Path) -> list[Path]:
    """The GGUF models of a folder, of split ones the first part."""
    return [folder / name for name in first_parts([file.name for file in folder.iterdir()])]


def first_parts(names: Iterable[str]) -> list[str]:
    """Those of some files that are GGUF models, of split ones the first part; vision halves (mmproj) are none."""
    models = sorted(name for name in names if is_gguf(name) and not Path(name).name.lower().startswith("mmproj"))
    parts = {name: match for name in models if (match := _PART.fullmatch(name))}
    return [name for name in models if name not in parts or int(parts[name]["number"]) == 1]


def pattern_of_parts(name: str) -> str:
    """A glob for a file and, if it is a part, all the others."""
    match = _PART.fullmatch(name)
    return f"{glob.escape(match['stem'])}-*-of-{match['count']}.gguf" if match else glob.escape(name)


def _part_paths(path: Path, match: re.Match[str]) -> list[Path]:
    count = int(match["count"])
    names = [f"{match['stem']}-{i:05}-of-{count:05}.gguf" for i in range(1, count + 1)]
    missing = [name for name in names if not (path.parent / name).exists()]
    if path.name not in names or missing:
        listed = ", ".join(missing[:5]) + (" …" if len(missing) > 5 else "")
        raise CheckpointError(
            f"{path}: is one of {count} parts, of which {listed or path.name} {'is' if len(missing) < 2 else 'are'} "
            "missing; download the missing files into the same folder"
        )
    return [inside(path.parent, name) for name in names]
