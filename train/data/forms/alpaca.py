"""Alpaca's form: ``instruction``, ``input`` and ``output``, with ``system`` and ``history`` beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stepjax.train.data.forms.content import RowContent, RowForm

ALPACA = RowForm(
    "instruction",
    ("instruction", "input", "output", "system", "history", "answer"),
    "Alpaca's instruction, input and output",
)


def read_alpaca_row(row: Mapping[str, Any]) -> RowContent:
    """One question with its answer, after those of ``history``. ValueError: it is not acceptable.

    The input follows the instruction after an empty line, as in the user's message of a chat; the frame of text that
    the first Alpaca model was trained with is not used.
    """
    instruction, given, output = row["instruction"], row.get("input"), row.get("output")
    for name in ("instruction", "input", "output", "system"):
        if not isinstance(row.get(name), str | None):
            raise ValueError(f"{name} is {row[name]!r:.60}, expected text")
    for name, text in (("instruction", instruction), ("output", output)):
        if text is not None and not text.strip():
            raise ValueError(f"{name}: is empty, expected text")
    messages: list[dict[str, Any]] = []
    if (row.get("system") or "").strip():
        messages.append({"role": "system", "content": row["system"]})
    for number, pair in enumerate(_history(row.get("history"))):
        for role, text in zip(("user", "assistant"), pair, strict=True):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"history[{number}]: is {pair!r:.60}, expected a question and its answer, both text")
            messages.append({"role": role, "content": text})
    question = f"{instruction}\n\n{given}" if given and given.strip() else instruction
    messages.append({"role": "user", "content": question})
    if output is not None:
        messages.append({"role": "assistant", "content": output})
    return RowContent(messages, weights=[None] * len(messages))


def _history(history: Any) -> list[list[Any]]:
    if history is None:
        return []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise ValueError(f"history is {history!r:.60}, expected a list of pairs")
    return history
