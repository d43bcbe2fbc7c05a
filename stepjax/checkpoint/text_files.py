"""What a model has beside its weights, whether it lies in a folder or in a GGUF file's metadata."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from stepjax.checkpoint.folder import ModelFolder
from stepjax.checkpoint.gguf.parts import open_files
from stepjax.checkpoint.gguf.vocabulary import TEMPLATE_KEY, generation_config, to_vocabulary, tokenizer_files
from stepjax.checkpoint.weight_files import inside, json_bytes, read_json
from stepjax.config import ModelConfig


@dataclass(frozen=True)
class TextFiles:
    """Parsed files of a tokenizer; ``template`` is None where there is no chat template."""

    tokenizer: dict[str, Any]
    tokenizer_config: dict[str, Any]
    template: str | None
    generation: dict[str, Any]

    def metadata(self, vocab_size: int) -> dict[str, Any]:
        """As a GGUF file has them.

        Raises:
          TokenizerError: GGUF has no name for how this tokenizer splits text.
        """
        return to_vocabulary(self.tokenizer, self.tokenizer_config, vocab_size=vocab_size, template=self.template)

    def contents(self, config: ModelConfig) -> dict[str, bytes]:
        """As a folder has them, by name of the file."""
        generation = {"bos_token_id": config.bos_id, "eos_token_id": list(config.eos_ids), **self.generation}
        files = {
            "tokenizer.json": json_bytes(self.tokenizer),
            "tokenizer_config.json": json_bytes(self.tokenizer_config),
            "generation_config.json": json_bytes(generation),
        }
        return files | ({"chat_template.jinja": self.template.encode()} if self.template is not None else {})


def text_files(model: ModelFolder) -> TextFiles | None:
    """Those of an opened model; None: it has no tokenizer."""
    if not model.path.is_dir():
        values = open_files(model.path).metadata
        found = tokenizer_files(values)
        if found is None:
            return None
        spec, config = found
        config.pop("chat_template", None)
        return TextFiles(spec, config, values.get(TEMPLATE_KEY), generation_config(values))
    if model.tokenizer is None:
        return None
    config = dict(model.tokenizer.config)
    listed = config.pop("chat_template", None)
    template = model.template.source if model.template is not None else None
    if listed is not None and template is None:
        config["chat_template"] = listed
    spec = read_json(inside(model.path, "tokenizer.json"))
    return TextFiles(spec, config, template, dict(model.generation_config))
