"""The tools that a client offers, as the functions that the template shows, and what its choice among them means.

An offer that cannot be taken up is left out, and a header says so: most clients offer the same tools whatever the
server is. An order to call such a tool is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stepjax.errors import RequestError
from stepjax.infer.serve.conversations.client_form import CUSTOM_INPUT, ClientForm, ClientTool, flat_name
from stepjax.infer.serve.conversations.parts import kind_of, object_at, string
from stepjax.infer.serve.limits import LIMITS

SEARCH = "tool_search"
_NAMES = "expected auto, none, required, or a function by its name"
_MODES = ("auto", "none", "required", "any")
_GRAMMAR = "format"  # beside a custom tool's function: the grammar that its input should follow


def read_functions(
    tools: Any, client: ClientForm, *, where: str = "tools", start: int = 0, nested: bool = False
) -> list[dict[str, Any]]:
    """OpenAI's tools, of a chat or of a response, as functions of a chat; the client's form keeps what they were.

    Args:
      start: how many functions the request has already.
      nested: whether a tool's fields lie one level deeper, as in a chat. Some clients send those of a response, or
        Anthropic's, to a chat too.

    Raises:
      RequestError: a tool that can be offered is broken.
    """
    functions: list[dict[str, Any]] = []
    for index, tool in enumerate(tools or ()):
        place = f"{where}[{index}]"
        kind = object_at(tool, place).get("type", "function")
        if not isinstance(kind, str):
            raise RequestError(f"{place}.type: expected a type, found {ascii(kind)[:80]}")
        if kind in ("function", "custom") and "input_schema" in tool:
            tool, kind = _with_parameters(tool), "function"
            client.paths[f"tools[{start + len(functions)}].function.parameters"] = f"{place}.input_schema"
        if kind == "namespace":
            functions += _namespace(tool, client, place, start + len(functions))
        elif kind in ("function", "custom"):
            if nested and not isinstance(tool.get("name"), str):
                object_at(tool.get(kind), f"{place}.{kind}")
            functions.append(_function(tool, client, place, start + len(functions), None))
        elif kind == SEARCH and tool.get("execution") == "client" and isinstance(tool.get("parameters"), Mapping):
            functions.append(_search(tool, client, place, start + len(functions)))
        else:
            client.leave_out(place, kind)
    num_functions, most = start + len(functions), LIMITS["tools"].high
    if num_functions > most:
        raise RequestError(f"{where}: hold {num_functions} functions in all, expected at most {most:.0f}")
    return functions


def _with_parameters(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A tool that is said as Anthropic does, as OpenAI says it."""
    fields = {name: value for name, value in tool.items() if name != "input_schema"}
    return {**fields, "type": "function", "parameters": tool["input_schema"]}


def _search(tool: Mapping[str, Any], client: ClientForm, where: str, position: int) -> dict[str, Any]:
    """The client's own search for tools as a function; what it finds is offered with the next request."""
    client.tools[SEARCH] = ClientTool(SEARCH, searches=True)
    client.paths |= {f"tools[{position}]": where, f"tools[{position}].function": where}
    description = tool.get("description")
    function = {"name": SEARCH, **({"description": description} if isinstance(description, str) else {})}
    return {"type": "function", "function": function | {"parameters": dict(tool["parameters"])}}


def names_of(tools: Sequence[Any]) -> list[str]:
    """The names under which the model knows these tools, where they have names."""
    names: list[str] = []
    for tool in tools:
        if isinstance(tool, Mapping) and isinstance(name := tool.get("name"), str):
            inner = tool.get("tools") if tool.get("type") == "namespace" else None
            names += [flat_name(each, name) for each in names_of(inner)] if isinstance(inner, list) else [name]
    return names


def _namespace(tool: Mapping[str, Any], client: ClientForm, where: str, start: int) -> list[dict[str, Any]]:
    """The functions of a namespace; the first says what the namespace is for."""
    name, inner = string(tool, "name", where), tool.get("tools")
    if not name:
        raise RequestError(f"{where}.name: expected a name, found an empty text")
    if not isinstance(inner, list):
        raise RequestError(f"{where}.tools: expected a list, found a {type(inner).__name__}")
    functions: list[dict[str, Any]] = []
    for index, entry in enumerate(inner):
        place = f"{where}.tools[{index}]"
        kind = object_at(entry, place).get("type", "function")
        if kind not in ("function", "custom"):
            client.leave_out(place, kind)
            continue
        function = _function(entry, client, place, start + len(functions), name)
        if not functions and isinstance(tool.get("description"), str) and tool["description"]:
            text = function["function"].get("description")
            function["function"]["description"] = f"{tool['description']}\n\n{text}" if text else tool["description"]
        functions.append(function)
    return functions


def _function(
    tool: Mapping[str, Any], client: ClientForm, where: str, position: int, namespace: str | None
) -> dict[str, Any]:
    """A function, or a custom tool as one."""
    kind = tool.get("type", "function")
    inner = tool.get(kind)  # a chat's tools have their fields one level deeper
    deeper = isinstance(inner, Mapping)
    fields, place = (inner, f"{where}.{kind}") if deeper else (tool, where)
    assert isinstance(fields, Mapping)
    name = string(fields, "name", place)
    if not name:
        raise RequestError(f"{place}.name: expected a name, found an empty text")
    shown = flat_name(name, namespace)
    while namespace is not None and shown in client.tools:
        shown += "_"
    client.tools[shown] = ClientTool(name, namespace, custom=kind == "custom")
    client.paths[f"tools[{position}].function"] = place
    client.paths[f"tools[{position}]"] = where
    if kind == "custom":
        return {"type": "function", "function": _of_custom(fields, shown, place)}
    kept = {key: fields[key] for key in ("description", "parameters", "strict") if fields.get(key) is not None}
    return {"type": "function", "function": {"name": shown, **kept}}


def _of_custom(fields: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    """A custom tool as a function of one text."""
    description = fields.get("description")
    if description is not None and not isinstance(description, str):
        raise RequestError(f"{where}.description: expected a text, found a {type(description).__name__}")
    parameter = {"type": "string", "description": "The whole input, as plain text."}
    syntax, definition = grammar_of_input(fields, where)
    if syntax == "regex":
        parameter |= {"pattern": f"^({definition})$"}
    elif syntax:
        parameter["description"] += f" It follows this {syntax} grammar:\n{definition}"
    schema = {"type": "object", "properties": {CUSTOM_INPUT: parameter}, "required": [CUSTOM_INPUT]}
    return {"name": name, **({"description": description} if description else {}), "parameters": schema}


def grammar_of_input(fields: Mapping[str, Any], where: str) -> tuple[str, str]:
    """Syntax and definition of the grammar that a custom tool's input should follow; empty if there is none."""
    format = fields.get(_GRAMMAR)
    if format is None or object_at(format, f"{where}.{_GRAMMAR}").get("type") == "text":
        return "", ""
    place = f"{where}.{_GRAMMAR}"
    if format.get("type") != "grammar":
        raise RequestError(f"{place}.type: expected text or grammar, found {ascii(format.get('type'))[:80]}")
    grammar = format.get("grammar", format)  # deeper in a chat
    place = place if grammar is format else f"{place}.grammar"
    syntax = object_at(grammar, place).get("syntax")
    if syntax not in ("lark", "regex"):
        raise RequestError(f"{place}.syntax: expected lark or regex, found {ascii(syntax)[:80]}")
    return str(syntax), string(grammar, "definition", place)


def read_choice(choice: Any, functions: list[dict[str, Any]], client: ClientForm) -> tuple[Any, list[dict[str, Any]]]:
    """OpenAI's ``tool_choice`` as a chat says it, and the functions that remain.

    Raises:
      RequestError: it orders a call of a tool that is not offered to the model.
    """
    if isinstance(choice, Mapping) and choice.get("type") == "allowed_tools":
        choice, functions = _allowed(choice, functions, client)
    elif isinstance(choice, Mapping) and choice.get("type") in _MODES:  # as Anthropic says it
        choice = choice["type"]
    elif isinstance(choice, Mapping) and choice.get("type") == "tool":
        choice = {**choice, "type": "function"}
    choice = "required" if choice == "any" else choice
    if not isinstance(choice, Mapping):
        if choice not in (None, "auto", "none", "required"):
            raise RequestError(f"tool_choice: {_NAMES}")
        if choice == "required" and not functions and client.left_out:
            raise RequestError(
                f"tool_choice: forces a call, but the server can call none of the tools ({', '.join(client.left_out)})"
            )
        return choice, functions
    kind = choice.get("type", "function")
    if kind not in ("function", "custom"):
        raise RequestError(
            f"tool_choice.type: is {ascii(kind)[:80]}, a tool that this server does not run; {_NAMES}, or leave it out"
        )
    name = named(choice, kind, client)
    if name is None:
        raise RequestError(f"tool_choice: {_NAMES}")
    return {"type": "function", "function": {"name": name}}, functions


def named(choice: Mapping[str, Any], kind: str, client: ClientForm) -> str | None:
    """The name under which the model knows the tool that a choice names; None if it names none."""
    inner = choice.get(kind)
    fields = inner if isinstance(inner, Mapping) else choice
    name, namespace = fields.get("name"), fields.get("namespace")
    if not isinstance(name, str):
        return None
    if isinstance(namespace, str):
        return client.model_name(name, namespace)
    if name not in client.tools:
        bare = [shown for shown, tool in client.tools.items() if tool.name == name]
        return bare[0] if len(bare) == 1 else name
    return name


def _allowed(
    choice: Mapping[str, Any], functions: Sequence[dict[str, Any]], client: ClientForm
) -> tuple[str, list[dict[str, Any]]]:
    """The mode of ``allowed_tools``, and the functions that it leaves."""
    deeper = isinstance(choice.get("allowed_tools"), Mapping)
    fields = choice["allowed_tools"] if deeper else choice
    where = "tool_choice.allowed_tools" if deeper else "tool_choice"
    mode, allowed = fields.get("mode", "auto"), fields.get("tools")
    if mode not in ("auto", "required"):
        raise RequestError(f"{where}.mode: expected auto or required, found {ascii(mode)[:80]}")
    if not isinstance(allowed, list):
        raise RequestError(f"{where}.tools: expected a list, found a {type(allowed).__name__}")
    if len(allowed) > LIMITS["tools"].high:
        raise RequestError(f"{where}.tools: has {len(allowed)} tools, expected at most {LIMITS['tools'].high:.0f}")
    names: set[str] = set()
    for index, entry in enumerate(allowed):
        place = f"{where}.tools[{index}]"
        kind = kind_of(object_at(entry, place), place)
        if kind == "namespace":
            names |= {shown for shown, tool in client.tools.items() if tool.namespace == entry.get("name")}
        elif kind in ("function", "custom"):
            name = named(entry, kind, client)
            if name not in client.tools:
                raise RequestError(f"{place}.name: is {ascii(name)[:80]}, which no tool of this request has")
            names.add(name)
        else:
            client.leave_out(place, kind)
    kept = [function for function in functions if function["function"]["name"] in names]
    if not kept:
        if mode == "required":
            raise RequestError(f"{where}: forces a call, but leaves no tool that the server can call")
        return "none", kept
    places = [position for position, function in enumerate(functions) if function["function"]["name"] in names]
    for remaining, position in enumerate(places):  # errors name tools by their position among those that remain
        _move_paths(client, position, remaining)
    return mode, kept


def _move_paths(client: ClientForm, old: int, new: int) -> None:
    for suffix in (".function", ""):
        client.paths[f"tools[{new}]{suffix}"] = client.paths[f"tools[{old}]{suffix}"]
