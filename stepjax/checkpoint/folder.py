"""Everything in a checkpoint but the weights: opened and checked in a moment, before jax is even imported."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepjax.checkpoint.gguf.model import GgufCheckpoint
from stepjax.checkpoint.gguf.vocabulary import TEMPLATE_KEY, generation_config, tokenizer_files
from stepjax.checkpoint.graft import Grafted
from stepjax.checkpoint.hub import resolve
from stepjax.checkpoint.reader import Checkpoint
from stepjax.checkpoint.safetensors_file import regular_size
from stepjax.checkpoint.source import WeightSource
from stepjax.checkpoint.weight_files import inside
from stepjax.errors import CheckpointError, ConfigError, TokenizerError
from stepjax.text.chat import ChatTemplate
from stepjax.text.tokenizer import Tokenizer

# Files beside the weights that may be missing. One that exists must not block, fill the memory or be outside.
_COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
_MAX_BYTES = 2**26  # the release's tokenizer.json has 8 MB


@dataclass(frozen=True)
class ModelFolder:
    """A checked checkpoint. Tokenizer and template may be missing: token ids then still work."""

    path: Path  # a folder, or a GGUF file
    checkpoint: WeightSource
    tokenizer: Tokenizer | None
    template: ChatTemplate | None
    generation_config: dict[str, Any]


def open_folder(name_or_path: str | Path, *, mtp_from: str | Path | None = None) -> ModelFolder:
    """Resolve a name (folder, GGUF file, hub id, embedded name) and check all that is found there.

    Args:
      mtp_from: name of the checkpoint whose MTP layers are taken (`stepjax.checkpoint.graft`).

    Raises:
      CheckpointError, ConfigError, TokenizerError, TemplateError: with the file, what was found and what was expected.
    """
    folder = _open(resolve(name_or_path))
    if mtp_from is None:
        return folder
    return dataclasses.replace(folder, checkpoint=Grafted(folder.checkpoint, open_weights(mtp_from, drafts=True)))


def _open(path: Path) -> ModelFolder:
    if not path.is_dir():
        return _open_gguf(path)
    checkpoint = Checkpoint(path)
    for name in _COMPANIONS:
        _check_companion(path, name)
    tokenizer = Tokenizer.from_folder(path) if (path / "tokenizer.json").exists() else None
    if tokenizer and len(tokenizer) > checkpoint.config.vocab_size:
        raise CheckpointError(
            f"{path / 'tokenizer.json'}: has {len(tokenizer)} entries, more than config.json's vocab_size = "
            f"{checkpoint.config.vocab_size}; the two files belong to different models"
        )
    template = ChatTemplate.from_folder(path) if tokenizer and _has_template(path, tokenizer) else None
    return ModelFolder(path, checkpoint, tokenizer, template, _generation_config(path))


def open_weights(name_or_path: str | Path, *, drafts: bool = False) -> WeightSource:
    """The weights of a model alone.

    Args:
      drafts: take a GGUF file that holds MTP layers only.

    Raises:
      CheckpointError, ConfigError: as `open_folder`.
    """
    path = resolve(name_or_path)
    return Checkpoint(path) if path.is_dir() else GgufCheckpoint(path, drafts=drafts)


def _open_gguf(path: Path) -> ModelFolder:
    """A GGUF file has its tokenizer and template among its metadata."""
    checkpoint = GgufCheckpoint(path)
    values, file = checkpoint.files.metadata, checkpoint.files.first.path
    try:
        found = tokenizer_files(values)
        settings = generation_config(values)
    except (TokenizerError, ConfigError) as error:
        raise type(error)(f"{file}: {error}") from None
    if found is None:
        return ModelFolder(path, checkpoint, None, None, settings)
    spec, config = found
    tokenizer = Tokenizer(spec, config=config, origin=str(file))
    if len(tokenizer) > checkpoint.config.vocab_size:
        raise CheckpointError(
            f"{file}: tokenizer.ggml.tokens has {len(tokenizer)} entries, more than the {checkpoint.config.vocab_size} "
            "rows of token_embd.weight"
        )
    template = ChatTemplate.from_config(config, origin=f"{file}: {TEMPLATE_KEY}") if TEMPLATE_KEY in values else None
    return ModelFolder(path, checkpoint, tokenizer, template, settings)


def _check_companion(folder: Path, name: str) -> None:
    file = inside(folder, name)
    if (file.exists() or file.is_symlink()) and regular_size(file) > _MAX_BYTES:
        raise CheckpointError(f"{file}: is larger than {_MAX_BYTES} bytes; download it again")


def _has_template(folder: Path, tokenizer: Tokenizer) -> bool:
    return (folder / "chat_template.jinja").exists() or tokenizer.config.get("chat_template") is not None


def _generation_config(folder: Path) -> dict[str, Any]:
    file = folder / "generation_config.json"
    if not file.exists():
        return {}
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not readable as JSON ({error}); delete it or copy it again") from None
    if not isinstance(settings, dict):
        raise CheckpointError(f"{file}: holds a JSON {type(settings).__name__}, expected an object")
    for name in ("temperature", "top_p", "top_k", "min_p"):
        value = settings.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float | None) or value != value:
            raise CheckpointError(f"{file}: {name} is {value!r}, expected a number; correct it")
    return settings
