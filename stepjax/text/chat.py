"""Turns conversations in OpenAI's form into prompts, with the checkpoint's own chat template.

Nothing that a caller writes acts as a control token: where a message, a tool or an argument spells one, the prompt
holds the spelling as ordinary text. There is one exception: in an assistant
message without `reasoning_content`, the first `</think>` (and the first `<think>` before it) separates thinking from
answer, since many clients send the model's raw output back. A template that does not look for it prints it as a
control token, inside the assistant's own turn.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from stepjax.errors import RequestError, TemplateError
from stepjax.text.template import Guard, TemplateLimits, TemplateProcess, template_literals, template_variables
from stepjax.text.tokenizer import BOS, CONTROL_NAMES, THINK_CLOSE, THINK_OPEN, Segment, Tokenizer

# OpenAI's newer name for system messages is mapped to the one that templates know.
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_MAX_DEPTH = 64  # of JSON in arguments and tools
_MAX_INT_BITS = 1024  # as large as floats go; Python refuses to print some far larger ones
_MAX_SOURCE_BYTES = 1 << 20
# Names of tokenizer_config.json that a template can read. The official template writes bos itself.
_TOKEN_VARIABLES = ("bos_token", "eos_token", "pad_token", "unk_token")
THINKING_KWARGS = ("enable_thinking", "thinking")
# Variables that the server sets, which a caller cannot.
_SERVER_VARIABLES = frozenset(
    [*_TOKEN_VARIABLES, *THINKING_KWARGS, "messages", "tools", "add_generation_prompt", "documents", "chat_template"]
)


class ChatTemplate:
    """A chat template and the process that renders it. Safe to share between threads."""

    def __init__(
        self, source: str, *, variables: Mapping[str, str] | None = None, limits: TemplateLimits | None = None
    ):
        """variables are trusted strings of the checkpoint, such as bos_token.

        `options` are the names of the variables that the template reads and a caller may set.
        Raises TemplateError if the template does not parse.
        """
        self._source = source
        self._literals = template_literals(source)
        self.options = template_variables(source) - _SERVER_VARIABLES
        self._variables = {"bos_token": BOS, **(variables or {})}
        self._process = TemplateProcess(source, limits=limits)

    @classmethod
    def from_folder(cls, path: str | Path, *, limits: TemplateLimits | None = None) -> ChatTemplate:
        """Takes `chat_template.jinja`, else `chat_template` in `tokenizer_config.json` (of several, the default one).

        Raises TemplateError if there is none, or it cannot be read.
        """
        folder = Path(path)
        config = _read_config(folder / "tokenizer_config.json")
        file = folder / "chat_template.jinja"
        source = _read_text(file) if file.exists() else _choose_template(config.get("chat_template"), folder)
        variables = {name: text for name in _TOKEN_VARIABLES if (text := _spelling(config.get(name)))}
        try:
            return cls(source, variables=variables, limits=limits)
        except TemplateError as error:
            raise TemplateError(f"{file if file.exists() else folder / 'tokenizer_config.json'}: {error}") from None

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, origin: str) -> ChatTemplate:
        """Takes ``chat_template`` and the tokens of a parsed tokenizer_config.json; ``origin`` names it in errors.

        Raises TemplateError if there is none, or it cannot be read.
        """
        source = _choose_template(config.get("chat_template"), Path(origin))
        variables = {name: text for name in _TOKEN_VARIABLES if (text := _spelling(config.get(name)))}
        try:
            return cls(source, variables=variables)
        except TemplateError as error:
            raise TemplateError(f"{origin}: {error}") from None

    @property
    def source(self) -> str:
        """The template's text."""
        return self._source

    def segments(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        controls: Sequence[str] = CONTROL_NAMES,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        enable_thinking: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> list[Segment]:
        """The prompt as text and control tokens; controls are the spellings that the tokenizer has as control tokens.

        enable_thinking=False closes the thinking that the generation prompt opens. The official template has no such
        switch and the model was not trained with it (it is also passed on, for templates that have one).
        continue_final_message=True takes the last message as the beginning of the answer: the prompt ends with its
        text, after the generation prompt, as if the model had written it.
        variables are a caller's values for names of `options`, JSON data.
        Raises RequestError naming the message and field at fault, TemplateError if the template fails.
        """
        conversation, functions = read_messages(messages), read_tools(tools)
        unfinished = None
        if continue_final_message:
            unfinished, add_generation_prompt = _unfinished_answer(conversation), True
            conversation = conversation[:-1]
        given = {name: _plain_data(value, f"chat_template_kwargs.{name}") for name, value in (variables or {}).items()}
        texts = json.dumps([conversation, functions, given, self._variables, self._source], ensure_ascii=False)
        guard = Guard(controls, literals=self._literals, texts=texts)
        variables = {
            **{name: _protect(value, guard) for name, value in given.items()},
            **self._variables,
            "messages": [_protect_message(message, guard) for message in conversation],
            "tools": _protect(functions, guard),
            "add_generation_prompt": add_generation_prompt,
            "enable_thinking": enable_thinking,
        }
        segments = guard.split(self._process.render(variables))
        is_open = segments[-2:] == [Segment(THINK_OPEN, True), Segment("\n", False)]
        if unfinished is not None:
            return segments + _unfinished_segments(unfinished, is_open=is_open, enable_thinking=enable_thinking)
        if add_generation_prompt and not enable_thinking and is_open:
            segments += [Segment(THINK_CLOSE, True), Segment("\n", False)]
        return segments

    def render(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """The prompt as text, for people to read; options and errors as for `segments`.

        Do not tokenize it: text cannot tell the template's control tokens from a caller's spelling of them.
        """
        return "".join(segment.text for segment in self.segments(messages, **options))

    def close(self) -> None:
        """End the rendering process, which otherwise ends with the object."""
        self._process.close()


def encode_chat(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    **options: Any,
) -> list[int]:
    """Prompt ids of a conversation, bos included. Options and errors as for `ChatTemplate.segments`."""
    return tokenizer.encode_rendered(template.segments(messages, controls=tuple(tokenizer.controls), **options))


def read_template_kwargs(kwargs: Mapping[str, Any] | None, options: Collection[str] = ()) -> dict[str, Any]:
    """A request's `chat_template_kwargs` as keyword arguments of `encode_chat`.

    `enable_thinking` and `thinking` (as the templates of DeepSeek and Kimi call it) switch the thinking. Other names
    must be among ``options``, the variables that the template reads: a name that it does not read would change nothing,
    and arbitrary names have overridden the server's own elsewhere (GHSA-69j4-grxj-j64p).
    Raises RequestError for anything else.
    """
    arguments: dict[str, Any] = {}
    variables: dict[str, Any] = {}
    for name, value in (kwargs or {}).items():
        if name in THINKING_KWARGS:
            if not isinstance(value, bool):
                raise RequestError(f"chat_template_kwargs.{name}: expected true or false, found {_short(value)}")
            arguments["enable_thinking"] = value and arguments.get("enable_thinking", True)
        elif name in options:
            variables[name] = value
        else:
            known = ", ".join(sorted({*THINKING_KWARGS, *options}))
            raise RequestError(f"chat_template_kwargs: expected only {known}, found {_short(name)}")
    return arguments | ({"variables": variables} if variables else {})


def read_messages(messages: Any) -> list[dict[str, Any]]:
    """Checks a conversation and brings it to the form that templates expect: fields not known here are left out,
    arguments are decoded, and `reasoning` becomes `reasoning_content`. Raises RequestError naming index and field.
    """
    if not _is_list(messages) or not messages:
        raise RequestError(f"messages: expected a list of at least one message, found {_short(messages)}")
    return [_read_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def read_tools(tools: Any) -> list[dict[str, Any]] | None:
    """Checks the tools that a request offers; their schemas go into the prompt as they are. Raises RequestError."""
    if tools is None:
        return None
    if not _is_list(tools):
        raise RequestError(f"tools: expected a list, found {_short(tools)}")
    read = []
    for i, tool in enumerate(tools):
        where = f"tools[{i}]"
        _mapping(tool, where)
        if tool.get("type", "function") != "function":
            raise RequestError(f"{where}.type: expected 'function', found {_short(tool['type'])}")
        function = _mapping(tool.get("function"), f"{where}.function")
        if not _text(function.get("name"), f"{where}.function.name"):
            raise RequestError(f"{where}.function.name: expected a name, found an empty string")
        read.append(_plain_data(tool, where))
    return read or None


def _read_message(message: Any, where: str) -> dict[str, Any]:
    _mapping(message, where)
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise RequestError(f"{where}.role: expected one of {', '.join(_ROLES)}, found {_short(role)}")
    read: dict[str, Any] = {"role": _ROLES[role], "content": _read_content(message, where)}
    for field in ("name", "tool_call_id"):
        if message.get(field) is not None:
            read[field] = _text(message[field], f"{where}.{field}")
    if message.get("function_call") is not None:
        raise RequestError(f"{where}.function_call: no longer supported, use tool_calls")
    if role != "assistant":
        if message.get("tool_calls"):
            raise RequestError(f"{where}.tool_calls: expected only on assistant messages, found on role {role!r}")
        return read
    # Templates look at the text as a whole for the end of the thinking.
    read["content"] = _joined_text(read["content"])
    for field in ("reasoning_content", "reasoning"):
        if message.get(field) is not None:
            read["reasoning_content"] = _text(message[field], f"{where}.{field}")
            break
    if message.get("tool_calls") is not None:
        read["tool_calls"] = _read_calls(message["tool_calls"], f"{where}.tool_calls")
    return read


def _read_content(message: Mapping[str, Any], where: str) -> Any:
    """A string, a mapping with text, or a list of text parts."""
    content, where = message.get("content"), f"{where}.content"
    if content is None and message.get("role") == "assistant":
        return ""  # as OpenAI sends it beside tool calls
    if isinstance(content, str):
        return _text(content, where)
    if isinstance(content, Mapping):
        return _read_part(content, where)
    if not _is_list(content):
        raise RequestError(f"{where}: expected a string or a list of text parts, found {_short(content)}")
    return [_read_part(part, f"{where}[{i}]") for i, part in enumerate(content)]


def _read_part(part: Any, where: str) -> dict[str, str]:
    if isinstance(part, str):
        return {"type": "text", "text": _text(part, where)}
    _mapping(part, where)
    if part.get("type", "text") != "text":
        raise RequestError(
            f"{where}.type: expected 'text' (the model reads nothing else), found {_short(part['type'])}"
        )
    field = "value" if "value" in part else "text"
    return {"type": "text", field: _text(part.get(field), f"{where}.{field}")}


def _joined_text(content: Any) -> str:
    if isinstance(content, str):
        return content
    parts = [content] if isinstance(content, dict) else content
    return "".join(part["value"] if "value" in part else part["text"] for part in parts)


def _read_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if not _is_list(calls):
        raise RequestError(f"{where}: expected a list, found {_short(calls)}")
    read = []
    for i, call in enumerate(calls):
        place = f"{where}[{i}]"
        _mapping(call, place)
        function = _mapping(call.get("function"), f"{place}.function")
        name = _text(function.get("name"), f"{place}.function.name")
        arguments = _read_arguments(function.get("arguments"), f"{place}.function.arguments")
        entry: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": arguments}}
        if call.get("id") is not None:
            entry["id"] = _text(call["id"], f"{place}.id")
        read.append(entry)
    return read


def _read_arguments(arguments: Any, where: str) -> dict[str, Any]:
    """A mapping, given as one or as JSON text; empty text, as some clients send, is an empty mapping."""
    if arguments is None or arguments == "":
        return {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{where}: expected JSON, found {_short(arguments)} ({error})") from None
    return _plain_data(_mapping(arguments, where), where)


def _plain_data(value: Any, where: str, *, depth: int = 0) -> Any:
    """A copy of JSON data. Raises RequestError for what JSON cannot say, or nested more than 64 deep."""
    if depth > _MAX_DEPTH:
        raise RequestError(f"{where}: expected at most {_MAX_DEPTH} levels of nesting")
    if value is None or (isinstance(value, int) and value.bit_length() <= _MAX_INT_BITS):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, str):
        return _text(value, where)
    if isinstance(value, Mapping):
        return {
            _text(key, f"{where} (a key)"): _plain_data(item, f"{where}.{_short(key)}", depth=depth + 1)
            for key, item in value.items()
        }
    if _is_list(value):
        return [_plain_data(item, f"{where}[{i}]", depth=depth + 1) for i, item in enumerate(value)]
    raise RequestError(f"{where}: expected JSON data, found {_short(value)}")


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{where}: expected a string, found {_short(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        surrogate = f"U+{ord(value[error.start]):04X} at character {error.start}"
        raise RequestError(f"{where}: expected valid Unicode, found the lone surrogate {surrogate}") from None
    return value


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise RequestError(f"{where}: expected an object, found {_short(value)}")
    return value


def _is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _short(value: Any) -> str:
    """The beginning of a value, for errors. In ASCII, since it may not be valid Unicode."""
    if value is None:
        return "nothing"
    if isinstance(value, int) and value.bit_length() > _MAX_INT_BITS:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, str | int | float):
        text = ascii(value[:60] if isinstance(value, str) else value)
        return text if len(text) <= 80 else text[:80] + "..."
    return f"a {type(value).__name__}"


def _unfinished_answer(conversation: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The last message, which the answer continues. RequestError: it is no such message."""
    last = conversation[-1]
    where = f"messages[{len(conversation) - 1}]"
    if last["role"] != "assistant" or last.get("tool_calls"):
        raise RequestError(f"{where}: expected an answer to continue: a message of the assistant without tool_calls")
    if not last["content"] and not last.get("reasoning_content"):
        raise RequestError(f"{where}: is empty, expected the beginning of an answer to continue")
    if len(conversation) < 2:
        raise RequestError(f"{where}: expected a message before the answer to continue")
    return last


def _unfinished_segments(message: Mapping[str, Any], *, is_open: bool, enable_thinking: bool) -> list[Segment]:
    """The beginning of an answer in the form in which the model writes it. All of it is text: nothing in it acts as a
    control token, except that its first `</think>` ends the thinking, as in `_protect_thinking`.

    is_open: whether the generation prompt has opened the thinking. Thinking without content goes on.
    """
    reasoning, content = message.get("reasoning_content"), message["content"]
    if reasoning is None and THINK_CLOSE in content:
        reasoning, _, content = content.partition(THINK_CLOSE)
        reasoning = reasoning.partition(THINK_OPEN)[2] or reasoning
        reasoning, content = reasoning.removeprefix("\n").removesuffix("\n"), content.removeprefix("\n")
    if not is_open and reasoning is None:
        return [Segment(content, False)]
    segments = [] if is_open else [Segment(THINK_OPEN, True), Segment("\n", False)]
    if reasoning:
        segments.append(Segment(reasoning, False))
    if content or not enable_thinking:
        end = [Segment("\n", False)] if reasoning else []
        segments += [*end, Segment(THINK_CLOSE, True), Segment("\n" + content, False)]
    return segments


def _protect_message(message: Mapping[str, Any], guard: Guard) -> dict[str, Any]:
    """The message with every caller's string protected; role is one of ours."""
    protected = {field: _protect(value, guard) for field, value in message.items() if field != "role"}
    if message["role"] == "assistant" and "reasoning_content" not in message:
        protected["content"] = _protect_thinking(message["content"], guard)
    return {"role": message["role"], **protected}


def _protect_thinking(content: str, guard: Guard) -> str:
    head, close, tail = content.partition(THINK_CLOSE)
    if not close:
        return guard.protect(content)
    before, opening, thinking = head.partition(THINK_OPEN)
    return guard.protect(before) + opening + guard.protect(thinking) + close + guard.protect(tail)


def _protect(value: Any, guard: Guard) -> Any:
    if isinstance(value, str):
        return guard.protect(value)
    if isinstance(value, dict):
        return {guard.protect(key): _protect(item, guard) for key, item in value.items()}
    return [_protect(item, guard) for item in value] if isinstance(value, list) else value


def _read_text(file: Path) -> str:
    try:
        if file.stat().st_size > _MAX_SOURCE_BYTES:
            raise TemplateError(f"{file}: {file.stat().st_size} bytes, expected at most {_MAX_SOURCE_BYTES}")
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TemplateError(f"{file}: cannot be read ({error}); copy it from the checkpoint's repository") from error


def _read_config(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TemplateError(f"{file}: damaged ({error}); copy it from the checkpoint's repository") from error
    return config if isinstance(config, dict) else {}


def _choose_template(templates: Any, folder: Path) -> str:
    """The only template, or the one named default: files may list several as {"name", "template"}."""
    if _is_list(templates):
        named = {entry.get("name"): entry.get("template") for entry in templates if isinstance(entry, Mapping)}
        templates = named.get("default", next(iter(named.values())) if len(named) == 1 else None)
    if not isinstance(templates, str):
        raise TemplateError(
            f"{folder}: no chat template, expected chat_template.jinja, or chat_template in tokenizer_config.json "
            "(if several, one named 'default'); copy the file from the checkpoint's repository"
        )
    return templates


def _spelling(token: Any) -> str | None:
    """A token in tokenizer_config.json is a string, or an object with its content."""
    content = token.get("content") if isinstance(token, Mapping) else token
    return content if isinstance(content, str) else None
