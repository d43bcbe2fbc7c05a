"""The model's chat format for recipes of the Tinker cookbook, which `register` puts into its tables.

Example::

    from stepjax.train.cookbook import RENDERER, register

    register("step-tiny")  # the base model's name on the server that TINKER_BASE_URL names
    config = supervised.train.Config(model_name="step-tiny", renderer_name=RENDERER, …)
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from stepjax.errors import ConfigError
from stepjax.train.client import capabilities

RENDERER = "stepjax/template"
_CALL = re.compile(r"<tool_call>\s*<function=([^>\n]+)>(.*?)</function>\s*</tool_call>", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)


def register(model: str, *, folder: str | None = None) -> None:
    """Register the tokenizer of a base model under its name, and `RENDERER`.

    Args:
      model: name of the base model on the server.
      folder: of its tokenizer and chat template, or its name on the Hugging Face hub; None: the folder that the server
        at ``TINKER_BASE_URL`` names, which is one of the server's machine.

    Raises:
      ConfigError: no folder is given, and the server names none that is here.
    """
    place = folder or _served_folder(model)
    transformers: Any = import_module("transformers")
    tokenizers: Any = import_module("tinker_cookbook.tokenizer_utils")
    renderers: Any = import_module("tinker_cookbook.renderers")
    tokenizers.register_tokenizer(model, functools.cache(lambda: transformers.AutoTokenizer.from_pretrained(place)))
    renderers.register_renderer(RENDERER, lambda tokenizer, image_processor=None: template_renderer()(tokenizer))


def _served_folder(model: str) -> str:
    url = os.environ.get("TINKER_BASE_URL", "").rstrip("/")
    if not url:
        raise ConfigError("folder: give the folder of the tokenizer, or set TINKER_BASE_URL to a server that names it")
    told = str(capabilities(url).get("tokenizer_id") or "")
    if not os.path.isdir(told):
        raise ConfigError(
            f"folder: {url} names {told!r} for {model}, which is not a folder on this machine; give a copy as folder"
        )
    return told


@functools.cache
def template_renderer() -> type:
    """A renderer class of the cookbook that renders with the tokenizer's own chat template."""
    base: Any = import_module("tinker_cookbook.renderers.base")
    tinker: Any = import_module("tinker")
    torch: Any = import_module("torch")

    class TemplateRenderer(base.Renderer):
        """Prompts are those of the chat endpoint: the template's, whatever it does with earlier turns."""

        def __init__(self, tokenizer: Any):
            super().__init__(tokenizer)
            (self._end,) = self._ids("<|im_end|>")
            self._header = self._ids("<|im_start|>assistant\n")

        def get_stop_sequences(self) -> list[int]:
            return [self._end]

        def render_message(self, message: Any, ctx: Any) -> Any:
            raise NotImplementedError("the template renders whole conversations; use build_generation_prompt")

        def build_generation_prompt(self, messages: Any, role: str = "assistant", prefill: str | None = None) -> Any:
            ids = self._rendered(messages, prompt=True)
            return tinker.ModelInput.from_ints([*ids, *self._ids(prefill or "")])

        def build_supervised_example(self, messages: Any, train_on_what: Any = "last_assistant_message") -> Any:
            ids = self._rendered(messages, prompt=False)
            weights = [0.0] * len(ids)
            turns = spans(ids, self._header, self._end)
            answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
            opening = self._rendered(messages[: answers[-1]], prompt=True) if answers else []
            for number, (first, end) in zip(answers, turns, strict=True):
                if not self._trained(messages, number, base.TrainOnWhat(train_on_what)):
                    continue
                if number == answers[-1] and ids[: len(opening)] == opening:
                    first = len(opening)  # the prompt opens the thinking
                weights[first:end] = [1.0] * (end - first)
            last = max((end for _, end in turns), default=len(ids))  # what follows the end is never sampled
            return tinker.ModelInput.from_ints(ids[:last]), torch.tensor(weights[:last])

        def parse_response(self, response: list[int]) -> Any:
            message, termination = base.parse_response_for_stop_token(response, self.tokenizer, self._end)
            text = message["content"]
            thought, closed, answer = text.rpartition("</think>")
            calls, answer = tool_calls(answer.removeprefix("\n"))
            parts = [{"type": "thinking", "thinking": thought.removeprefix("<think>").strip("\n")}] if closed else []
            message["content"] = [*parts, {"type": "text", "text": answer}] if closed else answer
            if calls:
                bodies = [base.ToolCall.FunctionBody(name=name, arguments=json.dumps(given)) for name, given in calls]
                message["tool_calls"] = [base.ToolCall(function=body) for body in bodies]
            return message, termination

        def to_openai_message(self, message: Any) -> dict[str, Any]:
            return template_message(message)

        def _trained(self, messages: Any, number: int, what: Any) -> bool:
            kinds = base.TrainOnWhat
            if what == kinds.LAST_ASSISTANT_MESSAGE:
                return number == len(messages) - 1
            if what == kinds.LAST_ASSISTANT_TURN:
                return all(message["role"] != "user" for message in messages[number:])
            if what == kinds.ALL_ASSISTANT_MESSAGES:
                return True
            if what == kinds.CUSTOMIZED:
                return bool(messages[number].get("trainable"))
            raise NotImplementedError(f"{what} trains what the model never writes; train messages of the assistant")

        def _rendered(self, messages: Any, *, prompt: bool) -> list[int]:
            turns = [template_message(message) for message in messages]
            return self._ids(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt))

        def _ids(self, text: str) -> list[int]:
            return list(self.tokenizer.encode(text, add_special_tokens=False))

    return TemplateRenderer


def spans(ids: Sequence[int], header: Sequence[int], end: int) -> list[tuple[int, int]]:
    """First and last + 1 of each turn that a header begins, with the token that ends it."""
    found, at, size = [], 0, len(header)
    while at < len(ids):
        if list(ids[at : at + size]) == list(header):
            close = next((i for i in range(at + size, len(ids)) if ids[i] == end), len(ids) - 1)
            found.append((at + size, close + 1))
            at = close
        at += 1
    return found


def template_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message of the cookbook as chat templates read it."""
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    unknown = [part["type"] for part in parts if part["type"] not in ("text", "thinking")]
    if unknown:
        raise ConfigError(f"messages: a part is {unknown[0]}, but this model takes text only")
    out: dict[str, Any] = {"role": message["role"]}
    out["content"] = "".join(part["text"] for part in parts if part["type"] == "text")
    thoughts = [part["thinking"] for part in parts if part["type"] == "thinking"]
    if thoughts:
        out["reasoning_content"] = "".join(thoughts)
    if message.get("tool_calls"):
        functions = [call.function for call in message["tool_calls"]]
        calls = [{"name": function.name, "arguments": json.loads(function.arguments)} for function in functions]
        out["tool_calls"] = [{"type": "function", "function": call} for call in calls]
    return out | {name: message[name] for name in ("name", "tool_call_id") if message.get(name)}


def tool_calls(text: str) -> tuple[list[tuple[str, dict[str, Any]]], str]:
    """The calls in an answer, as names and arguments, and the text before them."""
    calls = []
    for name, body in _CALL.findall(text):
        calls.append((name.strip(), {key.strip(): _value(value) for key, value in _PARAMETER.findall(body)}))
    return calls, text.partition("<tool_call>")[0].rstrip("\n") if calls else text


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
