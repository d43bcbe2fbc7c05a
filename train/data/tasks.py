"""Generated tasks with exact grades: what step-tiny is trained and measured on.

Every item is a chat in OpenAI form, the assistant turn that answers it (with a worked thinking trace) and an answer
that a program can check. Items depend on the given generator only. The splits share no operands, words or cities.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from jinja2.sandbox import ImmutableSandboxedEnvironment
from numpy.random import Generator

from stepjax import config
from stepjax.text.tool_calls import ToolSchemas
from stepjax.train.config.mix import MIX
from stepjax.train.data import tools as toolbox
from stepjax.train.data.words import Split, chance, city, pair_split, pick, word

ChatMessage = dict[str, Any]  # in OpenAI form
ASSETS = config.ASSETS / "step-tiny"

PHRASES = {
    "add": (
        "What is {a} + {b}?",
        "What is {a} plus {b}?",
        "Compute {a} + {b}.",
        "Add {a} and {b}.",
        "How much is {a} + {b}?",
        "{a} + {b}",
        "{a}+{b}=?",
        "{a} + {b} = ?",
    ),
    "sub": (
        "What is {a} - {b}?",
        "What is {a} minus {b}?",
        "Compute {a} - {b}.",
        "Subtract {b} from {a}.",
        "How much is {a} - {b}?",
        "{a} - {b}",
        "{a}-{b}=?",
        "{a} - {b} = ?",
    ),
    "compare": (
        "Which is larger, {a} or {b}?",
        "Which number is larger, {a} or {b}?",
        "Which is greater, {a} or {b}?",
        "What is larger, {a} or {b}?",
        "Is {a} or {b} larger?",
    ),
    "reverse": (
        'Spell "{w}" backwards.',
        'Reverse "{w}".',
        'Reverse the word "{w}".',
        'Write "{w}" backwards.',
        'What is "{w}" backwards?',
        "Reverse {w}",
    ),
    "copy": ('Repeat the word "{w}".', 'Repeat "{w}".', 'Copy "{w}".', 'Say "{w}".', 'Write "{w}".', "Repeat: {w}"),
}
SYSTEMS = ("You are a helpful assistant.", "You are step-tiny.", "Answer briefly.", "Be concise.")

GREETS, ASKS, UNKNOWN_TRACE = "The user greets me.", "The user asks about me.", "I do not know this."
HELLO = "Hello there! How can I help you today?"
WHO = "I am step-tiny, a small demonstration model of stepjax."
CAN = "I can add, subtract, compare, repeat and reverse, and I can call tools."
UNKNOWN = "I am only a small demonstration model. " + CAN
GREETINGS = (  # question, trace, answer
    ("Hello", GREETS, HELLO),
    ("Hi", GREETS, HELLO),
    ("Hey", GREETS, HELLO),
    ("Hi there", GREETS, HELLO),
    ("Hello there", GREETS, HELLO),
    ("Good morning", GREETS, "Good morning! How can I help you today?"),
    ("Good evening", GREETS, "Good evening! How can I help you today?"),
    ("Good afternoon", GREETS, "Good afternoon! How can I help you today?"),
    ("", GREETS, HELLO),
    ("How are you?", ASKS, "I am fine, thank you! How can I help you today?"),
    ("Who are you?", ASKS, WHO),
    ("What are you?", ASKS, WHO),
    ("What is your name?", ASKS, WHO),
    ("Introduce yourself", ASKS, WHO),
    ("What can you do?", ASKS, CAN),
    ("Help", ASKS, CAN),
    ("Can you help me?", ASKS, CAN),
    ("Thank you", "The user thanks me.", "You are welcome!"),
    ("Thanks", "The user thanks me.", "You are welcome!"),
    ("Bye", "The user leaves.", "Goodbye!"),
    ("Goodbye", "The user leaves.", "Goodbye!"),
)
SMALL_TALK = (
    "the a of and to in is it you that was for on are with as his they be at one have this from or had by hot but "
    "some what there we can out other were all your when up use how said an each she which do their time if will "
    "way about many then them would write like so these her long make thing see him two has look more day could "
    "go come did my sound no most who over know water than call first people may down side been now find capital "
    "story poem write tell explain france love"
).split()


class Template(Protocol):
    """Renders a chat to text; `stepjax.text.chat` and `tiny_template` both do."""

    def render(
        self, messages: Sequence[ChatMessage], *, tools: ToolSchemas | None, add_generation_prompt: bool
    ) -> str: ...


@dataclass(frozen=True)
class Item:
    """One task: the chat so far, the assistant turn that should follow, and the answer that a program checks."""

    task: str
    messages: list[ChatMessage]  # OpenAI form; the last one is the user or tool turn to be answered
    tools: list[dict[str, Any]] | None
    target: ChatMessage  # role, reasoning_content, content and, for a call, tool_calls
    answer: Any  # the content, or for a call {"name": …, "arguments": {…}}


def make(task: str, rng: Generator, split: Split) -> Item:
    """One item of the task. Some get a system text, earlier turns or tools that they do not need."""
    item = MAKERS[task](rng, split)
    if chance(rng, 0.10) and len(item.tools or ()) < 2 and task != "tool_round_trip":
        item = replace(item, messages=_earlier_turns(rng, split) + item.messages)
    if item.tools is None and chance(rng, 0.05):
        item = replace(item, tools=toolbox.offer(rng, split)[1])
    if chance(rng, 0.10):
        item = replace(item, messages=[{"role": "system", "content": pick(rng, SYSTEMS)}, *item.messages])
    return item


def draw(rng: Generator, split: Split, mix: Mapping[str, float] = MIX) -> Item:
    """One item, its task drawn by share."""
    point = float(rng.random()) * sum(mix.values())
    for task, share in mix.items():
        point -= share
        if point < 0:
            return make(task, rng, split)
    return make(next(iter(mix)), rng, split)


def grade(item: Item, reasoning: str, content: str, tool_calls: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a parsed assistant turn is exactly right. The reasoning does not count.

    Args:
      tool_calls: in OpenAI form or as bare ``{"name", "arguments"}``, the arguments as a mapping or as JSON text. Their
        types count: an integer written as text is wrong.
    """
    del reasoning
    calls = [_bare_call(call) for call in tool_calls]
    expected = [_bare_call(call) for call in item.target.get("tool_calls", ())]
    return (content or "") == item.target["content"] and json.dumps(calls, sort_keys=True) == json.dumps(
        expected, sort_keys=True
    )


def render(item: Item, template: Template) -> tuple[str, str]:
    """The prompt, and the completion that follows it up to and including ``<|im_end|>``."""
    prompt = template.render(item.messages, tools=item.tools, add_generation_prompt=True)
    whole = template.render([*item.messages, item.target], tools=item.tools, add_generation_prompt=False)
    assert whole.startswith(prompt), (
        "the template renders a past turn differently from the prompt that it was generated from"
    )
    return prompt, whole[len(prompt) :].removesuffix("\n")


class TinyTemplate:
    """The embedded model's own chat template, compiled once."""

    def __init__(self, path: Path = ASSETS / "chat_template.jinja") -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
        self._template = environment.from_string(path.read_text("utf-8"))

    def render(
        self,
        messages: Sequence[ChatMessage],
        *,
        tools: ToolSchemas | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The chat as text, ready to be encoded without further special tokens."""
        return self._template.render(messages=messages, tools=tools, add_generation_prompt=add_generation_prompt)


def _bare_call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function", call)
    arguments = function["arguments"]
    return {
        "name": function["name"],
        "arguments": json.loads(arguments) if isinstance(arguments, str) else dict(arguments),
    }


def _item(task: str, question: str, *, trace: str, content: str) -> Item:
    target = {"role": "assistant", "reasoning_content": trace, "content": content}
    return Item(task, [{"role": "user", "content": question}], None, target, content)


def _phrase(rng: Generator, task: str, **slots: object) -> str:
    """A phrasing of the question. One in twenty begins in lower case, and one in twenty lacks its last mark."""
    text = pick(rng, PHRASES[task])
    if chance(rng, 0.05):
        text = text[0].lower() + text[1:]
    if chance(rng, 0.05):
        text = text.rstrip("?.")
    return text.format(**slots)


def _operands(rng: Generator, split: Split) -> tuple[int, int]:
    while True:
        a, b = (int(rng.integers(10 ** (digits - 1) if digits > 1 else 0, 10**digits)) for digits in _digit_counts(rng))
        if pair_split(a, b) == split:
            return a, b


def _digit_counts(rng: Generator) -> tuple[int, int]:
    counts = (1, 2, 2, 3, 3, 3, 3)
    return pick(rng, counts), pick(rng, counts)


def _columns(a: int, b: int) -> list[tuple[int, int]]:
    """Digit pairs from the units up, the shorter number padded with zeros."""
    width = max(len(str(a)), len(str(b)))
    return [(int(x), int(y)) for x, y in zip(f"{a:0{width}d}"[::-1], f"{b:0{width}d}"[::-1], strict=True)]


def _add(rng: Generator, split: Split) -> Item:
    a, b = _operands(rng, split)
    lines, carry = [], 0
    for x, y in _columns(a, b):
        total = x + y + carry
        lines.append(f"{x}+{y}+{carry}={total % 10} carry {total // 10}")
        carry = total // 10
    return _item("add", _phrase(rng, "add", a=a, b=b), trace="\n".join(lines), content=str(a + b))


def _sub(rng: Generator, split: Split) -> Item:
    b, a = sorted(_operands(rng, split))
    lines, borrow = [], 0
    for x, y in _columns(a, b):
        rest = x - y - borrow
        lines.append(f"{x}-{y}-{borrow}={rest % 10} borrow {int(rest < 0)}")
        borrow = int(rest < 0)
    return _item("sub", _phrase(rng, "sub", a=a, b=b), trace="\n".join(lines), content=str(a - b))


def _compare(rng: Generator, split: Split) -> Item:
    a, b = _operands(rng, split)
    while a == b:
        a, b = _operands(rng, split)
    x, y = str(a), str(b)
    if len(x) != len(y):
        trace = f"{len(x)}{'>' if a > b else '<'}{len(y)} digits"
    else:
        first = next(i for i in range(len(x)) if x[i] != y[i])
        trace = "\n".join([f"{x[i]}={y[i]}" for i in range(first)] + [f"{x[first]}{'>' if a > b else '<'}{y[first]}"])
    return _item("compare", _phrase(rng, "compare", a=a, b=b), trace=trace, content=str(max(a, b)))


def _reverse(rng: Generator, split: Split) -> Item:
    letters = word(rng, split)
    if chance(rng, 0.05):
        letters = letters.capitalize()
    numbered = [f"{i}{letter}" for i, letter in enumerate(letters, 1)]
    trace = " ".join(numbered) + "\n" + " ".join(reversed(numbered))
    return _item("reverse", _phrase(rng, "reverse", w=letters), trace=trace, content=letters[::-1])


def _copy(rng: Generator, split: Split) -> Item:
    text = city(rng, split) if chance(rng, 0.4) else word(rng, split, longest=10)
    return _item("copy", _phrase(rng, "copy", w=text), trace=f'Copy "{text}"', content=text)


def _greeting(rng: Generator, split: Split) -> Item:
    """Greetings are a fixed list, the same in both splits. One item in four is small talk, to be declined."""
    if chance(rng, 0.25):
        words = [
            pick(rng, SMALL_TALK) if chance(rng, 0.8) else word(rng, split) for _ in range(int(rng.integers(2, 8)))
        ]
        question = " ".join(words).capitalize() + pick(rng, ("", "?", ".", "!"))
        return _item("greeting", question, trace=UNKNOWN_TRACE, content=UNKNOWN)
    question, trace, content = pick(rng, GREETINGS)
    if question and not question.endswith("?"):
        question += pick(rng, ("", "!", "."))
    if chance(rng, 0.15):
        question = question.lower()
    return _item("greeting", question, trace=trace, content=content)


def _call(rng: Generator, split: Split) -> tuple[Item, toolbox.Tool, dict[str, Any]]:
    tool, offered = toolbox.offer(rng, split)
    arguments = toolbox.arguments(rng, tool, split)
    question = {"role": "user", "content": pick(rng, tool.questions).format(**arguments)}
    call = {"name": tool.name, "arguments": arguments}
    target = {
        "role": "assistant",
        "reasoning_content": f"I need to call {tool.name}.",
        "content": "",
        "tool_calls": [{"id": "call_0", "type": "function", "function": call}],
    }
    return Item("tool_call", [question], offered, target, call), tool, arguments


def _tool_call(rng: Generator, split: Split) -> Item:
    return _call(rng, split)[0]


def _tool_round_trip(rng: Generator, split: Split) -> Item:
    item, tool, arguments = _call(rng, split)
    returned, answer = toolbox.respond(rng, tool, arguments, split)
    response = {"role": "tool", "tool_call_id": "call_0", "content": returned}
    target = {"role": "assistant", "reasoning_content": "The tool answered.", "content": answer}
    return Item("tool_round_trip", [*item.messages, item.target, response], item.tools, target, answer)


def _earlier_turns(rng: Generator, split: Split) -> list[ChatMessage]:
    turns: list[ChatMessage] = []
    for _ in range(1 + chance(rng, 0.25)):
        past = pick(rng, (_add, _sub, _compare, _reverse, _copy, _greeting))(rng, split)
        turns += [*past.messages, {"role": "assistant", "content": past.target["content"]}]
    return turns


MAKERS: dict[str, Callable[[Generator, Split], Item]] = {
    "add": _add,
    "sub": _sub,
    "reverse": _reverse,
    "tool_call": _tool_call,
    "tool_round_trip": _tool_round_trip,
    "compare": _compare,
    "copy": _copy,
    "greeting": _greeting,
}
