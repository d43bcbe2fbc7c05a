"""OpenAI's form: ``messages``, and ``tools`` beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stepjax.train.data.forms.content import RowContent, RowForm
from stepjax.train.data.forms.conversation import check_conversation, checked_messages, checked_tools

MESSAGES = RowForm("messages", ("messages", "tools", "answer"), "messages in OpenAI's form")


def read_messages_row(row: Mapping[str, Any]) -> RowContent:
    """The conversation of a row. ValueError: it is not acceptable."""
    messages, weights = checked_messages(row["messages"])
    tools = checked_tools(row.get("tools"))
    check_conversation(messages, tools)
    return RowContent(messages, tools, weights)
