"""The checkpoint's tokenizer: text to ids and back, with control tokens that text alone can never produce.

A *control token* steers the model and is no text: every added token marked special in the files, and the entries of
`CONTROL_NAMES` whatever their mark (DeepSeek-family files leave `<think>` unmarked). Plain text is encoded by a second
instance from which the control tokens were removed, so that no spelling of one inside a prompt, a tool result or a
file becomes its id. Control ids come only from `Segment`s that say so.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from stepjax.errors import RequestError, TokenizerError

BOS = "<｜begin▁of▁sentence｜>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"
TOOL_OPEN = "<tool_call>"
TOOL_CLOSE = "</tool_call>"

# The entries that the chat format cannot do without, in the order of `SpecialIds`.
CONTROL_NAMES = (BOS, IM_START, IM_END, THINK_OPEN, THINK_CLOSE, TOOL_OPEN, TOOL_CLOSE)
# Markers that the reasoning and tool parsers read from decoded text: `skip_special` must not drop them.
_TEXT_MARKERS = (THINK_OPEN, THINK_CLOSE, TOOL_OPEN, TOOL_CLOSE)


@dataclass(frozen=True)
class SpecialIds:
    """Ids of the entries in `CONTROL_NAMES`, looked up by name: positions differ between checkpoints."""

    bos: int
    im_start: int
    im_end: int
    think_open: int
    think_close: int
    tool_open: int
    tool_close: int


class Segment(NamedTuple):
    """A stretch of a rendered prompt: ordinary text, or (is_control) exactly one control token's spelling."""

    text: str
    is_control: bool


class Tokenizer:
    """Byte-level BPE over `tokenizer.json`. Reads only; safe to share between threads.

    Example:
      >>> import stepjax
      >>> tokenizer = stepjax.load("step-tiny").tokenizer
      >>> tokenizer.decode(tokenizer.encode("What is 467 + 358?"))
      'What is 467 + 358?'
    """

    def __init__(self, spec: Mapping[str, Any], *, config: Mapping[str, Any] | None = None, origin: str = "tokenizer"):
        """spec is the parsed tokenizer.json, config the parsed tokenizer_config.json; origin names them in errors.

        Raises TokenizerError if the file does not load, is not byte-level, or lacks an entry of `CONTROL_NAMES`.
        """
        self._origin = origin
        self.config: Mapping[str, Any] = config or {}
        # A file may carry truncation, padding or a bos-adding post-processor; prompts must come out as they went in.
        spec = {**spec, "truncation": None, "padding": None, "post_processor": None}
        if not _is_byte_level(spec.get("decoder")):
            raise TokenizerError(
                f"{origin}: expected a ByteLevel decoder, found {_describe(spec.get('decoder'))}. Step 3.5 uses "
                "DeepSeek's byte-level BPE: take tokenizer.json from the same repository as the weights."
            )
        full = _load(spec, origin)
        vocab = full.get_vocab(with_added_tokens=True)
        self._ids = vocab
        self.special = SpecialIds(*(self.id_of(name) for name in CONTROL_NAMES))
        flags = _added_tokens(spec, self.config)
        spellings = {text for text, token in flags.items() if token.get("special")} & vocab.keys() | set(CONTROL_NAMES)
        # Spelling to id of every control token.
        self.controls: Mapping[str, int] = {text: vocab[text] for text in sorted(spellings)}
        self._strip_before = {vocab[text] for text in spellings if flags.get(text, {}).get("lstrip")}
        self._strip_after = {vocab[text] for text in spellings if flags.get(text, {}).get("rstrip")}
        self._skipped = frozenset(self.controls.values()) - {vocab[marker] for marker in _TEXT_MARKERS}
        self._bytes = _bytes_of_tokens(vocab)
        self._plain = _load(_without(spec, spellings), origin)
        # Added tokens that stayed may be numbered anew once their neighbours are gone.
        plain_vocab = self._plain.get_vocab(with_added_tokens=True)
        self._renumber = {new: vocab[text] for text, new in plain_vocab.items() if vocab.get(text, new) != new}

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """Reads `tokenizer.json` and, where there is one, `tokenizer_config.json`. Raises TokenizerError."""
        folder = Path(path)
        spec = _read_json(folder / "tokenizer.json", "copy it from the repository that holds the weights")
        config_file = folder / "tokenizer_config.json"
        config = _read_json(config_file, "delete it, or copy it again") if config_file.exists() else None
        return cls(spec, config=config, origin=str(folder / "tokenizer.json"))

    def __len__(self) -> int:
        """The highest id plus one, which is the number of entries when none is missing.

        The embedding is padded beyond it (128896 rows for 128815 entries): mask ids >= len when sampling.
        """
        return len(self._bytes)

    @property
    def vocab_size(self) -> int:
        """Same as `len(self)`: entries, without the embedding's padding."""
        return len(self)

    def id_of(self, name: str) -> int:
        """The id of the entry spelled exactly so. Raises TokenizerError naming it if there is none."""
        if name not in self._ids:
            raise TokenizerError(
                f"{self._origin}: the vocabulary has no entry {name!r}, which the chat format needs. "
                "Take tokenizer.json from the same repository as the weights."
            )
        return self._ids[name]

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        """Ids of plain text. A control token's spelling inside it is text like any other.

        Raises RequestError if the text holds a lone surrogate, which has no UTF-8 form.
        """
        ids = [self.special.bos] if bos else []
        ids.extend(self._encode_plain(text))
        return ids

    def encode_rendered(self, segments: Iterable[Segment]) -> list[int]:
        """Ids of a rendered prompt; adds nothing (the template itself writes bos).

        Neighbouring text segments are joined first, since BPE may merge across their border.
        """
        ids: list[int] = []
        pending = ""
        for text, is_control in segments:
            if not is_control:
                pending += text
                continue
            control = self.controls[text]
            if control in self._strip_before:
                pending = pending.rstrip()
            ids.extend(self._after_control(ids, pending))
            ids.append(control)
            pending = ""
        ids.extend(self._after_control(ids, pending))
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of ids; bytes that are not UTF-8 become U+FFFD.

        skip_special leaves out the control tokens, except the thinking and tool-call markers, which the parsers of the
        output look for in the text. Raises RequestError for an id outside the vocabulary.
        """
        return self.token_bytes(ids, skip_special=skip_special).decode("utf-8", errors="replace")

    def token_bytes(self, ids: Sequence[int], *, skip_special: bool = False) -> bytes:
        """The exact bytes that ids stand for, which may begin or end inside a character. Raises RequestError."""
        table, skipped = self._bytes, self._skipped if skip_special else frozenset()
        for position, token in enumerate(ids):
            if not 0 <= token < len(table):
                raise RequestError(f"token id {token} at position {position}: expected 0 to {len(table) - 1}")
        return b"".join(table[token] for token in ids if token not in skipped)

    def _encode_plain(self, text: str) -> list[int]:
        try:
            ids = self._plain.encode(text, add_special_tokens=False).ids
        except (UnicodeEncodeError, TypeError) as error:
            raise RequestError(f"text cannot be encoded: expected valid Unicode, found {error}") from None
        if self._renumber:
            return [self._renumber.get(token, token) for token in ids]
        return ids

    def _after_control(self, ids: list[int], text: str) -> list[int]:
        if ids and ids[-1] in self._strip_after:
            text = text.lstrip()
        return self._encode_plain(text) if text else []


class IncrementalDetokenizer:
    """Turns ids that arrive a few at a time into text, never half a character.

    Holds back at most the three bytes of an unfinished UTF-8 sequence, in constant time per token. The pieces joined
    equal `Tokenizer.decode` of all the ids, invalid bytes included.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True):
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Sequence[int]) -> str:
        """The text that is now certain, possibly empty."""
        return self._decoder.decode(self._tokenizer.token_bytes(ids, skip_special=self._skip_special))

    def flush(self) -> str:
        """End the stream: an unfinished character becomes U+FFFD. The object can then start another stream."""
        tail = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return tail


def _read_json(file: Path, remedy: str) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise TokenizerError(f"{file}: cannot be read ({error.strerror}); {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{file}: damaged, expected JSON, found {error}; {remedy}") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{file}: damaged, expected a JSON object, found {type(value).__name__}; {remedy}")
    return value


def _load(spec: Mapping[str, Any], origin: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(spec, ensure_ascii=False))
    except Exception as error:  # the Rust side raises bare Exception for every fault
        raise TokenizerError(
            f"{origin}: damaged, tokenizers {tokenizers.__version__} says: {error}. "
            "Copy the file again from the repository that holds the weights."
        ) from error


def _describe(decoder: Any) -> str:
    return repr(decoder.get("type")) if isinstance(decoder, dict) else repr(decoder)


def _is_byte_level(decoder: Any) -> bool:
    if not isinstance(decoder, dict):
        return False
    inner = decoder.get("decoders") if decoder.get("type") == "Sequence" else [decoder]
    return isinstance(inner, list) and [d.get("type") for d in inner if isinstance(d, dict)] == ["ByteLevel"]


def _added_tokens(spec: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Added tokens by spelling; special if either file says so."""
    tokens = {token["content"]: dict(token) for token in spec.get("added_tokens") or []}
    decoder = config.get("added_tokens_decoder")
    for token in decoder.values() if isinstance(decoder, dict) else ():
        if isinstance(token, dict) and token.get("special") and token.get("content") in tokens:
            tokens[token["content"]]["special"] = True
    return tokens


def _without(spec: Mapping[str, Any], spellings: set[str]) -> dict[str, Any]:
    """The same tokenizer without these entries: as added tokens, and as words or merges of the model."""
    model = dict(spec["model"])
    # Renamed rather than removed, since the library numbers added tokens by the vocabulary's size. NUL stands for no
    # byte in byte-level BPE, so that no text leads here.
    model["vocab"] = {"\0" * (text in spellings) + text: token for text, token in model["vocab"].items()}
    merges = [(merge, merge.split(" ", 1) if isinstance(merge, str) else merge) for merge in model.get("merges") or []]
    model["merges"] = [merge for merge, (left, right) in merges if spellings.isdisjoint((left, right, left + right))]
    added = [token for token in spec.get("added_tokens") or [] if token["content"] not in spellings]
    return {**spec, "model": model, "added_tokens": added}


def _byte_of_char() -> dict[str, int]:
    """GPT-2's printable characters for bytes: visible Latin-1 stands for itself, the rest begins at U+0100."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(hidden)}


def _bytes_of_tokens(vocab: Mapping[str, int]) -> list[bytes]:
    """Bytes by id, empty for ids without an entry. An entry with a character that stands for no byte is literal."""
    byte_of = _byte_of_char()
    table = [b""] * (max(vocab.values()) + 1)
    for text, token in vocab.items():
        try:
            table[token] = bytes(map(byte_of.__getitem__, text))
        except KeyError:
            table[token] = text.encode("utf-8")
    return table
