"""Builds step-tiny's tokenizer: special tokens, 256 bytes, and whole pieces of the template and of common phrases.

The pieces are added tokens, matched longest first. A variable of a task (a number, a word, a city) must always be
spelled in single bytes, or copying and reversing could not be learnt. So no piece holds a digit, and none can begin or
end inside a word: it starts with a capital or a mark and ends with a mark. Exceptions are the names of the roles and
identifiers such as ``get_weather``. After a change of the tasks the choice gives other ids, and the model must be
trained again.

    python -m stepjax.train.data.tiny_tokenizer
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from stepjax.train.data import tasks, tools as toolbox

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
SPECIALS = (BOS, EOS, PAD, "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>")
KEPT = SPECIALS[5:]  # decoding keeps these when it skips special tokens, since the parsers need them
MAX_ENTRIES = 510  # the model's vocabulary is 512; the rows above the last entry are padding
TRACES = (" carry ", " borrow ", " digits\n", 'Copy "', "I need to call ", "The tool answered.")
SLOT = "§"
SCHEMA_TEXTS = (  # what `tojson` writes around the names and descriptions of a tool
    '\n{"type": "function", "function": {"name": "',
    '", "description": "',
    '", "parameters": {"type": "object", "properties": {"',
    '": {"type": "string"}, "',
    '": {"type": "integer"}, "',
    '": {"type": "string"}}, "required": ["',
    '": {"type": "integer"}}, "required": ["',
    '": {"type": "string", "description": "',
    '": {"type": "integer", "description": "',
    '"}}, "required": ["',
    '"}, "',
    '", "',
    '"]}}}',
)


def candidates(template: tasks.Template) -> list[str]:
    """Every literal fragment that the tasks and the template can produce and that is safe as a piece, sorted."""
    phrases = [*itertools.chain(*tasks.PHRASES.values()), *itertools.chain(*toolbox.WILD_QUESTIONS.values())]
    phrases += [text for tool in toolbox.TOOLS for text in (*tool.questions, *_with_skies(tool), *tool.descriptions)]
    phrases += [toolbox.WILD_REPLY, *tasks.SYSTEMS, *toolbox.PARAMETER_NOTES]
    sentences = [s for _, trace, answer in tasks.GREETINGS for s in (trace, *_sentences(answer))]
    sentences += [text for text, _, _ in tasks.GREETINGS]
    sentences += [s for text in (tasks.UNKNOWN_TRACE, tasks.UNKNOWN) for s in _sentences(text)]
    fragments = [part for text in phrases for part in re.split(r"\{\w+\}", text)] + sentences
    fragments += [part for tool in toolbox.TOOLS for part in _result_fragments(tool.result)]
    fragments += [
        *_result_fragments({"result": "word"}),
        *_result_fragments({"result": "count"}),
        *TRACES,
        *SCHEMA_TEXTS,
    ]
    safe = {_trim(fragment) for fragment in fragments} | {tool.name for tool in toolbox.TOOLS}
    return sorted({piece for piece in safe if len(piece) > 1} | set(_template_fragments(template)))


def _sentences(text: str) -> list[str]:
    return re.split(r"(?<=[.!?] )", text)


def _with_skies(tool: toolbox.Tool) -> list[str]:
    return [tool.reply.replace("{sky}", sky) for sky in (toolbox.SKIES if "{sky}" in tool.reply else ("",))]


def _result_fragments(result: dict[str, str]) -> list[str]:
    """The JSON of a tool's result, split at its values."""
    fragments: list[str] = []
    for sky in toolbox.SKIES if "sky" in result.values() else ("",):
        shown: dict[str, object] = {}
        for key, kind in result.items():
            numeric = kind in (*toolbox.INTEGER_KINDS, "temperature")
            shown[key] = 0 if numeric else True if kind == "yes" else sky if kind == "sky" else SLOT
        fragments += re.split(rf"{SLOT}|0", json.dumps(shown, ensure_ascii=False))
    return fragments


def _trim(fragment: str) -> str:
    """The longest part of a fragment that neither begins nor ends inside a word."""
    fragment = re.sub(r"[A-Za-z0-9]+\Z", "", fragment)
    return re.sub(r"^[a-z]+(?=\W)", "", fragment)


def _template_fragments(template: tasks.Template) -> list[str]:
    """The template's own text between special tokens, names and contents."""
    call = {"function": {"name": SLOT, "arguments": {SLOT: SLOT, SLOT * 2: SLOT}}}
    messages: list[tasks.ChatMessage] = [
        {"role": "system", "content": SLOT},
        {"role": "user", "content": SLOT},
        {"role": "assistant", "reasoning_content": SLOT, "content": SLOT, "tool_calls": [call]},
        {"role": "tool", "content": SLOT},
        {"role": "tool", "content": SLOT},
    ]
    schemas: list[Any] = [SLOT]
    texts = [template.render(turns, tools=schemas, add_generation_prompt=True) for turns in (messages, messages[1:])]
    cuts = "|".join(map(re.escape, (*SPECIALS, f'\n"{SLOT}"', SLOT)))
    return [part for text in texts for part in re.split(cuts, text) if len(part) > 1]


def choose(pieces: Sequence[str], texts: Iterable[str], *, room: int) -> list[str]:
    """The ``room`` pieces that save the most tokens on the texts, without unused ones. Ties are broken by name."""
    tokenizer = build(pieces)
    saved: Counter[str] = Counter()
    for text in texts:
        for piece in tokenizer.encode(text, add_special_tokens=False).tokens:
            saved[piece] += len(piece.encode()) - 1
    used = [piece for piece in pieces if saved[piece] > 0]
    return sorted(sorted(used, key=lambda piece: (-saved[piece], piece))[:room])


def byte_alphabet() -> list[str]:
    """The printable character for each byte, as byte-level tokenizers write it."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {byte: chr(byte) for byte in plain}
    hidden = [byte for byte in range(256) if byte not in table]
    return [table.get(byte) or chr(256 + hidden.index(byte)) for byte in range(256)]


def build(pieces: Sequence[str]) -> Tokenizer:
    """Ids: the special tokens, the 256 bytes in order, then the pieces in order."""
    vocab = {entry: index for index, entry in enumerate((*SPECIALS, *byte_alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(entry, normalized=False, special=entry not in KEPT) for entry in SPECIALS])
    tokenizer.add_tokens([AddedToken(piece, normalized=False, special=False) for piece in pieces])
    return tokenizer


def corpus(count: int, template: tasks.Template) -> list[str]:
    """Rendered training items, the same ones at every call."""
    rng = np.random.default_rng(0)
    return ["".join(tasks.render(tasks.draw(rng, "train"), template)) for _ in range(count)]


def write(folder: Path = tasks.ASSETS) -> Tokenizer:
    """Write ``tokenizer.json``, ``tokenizer_config.json`` and ``generation_config.json``."""
    template = tasks.TinyTemplate(folder / "chat_template.jinja")
    room = MAX_ENTRIES - len(SPECIALS) - 256
    tokenizer = build(choose(candidates(template), corpus(20_000, template), room=room))
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": "<|im_end|>",
        "pad_token": PAD,
        "model_max_length": 32768,
        "clean_up_tokenization_spaces": False,
    }
    ids = [tokenizer.token_to_id(entry) for entry in (EOS, PAD, "<|im_end|>")]
    generation = {"bos_token_id": tokenizer.token_to_id(BOS), "eos_token_id": ids, "pad_token_id": ids[1]}
    for name, content in (("tokenizer_config.json", config), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", "utf-8")
    return tokenizer


if __name__ == "__main__":
    print(f"{write().get_vocab_size()} entries")
