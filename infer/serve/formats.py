"""What constrains an answer: response formats, vLLM's and NIM's fields, forced tool calls, the budget of thinking."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from stepjax.errors import RequestError
from stepjax.infer.guided.guide import Constraint
from stepjax.infer.guided.schema_grammar import GrammarPart, choice, grammar_of, json_object, json_schema, regex
from stepjax.infer.guided.tool_grammar import tool_calls
from stepjax.infer.serve.schemas import ChatRequest, ResponseFormat, SampledRequest

if TYPE_CHECKING:
    from stepjax.infer.session import Session

# Tokens of thinking; None is unbounded. The model was not trained with efforts.
EFFORTS = {"none": None, "minimal": 512, "low": 2048, "medium": 8192, "high": None, "xhigh": None, "max": None}


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
    budget = _budget(body) if in_reasoning else None
    if content is None and calls is None:
        return None if budget is None else Constraint(session.masks, thinking=True, budget=budget)
    if body.allowed_token_ids:
        raise RequestError(
            f"allowed_token_ids: are given, expected none together with {name}, which decides what may follow"
        )
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


def _content(body: SampledRequest) -> tuple[str, GrammarPart | None]:
    """The field that constrains the content, and its form; empty if there is none."""
    forms = _forms(body)
    if len(forms) > 1:
        raise RequestError(f"{', '.join(forms)}: expected one of them, since each decides the form of the answer")
    name, value = next(iter(forms.items()), ("", None))
    return name, _form(name, value) if forms else None


def _forms(body: SampledRequest) -> dict[str, Any]:
    """The given fields that constrain the content, by name."""
    forms: dict[str, Any] = {}
    format = getattr(body, "response_format", None)
    if format is not None and format.type != "text":
        forms["response_format"] = format
    for group in ("structured_outputs", "nvext"):
        given = getattr(body, group)
        for kind in ("json", "regex", "choice", "json_object"):
            value = None if given is None else given.of(kind)
            if value not in (None, False):
                forms[f"{group}.{kind}"] = value
    for kind in ("json", "regex", "choice"):
        value = getattr(body, f"guided_{kind}")
        if value is not None:
            forms[f"guided_{kind}"] = value
    return forms


def _form(name: str, value: Any) -> GrammarPart:
    if isinstance(value, ResponseFormat):
        return _of_format(value)
    if name.endswith("json_object"):
        return json_object()
    if name.endswith("json"):
        return json_schema(value, strict=False, name=name)
    return regex(value, name) if name.endswith("regex") else choice(value, name)


def _of_format(format: ResponseFormat) -> GrammarPart:
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


def _budget(body: SampledRequest) -> int | None:
    """The budget of thinking in tokens, if there is one."""
    if not isinstance(body, ChatRequest):
        return None
    if body.thinking_token_budget is not None:
        return body.thinking_token_budget
    return EFFORTS[body.reasoning_effort] if body.reasoning_effort is not None else None


def check_effort(effort: str | None) -> None:
    """Raise RequestError for an unknown effort."""
    if effort is not None and effort not in EFFORTS:
        raise RequestError(f"reasoning_effort: is {effort[:40]!a}, expected one of {', '.join(EFFORTS)}")
