"""What a request says of its answer's shape: response formats, vLLM's and NIM's fields, forced tools, thinking."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from stepjax.errors import RequestError
from stepjax.infer.guided.guide import Constraint
from stepjax.infer.guided.schema_grammar import Form, choice, grammar_of, json_object, json_schema, regex
from stepjax.infer.guided.tool_grammar import tool_calls
from stepjax.infer.serve.schemas import ChatRequest, ResponseFormat, Sampled

if TYPE_CHECKING:
    from stepjax.infer.session import Session

# Tokens of thinking. The model was not trained with efforts; the last ones think as long as it likes.
EFFORTS = {"none": None, "minimal": 512, "low": 2048, "medium": 8192, "high": None, "xhigh": None, "max": None}


def wants_grammar(body: Sampled) -> bool:
    """Whether an answer's grammar must be compiled, which may take seconds."""
    return bool(_forms(body)) or (isinstance(body, ChatRequest) and is_forced(body.tool_choice))


def is_forced(choice: Any) -> bool:
    return choice == "required" or isinstance(choice, Mapping)


def constraint_of(
    session: Session,
    body: Sampled,
    *,
    in_reasoning: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> Constraint | None:
    """What the answers are held to; compiles.

    Raises:
      RequestError: it contradicts itself, or cannot be held to.
    """
    name, content = _content(body)
    calls = None
    if isinstance(body, ChatRequest):
        if is_forced(body.tool_choice):
            content, calls, name = None, _forced(body, tools), "tool_choice"
        elif content is not None and tools:
            calls = tool_calls(tools, several=body.parallel_tool_calls is not False)
    budget = _budget(body) if in_reasoning else None
    if content is None and calls is None:
        return None if budget is None else Constraint(session.masks, thinking=True, budget=budget)
    if body.allowed_token_ids:
        raise RequestError(f"allowed_token_ids: are given, expected none beside {name}, which says what may follow")
    grammar = grammar_of(content, calls, after_thinking=in_reasoning)
    grammars = session.grammars
    return Constraint(
        session.masks,
        thinking=in_reasoning,
        budget=budget,
        matcher=grammars.compile(grammar, name=name),
        calls=calls is not None,
        ends=frozenset(grammars.eos_ids),
    )


def _content(body: Sampled) -> tuple[str, Form | None]:
    """The field that says what the content shall look like, and what it says."""
    found = _forms(body)
    if len(found) > 1:
        raise RequestError(f"{', '.join(found)}: expected one of them, since each says what the answer looks like")
    name, value = next(iter(found.items()), ("", None))
    return name, _form(name, value) if found else None


def _forms(body: Sampled) -> dict[str, Any]:
    """By field, what is asked for."""
    found: dict[str, Any] = {}
    format = getattr(body, "response_format", None)
    if format is not None and format.type != "text":
        found["response_format"] = format
    for group in ("structured_outputs", "nvext"):
        given = getattr(body, group)
        for kind in ("json", "regex", "choice", "json_object"):
            value = None if given is None else given.of(kind)
            if value not in (None, False):
                found[f"{group}.{kind}"] = value
    for kind in ("json", "regex", "choice"):
        value = getattr(body, f"guided_{kind}")
        if value is not None:
            found[f"guided_{kind}"] = value
    return found


def _form(name: str, value: Any) -> Form:
    if isinstance(value, ResponseFormat):
        return _of_format(value)
    if name.endswith("json_object"):
        return json_object()
    if name.endswith("json"):
        return json_schema(value, strict=False, name=name)
    return regex(value, name) if name.endswith("regex") else choice(value, name)


def _of_format(format: ResponseFormat) -> Form:
    if format.type == "json_object":
        return json_object()
    if format.type == "regex":
        if format.pattern is None:
            raise RequestError("response_format.pattern: is missing, expected a regular expression")
        return regex(format.pattern, "response_format.pattern")
    wanted = format.json_schema
    if wanted is None:
        raise RequestError("response_format.json_schema: is missing, expected it with type json_schema")
    if wanted.schema_ is None:
        return json_object()
    return json_schema(wanted.schema_, strict=wanted.strict is True, name="response_format.json_schema.schema")


def _forced(body: ChatRequest, tools: Sequence[Mapping[str, Any]] | None) -> Form:
    """The calls that a request insists on."""
    if not tools:
        raise RequestError("tool_choice: forces a call, expected tools with it")
    if body.tool_choice == "required":
        return tool_calls(tools, several=body.parallel_tool_calls is not False)
    function = body.tool_choice.get("function")
    name = function.get("name") if isinstance(function, Mapping) else body.tool_choice.get("name")
    if body.tool_choice.get("type", "function") != "function" or not isinstance(name, str):
        raise RequestError("tool_choice: expected auto, none, required, or a function by its name")
    return tool_calls(tools, name=name, several=False)


def check_tool_choice(choice: Any) -> None:
    """Raise RequestError for a choice that is none."""
    if not isinstance(choice, Mapping) and choice not in (None, "auto", "none", "required"):
        raise RequestError("tool_choice: expected auto, none, required, or a function by its name")


def _budget(body: Sampled) -> int | None:
    """Tokens of thinking, if bounded."""
    if not isinstance(body, ChatRequest):
        return None
    if body.thinking_token_budget is not None:
        return body.thinking_token_budget
    return EFFORTS[body.reasoning_effort] if body.reasoning_effort is not None else None


def check_effort(effort: str | None) -> None:
    """Raise RequestError for an effort that is not known."""
    if effort is not None and effort not in EFFORTS:
        raise RequestError(f"reasoning_effort: is {effort[:40]!a}, expected one of {', '.join(EFFORTS)}")
