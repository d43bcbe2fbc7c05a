"""Signs that answers have gone wrong which no reward shows: loops, and scripts that nobody asked for."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

BLOCK = 16  # longest block of tokens whose repetition is looked for
TIMES = 4  # that it must follow itself


def repeats(ids: Sequence[int]) -> bool:
    """Whether some block of up to `BLOCK` tokens follows itself `TIMES` times; single tokens need twice as many."""
    for size in range(1, BLOCK + 1):
        times = TIMES if size > 1 else 2 * TIMES
        run = 0
        for at in range(size, len(ids)):
            run = run + 1 if ids[at] == ids[at - size] else 0
            if run >= size * (times - 1):
                return True
    return False


def scripts(text: str) -> frozenset[str]:
    """The scripts of a text's letters, as LATIN, CYRILLIC, CJK."""
    found = set()
    for letter in set(text):
        if letter.isalpha():
            name = unicodedata.name(letter, "")
            if name:
                found.add(name.split()[0])
    return frozenset(found)


def mixes_languages(answer: str, prompt: str) -> bool:
    """Whether an answer has letters of a script that its prompt has not; Latin ones are free, as code uses them."""
    return bool(scripts(answer) - scripts(prompt) - {"LATIN"})
