"""From a model's name to a folder or a GGUF file on this machine."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from stepjax.checkpoint.gguf.parts import first_parts, is_gguf, models_in, pattern_of_parts
from stepjax.checkpoint.reader import read_config
from stepjax.config import ASSETS
from stepjax.errors import CheckpointError

EMBEDDED = ("step-tiny", "step-tiny-student", "step-3.5-flash")
RELEASE = "stepfun-ai/Step-3.5-Flash"  # where the weights of the embedded step-3.5-flash are

# Nothing that could run: no Python files, no pickles.
_SMALL_FILES = ("*.json", "*.jinja", "*.txt")
_WEIGHTS = ("*.safetensors",)
_HUB_ID = re.compile(
    r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?P<file>(?:/\w[\w. -]*)*/\w[\w. -]*\.gguf)?(?:@(?P<revision>[\w./-]+))?", re.ASCII
)
_FORMS = (
    "give a checkpoint folder, a .gguf file, an embedded name (step-tiny, step-tiny-student), or a hub id as org/name, "
    "org/name@revision or org/name/FILE.gguf"
)


def resolve(name_or_path: str | Path, *, weights: bool = True) -> Path:
    """Where a model is: an existing folder or GGUF file, an embedded name, or a hub id, which is downloaded if need be.

    A folder with nothing but GGUF files, as a download of one is, stands for the one model in it.

    Args:
      weights: False is content with the small files, ``config.json`` among them, and downloads no more.

    Raises:
      CheckpointError: there is no such model, or it could not be downloaded.
      ConfigError: the hub's model is not one that this package runs; seen before its weights are downloaded.
    """
    path, name = Path(name_or_path).expanduser(), str(name_or_path)
    is_folder, exists = _look_at(path) if name else (False, False)
    if is_folder:
        return _gguf_in(path) or path
    if exists and is_gguf(path):
        return path
    if exists:
        raise CheckpointError(
            f"{path}: is a file, expected a checkpoint folder or a .gguf file; name the folder that holds it"
        )
    if name in EMBEDDED:
        return _embedded(name, weights=weights)
    match = _HUB_ID.fullmatch(name) if isinstance(name_or_path, str) else None
    if not match or (is_gguf(name) and not match["file"]):
        raise CheckpointError(f"{name[:200]!r}: is neither a folder nor a name of a model; {_FORMS}")
    if match["file"]:
        return _download_file(match["repo"], match["revision"], match["file"].removeprefix("/"))
    return _download(match["repo"], match["revision"], weights=weights)


def _gguf_in(folder: Path) -> Path | None:
    """The GGUF model of a folder without safetensors."""
    if any(folder.glob("*.safetensors")):
        return None
    models = models_in(folder)
    if len(models) > 1:
        listed = ", ".join(model.name for model in models[:5]) + (" …" if len(models) > 5 else "")
        raise CheckpointError(f"{folder}: holds {len(models)} GGUF models, {listed}; name one of these files")
    return models[0] if models else None


def _look_at(path: Path) -> tuple[bool, bool]:
    """Whether it is a folder, and whether it is anything; text that cannot be a path is nothing."""
    try:
        return path.is_dir(), path.exists()
    except OSError:
        return False, False


def _embedded(name: str, *, weights: bool) -> Path:
    folder = ASSETS / name
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{name}: is not part of this installation; install the package again")
    if weights and not any(folder.glob("*.safetensors")):
        where = f"; its weights are {RELEASE} on the hub" if name == "step-3.5-flash" else ""
        raise CheckpointError(f"{name}: is embedded as a configuration only, without weights{where}")
    return folder


def _download(repo: str, revision: str | None, *, weights: bool) -> Path:
    """A snapshot in the hub's cache. The configuration comes first, so that another model costs no download."""
    folder = _snapshot(repo, revision, _SMALL_FILES)
    if not (folder / "config.json").exists() and (models := _gguf_of(repo, revision)):
        listed = ", ".join(models[:5]) + (" …" if len(models) > 5 else "")
        raise CheckpointError(
            f"{repo}: has no config.json, but {len(models)} GGUF files of models: {listed}; name one of them, as "
            f"{repo}/{models[0]}"
        )
    if not weights:
        return folder
    read_config(folder)
    return _snapshot(repo, folder.name, _SMALL_FILES + _WEIGHTS)  # the commit just checked, whatever moved since


def _download_file(repo: str, revision: str | None, name: str) -> Path:
    """A GGUF file of a repository, with the other parts of a split one."""
    folder = _snapshot(repo, revision, (pattern_of_parts(name),))
    if not (folder / name).exists():
        models = _gguf_of(repo, revision)
        listed = f"; it has {', '.join(models[:5])}{' …' if len(models) > 5 else ''}" if models else ""
        raise CheckpointError(f"{repo}: has no file {name}{listed}")
    return folder / name


def _gguf_of(repo: str, revision: str | None) -> list[str]:
    """The GGUF models of a repository, of split ones the first part."""
    from huggingface_hub import list_repo_files

    try:
        return first_parts(list_repo_files(repo, revision=revision))
    except Exception:  # as of a snapshot; here only the message would have been better
        return []


def _snapshot(repo: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download

    bar: dict[str, Any] = {} if sys.stderr.isatty() else {"tqdm_class": _silent_bar()}
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns), **bar))
    except Exception as error:  # the client, its transport and its storage raise dozens of types
        reason = str(error).strip().splitlines()
        raise CheckpointError(
            f"{repo}{f'@{revision}' if revision else ''}: could not be had from the hub ({type(error).__name__}: "
            f"{reason[0] if reason else 'no reason given'}), and there is no folder of this name; check the name, the "
            "connection, HF_HUB_OFFLINE and (for private models) HF_TOKEN, or download it elsewhere and give the folder"
        ) from error


def _silent_bar() -> type:
    from huggingface_hub.utils import tqdm

    class Silent(tqdm):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **{**kwargs, "disable": True})

    return Silent
