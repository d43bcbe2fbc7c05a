"""Small byte-level BPE tokenizers laid out like the model's: a base vocabulary, and added tokens behind it."""

import functools
import json
from typing import Any

from tokenizers import Regex, Tokenizer as Backend, decoders, models, pre_tokenizers, trainers

from stepjax.text.tokenizer import CONTROL_NAMES, THINK_CLOSE, THINK_OPEN, TOOL_CLOSE, TOOL_OPEN, Tokenizer

# Ids 0 to 2, in the model's own vocabulary.
BASE_SPECIALS = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"]
ADDED_SPECIALS = ["<｜place▁holder▁no▁0｜>", "<|im_start|>", "<|im_end|>", "<｜User｜>"]
MARKERS = [THINK_OPEN, THINK_CLOSE, TOOL_OPEN, TOOL_CLOSE]
ORDINARY_ADDED = ["<tool_response>", "ordinary added"]  # added, but text: neither special nor named

CORPUS = [
    "The capital of France is Paris. What is the capital of Germany? Think about it, then call a tool.",
    "def main(): return [x for x in range(10) if x < 5] # im_start im_end think tool_call begin of sentence",
    "système naïf déjà vu — 你好，世界 こんにちは 😀 👩‍👩‍👧 é",
    "<div><span>text</span></div> |im_end| <|x|> </think tool_call> <tool_response>",
]


@functools.cache
def spec_text(markers_special: bool) -> str:
    backend = Backend(models.BPE())
    split = pre_tokenizers.Split(Regex(r"\p{N}{1,3}|[ ]?\p{L}+|[ ]?[^\s\p{L}\p{N}]+|\s+"), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=BASE_SPECIALS,
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS * 3, trainer)
    spec = json.loads(backend.to_str())
    # Ordinary ones come between controls, so that removing controls renumbers them.
    for name in [*ADDED_SPECIALS[:2], *ORDINARY_ADDED, *ADDED_SPECIALS[2:], *MARKERS]:
        special = name in ADDED_SPECIALS or (name in MARKERS and markers_special)
        token = len(spec["model"]["vocab"]) + len(spec["added_tokens"]) - len(BASE_SPECIALS)
        spec["added_tokens"].append(added_token(token, name, special))
    return json.dumps(spec, ensure_ascii=False)


def added_token(token: int, name: str, special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token, "content": name, **flags, "special": special}


def make_spec(*, markers_special: bool = False) -> dict[str, Any]:
    """A fresh copy of the parsed tokenizer.json, for tests to damage."""
    return json.loads(spec_text(markers_special))


@functools.cache
def make_tokenizer(*, markers_special: bool = False) -> Tokenizer:
    return Tokenizer(make_spec(markers_special=markers_special), origin="fixture")


ALL_CONTROLS = sorted({*BASE_SPECIALS, *ADDED_SPECIALS, *MARKERS, *CONTROL_NAMES})
