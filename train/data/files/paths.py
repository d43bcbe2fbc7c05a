"""The files that a path means: a file, a folder, or a pattern."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Literal

from stepjax.errors import ConfigError

FileKind = Literal["lines", "json", "parquet", "array_record"]
ENDINGS: dict[str, FileKind] = {
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".json": "json",
    ".parquet": "parquet",
    ".array_record": "array_record",
}
PACKED = ".gz"


def data_files(path: str) -> list[Path]:
    """The files of a path, sorted by name.

    A folder stands for the files in it and below whose endings are known. Hidden files are left out, as are those of
    other endings. A pattern such as ``data/*.jsonl`` or ``data/**/*.parquet`` stands for the files that match.

    Raises:
      ConfigError: nothing is there, or nothing in the folder has a known ending.
    """
    root = Path(path).expanduser()
    if root.is_dir():
        inside = [file for file in sorted(root.rglob("*")) if file.is_file() and not _is_hidden(file, root)]
        files = [file for file in inside if kind_of(file)]
        if not files:
            raise ConfigError(
                f"{path}: no file in the folder has a known ending; expected {endings()}, found {len(inside)} others"
            )
        return files
    if root.exists():
        return [root]
    matches = sorted(Path(name) for name in glob.glob(str(root), recursive=True) if Path(name).is_file())
    if not matches:
        raise ConfigError(f"{path}: does not exist; expected a file, a folder, or a pattern such as data/*.jsonl")
    return matches


def kind_of(file: Path) -> FileKind | None:
    """What the file's ending says that it holds."""
    name = file.name.lower().removesuffix(PACKED)
    kind: FileKind | None = next((kind for ending, kind in ENDINGS.items() if name.endswith(ending)), None)
    packed = file.name.lower().endswith(PACKED)
    return None if packed and kind in ("parquet", "array_record") else kind


def endings() -> str:
    """The known endings, for people."""
    return f"{', '.join(ENDINGS)} (the first three also with {PACKED})"


def _is_hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)
