"""What constrains an answer: response formats, vLLM's and NIM's fields, forced tool calls, the budget of thinking."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from stepjax.errors import RequestError
from stepjax.infer.guided.guide import Constraint
from stepjax.infer.guided.schema_grammar import (
    GrammarPart,
    choice,
    grammar,
    grammar_of,
    json_object,
    json_schema,
    regex,
)
from stepjax.infer.guided.tool_grammar import tool_calls
from stepjax.infer.serve.schemas import ChatRequest, ResponseFormat, SampledRequest
from stepjax.infer.serve.thinking import thinking_of

if TYPE_CHECKING:
    from stepjax.infer.session import Session


def wants_grammar(body: SampledRequest) -> bool:
    """Whether the answer needs a grammar, whose compilation may take seconds."""
    return bool(_forms(body)) or (isinstance(body, ChatRequest) and is_forced(body.tool_choice))


def is_forced(choice: Any) -> bool:
    return choice == "required" or isinstance(choice, Mapping)


def constraint_of(
    session: Session,
    body: SampledRequest,
    *,
    in_reasoning: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> Constraint | None:
    """The constraint of the answers; compiles its grammar.

    Raises:
      RequestError: the fields contradict each other, or the grammar is not supported.
    """
    name, content = _content(body)
    calls = None
    if isinstance(body, ChatRequest):
        if is_forced(body.tool_choice):
            content, calls, name = None, _forced(body, tools), "tool_choice"
        elif content is not None and tools:
            calls = tool_calls(tools, several=body.parallel_tool_calls is not False)
    budget = thinking_of(body).budget if in_reasoning and isinstance(body, ChatRequest) else None
    if content is None and calls is None:
        restricts = budget is not None or (in_reasoning and body.min_tokens)
        return Constraint(session.masks, thinking=True, budget=budget) if restricts else None
    if body.allowed_token_ids:
        raise RequestError(
            f"allowed_token_ids: are given, expected none together with {name}, which decides what may follow"
        )
    form = grammar_of(content, calls, after_thinking=in_reasoning)
    grammars = session.grammars
    return Constraint(
        session.masks,
        thinking=in_reasoning,
        budget=budget,
        matcher=grammars.compile(form, name=name),
        calls=calls is not None,
        ends=frozenset(grammars.eos_ids),
    )


def _content(body: SampledRequest) -> tuple[str, GrammarPart | None]:
    """The field that constrains the content, and its form; empty if there is none."""
    forms = _forms(body)
    if len(forms) > 1:
        raise RequestError(f"{', '.join(forms)}: expected one of them, since each decides the form of the answer")
    for name, (kind, value) in forms.items():
        return name, _form(name, kind, value)
    return "", None


# Fields beside each other that constrain the content, and what they hold.
_FLAT = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "json_schema": "json",
    "regex": "regex",
    "ebnf": "grammar",
    "grammar": "grammar",
}


def _forms(body: SampledRequest) -> dict[str, tuple[str, Any]]:
    """The given fields that constrain the content: kind and value, by name."""
    forms: dict[str, tuple[str, Any]] = {}
    if body.response_format is not None and body.response_format.type != "text":
        forms["response_format"] = ("response_format", body.response_format)
    for group in ("structured_outputs", "nvext"):
        given = getattr(body, group)
        for kind in ("json", "regex", "choice", "grammar", "json_object"):
            value = None if given is None else given.of(kind)
            if value not in (None, False):
                forms[f"{group}.{kind}"] = (kind, value)
    for name, kind in _FLAT.items():
        value = getattr(body, name)
        if value is not None and not (kind == "grammar" and value == ""):  # llama.cpp's clients send an empty one
            forms[name] = (kind, value)
    return forms


def _form(name: str, kind: str, value: Any) -> GrammarPart:
    if kind == "response_format":
        return _of_format(value)
    if kind == "json_object":
        return json_object()
    if kind == "json":
        return json_schema(value, strict=False, name=name)
    return {"regex": regex, "choice": choice, "grammar": grammar}[kind](value, name)


def _of_format(format: ResponseFormat) -> GrammarPart:
    if format.type == "regex":
        if format.pattern is None:
            raise RequestError("response_format.pattern: is missing, expected a regular expression")
        return regex(format.pattern, "response_format.pattern")
    if format.type == "grammar":
        if format.grammar is None:
            raise RequestError("response_format.grammar: is missing, expected a grammar")
        return grammar(format.grammar, "response_format.grammar")
    wanted = format.json_schema
    if format.schema_ is not None:
        if wanted is not None and wanted.schema_ is not None:
            raise RequestError("response_format.schema: is given, expected it or json_schema.schema, and not both")
        return json_schema(format.schema_, strict=False, name="response_format.schema")
    if format.type == "json_object":
        return json_object()
    if wanted is None:
        raise RequestError("response_format.json_schema: is missing, expected it with type json_schema")
    if wanted.schema_ is None:
        return json_object()
    return json_schema(wanted.schema_, strict=wanted.strict is True, name="response_format.json_schema.schema")


def _forced(body: ChatRequest, tools: Sequence[Mapping[str, Any]] | None) -> GrammarPart:
    """The form of the calls that ``tool_choice`` forces."""
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
    """Raise RequestError for an unknown choice."""
    if not isinstance(choice, Mapping) and choice not in (None, "auto", "none", "required"):
        raise RequestError("tool_choice: expected auto, none, required, or a function by its name")
