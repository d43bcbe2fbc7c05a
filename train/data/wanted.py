"""What a run wants of every row beyond a form: an answer to learn from, or one to compare with."""

from __future__ import annotations

from typing import Literal

from stepjax.train.data.files.records import Records, RowFault
from stepjax.train.data.survey import Survey

Wanted = Literal["prompt", "completion", "answer"]  # any row; one with a turn to learn from; one that can be graded

WANTED_BY: dict[str, Wanted] = {"sft": "completion", "distill": "prompt", "rl": "answer"}  # by command, as a rule
_REASONS = {
    "completion": "has no completion to learn from, expected the assistant's turn at the end (or train_on for an "
    "earlier one)",
    "answer": "has nothing to compare an answer with, expected the column answer, or the assistant's turn at the end",
}


def unwanted(survey: Survey, records: Records, wanted: Wanted) -> list[RowFault]:
    """The good rows that lack what a run wants."""
    if wanted == "prompt":
        return []
    has = survey.has_answer if wanted == "completion" else survey.has_target
    return [RowFault(records.where(int(number)), _REASONS[wanted]) for number in survey.numbers[~has]]


def mostly(survey: Survey) -> Wanted:
    """What the rows seem to be for: those with completions are there to be learned from, if they are at least half."""
    return "completion" if 2 * int(survey.has_answer.sum()) >= len(survey) else "prompt"
