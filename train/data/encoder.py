"""A checkpoint's tokenizer and chat template without its weights, for looking at data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stepjax.checkpoint.folder import open_folder
from stepjax.config import ModelConfig
from stepjax.errors import ConfigError
from stepjax.text.chat import ChatTemplate, encode_chat
from stepjax.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class TextModel:
    """What turns rows into tokens, as a session does."""

    name: str
    config: ModelConfig
    tokenizer: Tokenizer
    template: ChatTemplate | None

    @classmethod
    def open(cls, name: str) -> TextModel:
        """Raises what `open_folder` raises, and ConfigError: the checkpoint has no tokenizer."""
        folder = open_folder(name)
        if folder.tokenizer is None:
            raise ConfigError(f"{name}: has no tokenizer.json, which rows of text need")
        return cls(name, folder.checkpoint.config, folder.tokenizer, folder.template)

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        """Ids of raw text."""
        return self.tokenizer.encode(text, bos=bos)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """Ids of a conversation. ConfigError: the checkpoint has no chat template."""
        if self.template is None:
            raise ConfigError(f"{self.name}: has no chat template; give rows of raw text (prompt and completion)")
        return encode_chat(self.tokenizer, self.template, messages, **options)
