"""Checks for faults of an answer that no reward shows: repetition, and letters of a script that nobody asked for."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

BLOCK = 16  # longest repeated block that is looked for, in tokens
TIMES = 4  # occurrences in a row that count as repetition


def repeats(ids: Sequence[int]) -> bool:
    """Whether a block of up to `BLOCK` tokens occurs `TIMES` times in a row; a single token twice as often."""
    for size in range(1, BLOCK + 1):
        times = TIMES if size > 1 else 2 * TIMES
        run = 0
        for position in range(size, len(ids)):
            run = run + 1 if ids[position] == ids[position - size] else 0
            if run >= size * (times - 1):
                return True
    return False


def scripts(text: str) -> frozenset[str]:
    """The scripts of a text's letters, such as LATIN, CYRILLIC and CJK."""
    names = set()
    for letter in set(text):
        if letter.isalpha():
            name = unicodedata.name(letter, "")
            if name:
                names.add(name.split()[0])
    return frozenset(names)


def mixes_languages(answer: str, prompt: str) -> bool:
    """Whether an answer has letters of a script that its prompt does not have. Latin is allowed, since code uses it."""
    return bool(scripts(answer) - scripts(prompt) - {"LATIN"})
