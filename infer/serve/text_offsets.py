"""Where each token of a text begins, in characters."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from stepjax.text.tokenizer import Tokenizer


class TextOffsets:
    """Counts the characters before each token of a text that arrives in pieces.

    A character may be spelled by several tokens: all of them begin where it begins. Bytes that are no UTF-8 count as
    the U+FFFD that the text shows for them.
    """

    def __init__(self, tokenizer: Tokenizer | None, *, skip_special: bool = True):
        """Without a tokenizer there is no text, and every offset is 0."""
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._num_characters = 0  # that are certain
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Sequence[int]) -> list[int]:
        """The offset of each token."""
        return [self._push(token) for token in ids]

    def flush(self) -> None:
        """The text ends here, and another follows: an unfinished character is a U+FFFD."""
        self._num_characters += len(self._decoder.decode(b"", final=True))
        self._decoder.reset()

    def _push(self, token: int) -> int:
        if self._tokenizer is None:
            return 0
        data = self._tokenizer.token_bytes([token], skip_special=self._skip_special)
        begun = bool(self._decoder.getstate()[0])
        first = self._decoder.decode(data[:1])
        offset = self._num_characters
        if begun and first:  # the byte completes the character, or shows that it is none: then its own comes after
            completed = len(first) == 1 and not self._decoder.getstate()[0]
            offset += not completed
        self._num_characters += len(first) + len(self._decoder.decode(data[1:]))
        return offset
