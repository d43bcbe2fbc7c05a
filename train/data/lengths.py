"""How long rows are in tokens, what of them is cut or left out for a length, and an example of what is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stepjax.train.config.tune import DataSettings
from stepjax.train.data.encoder import TextModel
from stepjax.train.data.files.records import Records, RowFault, read_row_at
from stepjax.train.data.prompts import Prompt, read_prompt
from stepjax.train.data.survey import RowReader


@dataclass
class Lengths:
    """Of the rows that were looked at, in tokens. A row may train several sequences."""

    num_rows: int = 0  # in the files
    looked_at: int = 0
    prompts: list[int] = field(default_factory=list)  # of each row, before a new answer
    sequences: list[int] = field(default_factory=list)  # of each sequence, the whole of it
    trained: list[int] = field(default_factory=list)  # tokens of each sequence that have a loss
    cut: list[str] = field(default_factory=list)  # places of rows that lose their end
    left_out: list[str] = field(default_factory=list)  # places of rows of which nothing can be trained
    faults: list[RowFault] = field(default_factory=list)  # rows that the model's template refuses
    example: list[list[tuple[str, bool]]] = field(default_factory=list)  # of the first row, as `marked`

    def table(self) -> dict[str, dict[str, float]]:
        """Least, median, greatest and total number of tokens, by what is counted."""
        counted = {"prompt": self.prompts, "sequence": self.sequences, "trained": self.trained}
        return {name: _summary(values) for name, values in counted.items() if values}


def look(
    settings: DataSettings,
    records: Records,
    numbers: np.ndarray,
    model: TextModel,
    *,
    length: int,
    writes: bool = False,
    most: int = 1000,
) -> Lengths:
    """Render some of the rows, evenly spread, as training does.

    Args:
      numbers: the rows that may be looked at, each of which is good.
      length: tokens of a row of a batch; 0: without a limit.
      writes: a model writes the answers, so that a prompt needs room for one token.
      most: rows that are looked at.
    """
    reader, lengths = RowReader(settings), Lengths(len(numbers))
    chosen = np.unique(np.linspace(0, len(numbers) - 1, min(most, len(numbers))).round().astype(int))
    for place in chosen:
        number = int(numbers[place])
        where = records.where(number)
        try:
            row = read_row_at(records, number)
            prompt = read_prompt("data", number, row, model, where=where, reader=reader)
        except RowFault as fault:
            lengths.faults.append(fault)
            continue
        lengths.looked_at += 1
        lengths.prompts.append(len(prompt.ids))
        lengths.sequences += [len(sequence.prompt) + len(sequence.ids) for sequence in prompt.trained]
        lengths.trained += [sum(sequence.mask) for sequence in prompt.trained]
        lengths.example = lengths.example or marked(model, prompt)
        if length:
            _fit(lengths, prompt, length, writes=writes)
    return lengths


def marked(model: TextModel, prompt: Prompt) -> list[list[tuple[str, bool]]]:
    """The text of each sequence of a row in parts, and whether each part is trained. The prompt, if nothing is."""
    sequences = []
    for sequence in prompt.trained:
        parts = [(model.tokenizer.decode(sequence.prompt, skip_special=False), False)]
        begin = 0
        for end in range(1, len(sequence.ids) + 1):
            if end == len(sequence.ids) or sequence.mask[end] != sequence.mask[begin]:
                text = model.tokenizer.decode(sequence.ids[begin:end], skip_special=False)
                parts.append((text, sequence.mask[begin]))
                begin = end
        sequences.append(parts)
    return sequences or [[(model.tokenizer.decode(prompt.ids, skip_special=False), False)]]


def _fit(lengths: Lengths, prompt: Prompt, length: int, *, writes: bool) -> None:
    """Note whether a row has room in a row of a batch, by the rule of `stepjax.train.teachers.scoring.cut_to_rows`."""
    if writes or not prompt.trained:
        if len(prompt.ids) >= length:
            lengths.left_out.append(prompt.where)
        return
    rooms = [(length - len(sequence.prompt), sequence) for sequence in prompt.trained]
    if not any(any(sequence.mask[: max(room, 0)]) for room, sequence in rooms):
        lengths.left_out.append(prompt.where)
    elif any(room < len(sequence.ids) for room, sequence in rooms):
        lengths.cut.append(prompt.where)


def _summary(values: Sequence[int]) -> dict[str, Any]:
    return {
        "min": int(np.min(values)),
        "median": float(np.median(values)),
        "max": int(np.max(values)),
        "total": int(np.sum(values)),
    }
