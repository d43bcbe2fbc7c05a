"""The tokenizer, chat template and sampling defaults between GGUF's metadata and the files of a checkpoint folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from stepjax.errors import ConfigError, TokenizerError

TEMPLATE_KEY = "tokenizer.chat_template"
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_TOKEN_NAMES = {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token", "unknown": "unk_token"}
_SAMPLING = {"temp": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p"}

# DeepSeek V3's splits, which the release's tokenizer.json has and llama.cpp knows as this name.
_DEEPSEEK = "deepseek-v3"
_DEEPSEEK_SPLITS = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"""
    r"""\s*[\r\n]+|\s+(?!\S)|\s+""",
)
# Splits of other byte-level tokenizers, of which a file may be made for tests.
_GPT2 = ("gpt-2", "gpt2", "default")


def _byte_level(*, use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _splits() -> dict[str, Any]:
    splits = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in _DEEPSEEK_SPLITS
    ]
    return {"type": "Sequence", "pretokenizers": [*splits, _byte_level(use_regex=False)]}


def tokenizer_files(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """``tokenizer.json`` and ``tokenizer_config.json`` of a file, parsed; None: it has no tokenizer.

    Raises:
      TokenizerError: the tokenizer is of another kind, or its lists contradict each other.
    """
    kind = values.get("tokenizer.ggml.model")
    if kind in (None, "no_vocab", "none"):
        return None
    if kind != "gpt2":
        raise TokenizerError(f"tokenizer.ggml.model: is {kind!r}, expected 'gpt2' (byte-level BPE)")
    tokens = _strings(values, "tokenizer.ggml.tokens")
    merges = _strings(values, "tokenizer.ggml.merges", default=[])
    types = values.get("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
    if not isinstance(types, list) or len(types) != len(tokens):
        count = len(types) if isinstance(types, list) else 1
        raise TokenizerError(f"tokenizer.ggml.token_type: has {count} entries, but there are {len(tokens)} tokens")
    vocab: dict[str, int] = {}
    added = []
    for token, (text, token_type) in enumerate(zip(tokens, types, strict=True)):
        if token_type == _UNUSED:
            continue
        if text in vocab:
            raise TokenizerError(f"tokenizer.ggml.tokens: {text[:120]!r} is token {vocab[text]} and token {token}")
        vocab[text] = token
        if token_type in (_CONTROL, _USER_DEFINED):
            added.append(_added(token, text, special=token_type == _CONTROL))
    for i, merge in enumerate(merges):
        left, _, right = merge.partition(" ")
        if not {left, right, left + right} <= vocab.keys():
            raise TokenizerError(f"tokenizer.ggml.merges: entry {i} is {merge[:120]!r}, which are no tokens")
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": _pre_tokenizer(values.get("tokenizer.ggml.pre"), merges),
        "post_processor": None,
        "decoder": _byte_level(use_regex=True),
        "model": {"type": "BPE", "vocab": vocab, "merges": merges, "byte_fallback": False, "fuse_unk": False},
    }
    return spec, _tokenizer_config(values, tokens)


def generation_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling defaults of a file, as ``generation_config.json`` spells them."""
    found = {ours: values.get(f"general.sampling.{theirs}") for theirs, ours in _SAMPLING.items()}
    for (theirs, _), value in zip(_SAMPLING.items(), found.values(), strict=True):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or value != value):
            raise ConfigError(f"general.sampling.{theirs}: is {value!r}, expected a number")
    return {name: value for name, value in found.items() if value is not None}


def to_vocabulary(
    spec: Mapping[str, Any], config: Mapping[str, Any], *, vocab_size: int, template: str | None
) -> dict[str, Any]:
    """The metadata of a tokenizer; the inverse of `tokenizer_files`.

    Args:
      spec: ``tokenizer.json``, parsed.
      config: ``tokenizer_config.json``, parsed.
      vocab_size: rows of the embedding; ids without a token become unused ones.

    Raises:
      TokenizerError: GGUF has no name for how this tokenizer splits text.
    """
    model = spec.get("model") or {}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges") or []]
    texts: list[str] = [f"[PAD{token}]" for token in range(vocab_size)]
    types = np.full(vocab_size, _UNUSED, np.int32)
    for text, token in (model.get("vocab") or {}).items():
        texts[token], types[token] = text, _NORMAL
    for token in spec.get("added_tokens") or []:
        texts[token["id"]] = token["content"]
        types[token["id"]] = _CONTROL if token.get("special") else _USER_DEFINED
    values: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _pre_name(spec.get("pre_tokenizer"), merges),
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.add_bos_token": np.bool_(bool(config.get("add_bos_token", False))),
    }
    ids = {text: token for token, text in enumerate(texts)}
    for theirs, ours in _TOKEN_NAMES.items():
        name = config.get(ours)
        name = name.get("content") if isinstance(name, Mapping) else name
        if name in ids:
            values[f"tokenizer.ggml.{theirs}_token_id"] = np.uint32(ids[name])
    return values | ({TEMPLATE_KEY: template} if template is not None else {})


def _strings(values: Mapping[str, Any], key: str, *, default: list[str] | None = None) -> list[str]:
    found = values.get(key, default)
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise TokenizerError(f"{key}: is missing or no list of strings; the file has half a tokenizer")
    return found


def _added(token: int, text: str, *, special: bool) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": token, "content": text, **flags, "special": special}


def _tokenizer_config(values: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    config: dict[str, Any] = {}
    for theirs, ours in _TOKEN_NAMES.items():
        key = f"tokenizer.ggml.{theirs}_token_id"
        token = values.get(key)
        if token is None:
            continue
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < len(tokens):
            raise TokenizerError(f"{key}: is {token!r}, expected an id below {len(tokens)}")
        config[ours] = tokens[token]
    template = values.get(TEMPLATE_KEY)
    if template is not None and not isinstance(template, str):
        raise TokenizerError(f"{TEMPLATE_KEY}: is a {type(template).__name__}, expected text")
    return config | ({"chat_template": template} if template else {})


def _pre_tokenizer(name: Any, merges: list[str]) -> dict[str, Any]:
    if name == _DEEPSEEK:
        return _splits()
    if name in (None, *_GPT2):
        return _byte_level(use_regex=bool(merges))  # without merges every byte is a token, however text is split
    raise TokenizerError(f"tokenizer.ggml.pre: is {name!r}, expected {_DEEPSEEK!r}, as Step 3.5 has it")


def _pre_name(pre_tokenizer: Any, merges: list[str]) -> str:
    if pre_tokenizer == _splits():
        return _DEEPSEEK
    if not merges or pre_tokenizer == _byte_level(use_regex=True):
        return _GPT2[0]
    raise TokenizerError(
        "tokenizer.json: pre_tokenizer: splits text in a way that llama.cpp has no name for; expected DeepSeek V3's"
    )
