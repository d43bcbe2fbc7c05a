"""The table of forms, and reading a row in whichever form it has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from stepjax.train.data.forms.alpaca import ALPACA, read_alpaca_row
from stepjax.train.data.forms.completion import COMPLETION, TEXT, read_completion_row, read_text_row
from stepjax.train.data.forms.content import RowContent, RowForm
from stepjax.train.data.forms.messages import MESSAGES, read_messages_row
from stepjax.train.data.forms.sharegpt import SHAREGPT, read_sharegpt_row

_PREFERENCE = (
    "has chosen and rejected: no objective here learns from preferences. To train on the chosen answers, give them as "
    "completion: columns = {prompt = 'prompt', completion = 'chosen'}"
)
FORMS: dict[str, tuple[RowForm, Callable[[Mapping[str, Any]], RowContent]]] = {
    "messages": (MESSAGES, read_messages_row),
    "completion": (COMPLETION, read_completion_row),
    "text": (TEXT, read_text_row),
    "sharegpt": (SHAREGPT, read_sharegpt_row),
    "alpaca": (ALPACA, read_alpaca_row),
}
NEEDED = {form.needed: name for name, (form, _) in FORMS.items()}  # the column that tells a form → its name
COLUMNS = sorted({column for form, _ in FORMS.values() for column in form.columns})


def form_of(row: Mapping[str, Any]) -> str:
    """The name of the form whose columns a row has. ValueError: it has those of none, or of several."""
    if row.get("chosen") is not None and row.get("rejected") is not None:
        raise ValueError(_PREFERENCE)
    names = [name for column, name in NEEDED.items() if row.get(column) is not None]
    if len(names) == 1:
        return names[0]
    keys = ", ".join(map(ascii, sorted(map(str, row)))) or "no columns"
    if names:
        raise ValueError(
            f"has {keys}, which fit several forms ({', '.join(names)}); choose one with form, or name columns with "
            "columns"
        )
    raise ValueError(
        f"has {keys}; expected messages (and tools), prompt (and completion), text, conversations, or instruction (and "
        "input, output), and optionally answer. Other names: columns = {prompt = 'question'}"
    )


def read_content(row: Mapping[str, Any], form: str = "auto") -> tuple[str, RowContent]:
    """The form and the content of a row whose columns are named as in `FORMS`.

    Args:
      form: a name of `FORMS`; "auto": as the row's columns say.

    Raises:
      ValueError: the row is not acceptable; the text says why.
    """
    if form == "auto":
        form = form_of(row)
    about, read = FORMS[form]
    if row.get(about.needed) is None:
        raise ValueError(f"has no {about.needed}, which form {form!r} needs")
    content = read(row)
    return form, content if row.get("answer") is None else _with_answer(content, row["answer"])


def renamed(row: Mapping[str, Any], columns: Mapping[str, str]) -> Mapping[str, Any]:
    """The row with our names of columns beside its own.

    Args:
      columns: our name → the row's; a dot leads into a nested column, as ``reward_model.ground_truth``.

    Raises:
      ValueError: the row has no such column.
    """
    if not columns:
        return row
    return {**row, **{ours: _column(row, theirs) for ours, theirs in columns.items()}}


def _column(row: Mapping[str, Any], name: str) -> Any:
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise ValueError(f"has no column {name!r}; it has {', '.join(map(ascii, sorted(map(str, row))))}")
        value = value[part]
    return value


def _with_answer(content: RowContent, answer: Any) -> RowContent:
    if isinstance(answer, bool) or not isinstance(answer, str | int):
        raise ValueError(f"answer is {answer!r:.60}, expected text, as exact match compares it")
    return RowContent(content.messages, content.tools, content.weights, content.prompt, content.completion, str(answer))
