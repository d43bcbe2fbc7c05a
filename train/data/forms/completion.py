"""A prompt and its completion, as raw text or as messages; and raw text alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stepjax.train.data.forms.content import RowContent, RowForm
from stepjax.train.data.forms.conversation import check_conversation, checked_messages, checked_tools

COMPLETION = RowForm("prompt", ("prompt", "completion", "tools", "answer"), "prompt and completion, text or messages")
TEXT = RowForm("text", ("text",), "raw text, all of which is trained")


def read_completion_row(row: Mapping[str, Any]) -> RowContent:
    """A prompt, and possibly what follows it. ValueError: it is not acceptable."""
    prompt, completion = row["prompt"], row.get("completion")
    if isinstance(row.get("label"), bool):
        raise ValueError(
            "label is true or false beside prompt and completion, which is a form of preferences; keep the rows with "
            "label true, or rename the column if it means something else"
        )
    if isinstance(prompt, list):
        return _conversation(prompt, completion, row)
    if not isinstance(prompt, str):
        raise ValueError(f"prompt is {prompt!r:.60}, expected text or a list of messages")
    if completion is not None and not isinstance(completion, str):
        raise ValueError(f"completion is {completion!r:.60}, expected text, as prompt is text")
    for name, text in (("prompt", prompt), ("completion", completion)):
        if text is not None and not text.strip():
            raise ValueError(f"{name}: is empty, expected text")
    return RowContent(prompt=prompt, completion=completion)


def _conversation(prompt: list[Any], completion: Any, row: Mapping[str, Any]) -> RowContent:
    """The turns of ``completion`` are marked as trained, those of ``prompt`` as not."""
    messages, _ = checked_messages(prompt, "prompt")
    tools = checked_tools(row.get("tools"))
    if completion is None:
        check_conversation(messages, tools, "prompt")
        return RowContent(messages, tools, [0 if m["role"] == "assistant" else None for m in messages])
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    answer, _ = checked_messages(completion, "completion")
    if answer[0]["role"] != "assistant" or answer[-1]["role"] != "assistant":
        raise ValueError("completion: expected to begin and end with the assistant's message")
    whole = [*messages, *answer]
    check_conversation(whole, tools, "prompt and completion")
    weights = [None if m["role"] != "assistant" else int(index >= len(messages)) for index, m in enumerate(whole)]
    return RowContent(whole, tools, weights)


def read_text_row(row: Mapping[str, Any]) -> RowContent:
    """Raw text. ValueError: it is not text, or empty."""
    if not isinstance(row["text"], str) or not row["text"].strip():
        raise ValueError(f"text is {row['text']!r:.60}, expected text that is not empty")
    return RowContent(completion=row["text"])
