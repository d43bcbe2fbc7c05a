"""Checks that two tokenizers have the same ids. Without that, a teacher's scores are of other tokens."""

from __future__ import annotations

from stepjax.errors import TokenizerError
from stepjax.text.tokenizer import Tokenizer

_LISTED = 3  # differences that a message names


def check_same_ids(ours: Tokenizer, theirs: Tokenizer, *, who: str) -> None:
    """TokenizerError unless both have the same entries, one by one, and the same control tokens."""
    problems = []
    if len(ours) != len(theirs):
        problems.append(f"{len(theirs)} entries, expected {len(ours)}")
    for token in range(min(len(ours), len(theirs))):
        expected, actual = ours.token_bytes([token]), theirs.token_bytes([token])
        if actual != expected:
            problems.append(f"entry {token} is {actual!r}, expected {expected!r}")
            if len(problems) > _LISTED:
                break
    for text in sorted(ours.controls.keys() | theirs.controls.keys()):
        expected, actual = ours.controls.get(text), theirs.controls.get(text)
        if actual != expected:
            problems.append(f"control token {text!r} has id {actual}, expected {expected}")
    if problems:
        raise TokenizerError(
            f"{who}: its tokenizer is not the student's: {'; '.join(problems[:_LISTED])}. A teacher scores the "
            "student's token ids, so both need the same tokenizer. Use a teacher of the same model family"
        )
