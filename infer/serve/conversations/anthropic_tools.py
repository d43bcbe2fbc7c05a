"""Anthropic's tools as functions: a client's own, and the typed ones that a client runs itself.

The schemas of typed tools follow Anthropic's documentation of `bash_20250124`, `text_editor_20241022` to
`text_editor_20250728` and `memory_20250818`; their dates in the name of the type are ignored. Tools that Anthropic's
servers run, and those that need pictures, are left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from stepjax.errors import RequestError
from stepjax.infer.serve.conversations.client_form import ClientForm, ClientTool
from stepjax.infer.serve.conversations.parts import object_at

_DATED = re.compile(r"(?P<family>[a-z_]+?)_(?P<date>\d{8})")


def _text(description: str, **fields: Any) -> dict[str, Any]:
    return {"type": "string", "description": description, **fields}


def _schema(properties: Mapping[str, Any], *required: str) -> dict[str, Any]:
    return {"type": "object", "properties": dict(properties), "required": list(required)}


_PATH = _text("Path of the file or folder.")
_LINE = {"type": "integer", "description": "Line after which insert puts the text; 0 is the beginning."}
_RANGE = {"type": "array", "items": {"type": "integer"}, "description": "First and last line that view shows."}
_CHANGES = {"old_str": _text("Text that str_replace looks for."), "new_str": _text("Text that replaces it.")}


def _editor(date: str) -> tuple[str, dict[str, Any]]:
    commands = ["view", "create", "str_replace", "insert"] + (["undo_edit"] if date < "20250429" else [])
    inserted = {"insert_text": _text("Text that insert puts in.")} if date >= "20250728" else {}
    properties = {
        "command": {"type": "string", "enum": commands},
        "path": _PATH,
        "file_text": _text("Content of the file for create."),
        **_CHANGES,
        "insert_line": _LINE,
        **inserted,
        "view_range": _RANGE,
    }
    return "View, create and edit text files.", _schema(properties, "command", "path")


def _bash(date: str) -> tuple[str, dict[str, Any]]:
    properties = {
        "command": _text("The command to run."),
        "restart": {"type": "boolean", "description": "true restarts the shell instead."},
    }
    return "Run a command in a bash shell that persists between calls.", _schema(properties)


def _memory(date: str) -> tuple[str, dict[str, Any]]:
    properties = {
        "command": {"type": "string", "enum": ["view", "create", "str_replace", "insert", "delete", "rename"]},
        "path": _text("Path of the file or folder, which begins with /memories."),
        "file_text": _text("Content of the file for create."),
        **_CHANGES,
        "insert_line": _LINE,
        "insert_text": _text("Text that insert puts in."),
        "old_path": _text("Present path for rename."),
        "new_path": _text("New path for rename."),
        "view_range": _RANGE,
    }
    return "View and edit files under /memories, which persist between conversations.", _schema(properties, "command")


_TYPED = {"bash": _bash, "text_editor": _editor, "memory": _memory}


def read_anthropic_tools(tools: Sequence[Any] | None, client: ClientForm) -> list[dict[str, Any]]:
    """A request's tools as functions of a chat; what cannot be offered is left out.

    Raises:
      RequestError: a tool of the client's own is broken.
    """
    functions: list[dict[str, Any]] = []
    for index, tool in enumerate(tools or ()):
        where = f"tools[{index}]"
        kind = object_at(tool, where).get("type") or "custom"
        if not isinstance(kind, str):
            raise RequestError(f"{where}.type: expected a type, found {ascii(kind)[:80]}")
        function = _own(tool, where) if kind == "custom" else _typed(tool, kind)
        if function is None:
            client.leave_out(where, kind)
            continue
        position = len(functions)
        client.tools[function["name"]] = ClientTool(function["name"])
        client.paths[f"tools[{position}].function.parameters"] = f"{where}.input_schema"
        client.paths[f"tools[{position}].function"] = where
        client.paths[f"tools[{position}]"] = where
        functions.append({"type": "function", "function": function})
    return functions


def _own(tool: Mapping[str, Any], where: str) -> dict[str, Any]:
    schema, name = tool.get("input_schema"), tool.get("name")
    if not isinstance(name, str) or not name:
        raise RequestError(f"{where}.name: expected a name, found {ascii(name)[:80]}")
    if not isinstance(schema, dict):
        raise RequestError(f"{where}.input_schema: expected an object, found a {type(schema).__name__}")
    function = {"name": name, "parameters": schema}
    if tool.get("description") is not None:
        function["description"] = tool["description"]
    return function


def _typed(tool: Mapping[str, Any], kind: str) -> dict[str, Any] | None:
    """A tool that Anthropic defines and the client runs; None for all others."""
    match = _DATED.fullmatch(kind)
    if match is None or match["family"] not in _TYPED:
        return None
    description, schema = _TYPED[match["family"]](match["date"])
    default = {"bash": "bash", "memory": "memory"}.get(match["family"], "str_replace_based_edit_tool")
    name = tool.get("name")
    return {
        "name": name if isinstance(name, str) and name else default,
        "parameters": schema,
        "description": description,
    }
