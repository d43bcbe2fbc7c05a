"""Whether two tokenizers mean the same by every id: log-probabilities of one model are nothing to another otherwise."""

from __future__ import annotations

from stepjax.errors import TokenizerError
from stepjax.text.tokenizer import Tokenizer

_LISTED = 3  # differences that a message spells out


def check_same_ids(ours: Tokenizer, theirs: Tokenizer, *, who: str) -> None:
    """TokenizerError unless both have the same entries, one by one, and the same control tokens."""
    problems = []
    if len(ours) != len(theirs):
        problems.append(f"{len(theirs)} entries, expected {len(ours)}")
    for token in range(min(len(ours), len(theirs))):
        mine, other = ours.token_bytes([token]), theirs.token_bytes([token])
        if mine != other:
            problems.append(f"entry {token} is {other!r}, expected {mine!r}")
            if len(problems) > _LISTED:
                break
    for text in sorted(ours.controls.keys() | theirs.controls.keys()):
        mine, other = ours.controls.get(text), theirs.controls.get(text)
        if mine != other:
            problems.append(f"control token {text!r} has id {other}, expected {mine}")
    if problems:
        raise TokenizerError(
            f"{who}: its tokenizer is not the student's: {'; '.join(problems[:_LISTED])}. A teacher scores the "
            "student's token ids, so both need the same tokenizer; choose a teacher of the same family"
        )
