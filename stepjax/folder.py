"""Everything in a checkpoint folder but the weights: opened and checked in a moment, before jax is even imported."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepjax.chat import ChatTemplate
from stepjax.checkpoint import Checkpoint
from stepjax.errors import CheckpointError
from stepjax.hub import resolve
from stepjax.tokenizer import Tokenizer


@dataclass(frozen=True)
class ModelFolder:
    """A checked checkpoint. Tokenizer and template may be missing: token ids then still work."""

    path: Path
    checkpoint: Checkpoint
    tokenizer: Tokenizer | None
    template: ChatTemplate | None
    generation_config: dict[str, Any]


def open_folder(name_or_path: str | Path) -> ModelFolder:
    """Resolve a name (folder, hub id, embedded name) and check all that is found there.

    Raises:
      CheckpointError, ConfigError, TokenizerError, TemplateError: with the file, what was found and what was expected.
    """
    path = resolve(name_or_path)
    checkpoint = Checkpoint(path)
    tokenizer = Tokenizer.from_folder(path) if (path / "tokenizer.json").exists() else None
    if tokenizer and len(tokenizer) > checkpoint.config.vocab_size:
        raise CheckpointError(
            f"{path / 'tokenizer.json'}: has {len(tokenizer)} entries, more than config.json's vocab_size = "
            f"{checkpoint.config.vocab_size}; the two files belong to different models"
        )
    template = ChatTemplate.from_folder(path) if tokenizer else None
    return ModelFolder(path, checkpoint, tokenizer, template, _generation_config(path))


def _generation_config(folder: Path) -> dict[str, Any]:
    file = folder / "generation_config.json"
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not readable as JSON ({error}); delete it or copy it again") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{file}: holds a JSON {type(found).__name__}, expected an object")
    return found
