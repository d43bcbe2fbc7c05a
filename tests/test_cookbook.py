"""The chat format for the Tinker cookbook: what of it needs no cookbook. tests/test_tinker.py runs the rest."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from stepjax.errors import ConfigError
from stepjax.train.cookbook import register, spans, template_message, tool_calls


def test_turns_are_found_in_a_rendered_conversation(step_tiny):
    """What the assistant writes, with the token that ends it, and nothing of the others' turns."""
    turns = [
        {"role": "user", "content": "What is 1 + 2?"},
        {"role": "assistant", "content": "3"},
        {"role": "user", "content": "And 4?"},
        {"role": "assistant", "content": "7"},
    ]
    tokenizer = step_tiny.tokenizer
    end = tokenizer.controls["<|im_end|>"]
    header = [tokenizer.controls["<|im_start|>"], *tokenizer.encode("assistant\n")]
    ids = step_tiny.encode_chat(turns)
    found = spans(ids, header, end)
    texts = [tokenizer.decode(ids[first:last]) for first, last in found]
    assert len(texts) == 3  # with the prompt of the next answer, which nothing ends
    assert texts[0] == "3"
    assert texts[1].endswith("7")
    assert [ids[last - 1] for _, last in found[:2]] == [end, end]


def test_messages_of_the_cookbook_are_the_template_s():
    call = SimpleNamespace(function=SimpleNamespace(name="f", arguments='{"a": 3}'))
    message = {
        "role": "assistant",
        "content": [{"type": "thinking", "thinking": "so"}, {"type": "text", "text": "yes"}],
        "tool_calls": [call],
    }
    assert template_message(message) == {
        "role": "assistant",
        "content": "yes",
        "reasoning_content": "so",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": 3}}}],
    }
    with pytest.raises(ConfigError, match="image"):
        template_message({"role": "user", "content": [{"type": "image", "image": "x"}]})


def test_calls_are_read_from_an_answer():
    arguments = "<parameter=a>\n3\n</parameter>\n<parameter=b>\nx y\n</parameter>\n"
    text = f"look\n<tool_call>\n<function=f>\n{arguments}</function>\n</tool_call>"
    assert tool_calls(text) == ([("f", {"a": 3, "b": "x y"})], "look")
    assert tool_calls("no call") == ([], "no call")


def test_a_tokenizer_that_is_not_here_is_told(monkeypatch):
    monkeypatch.delenv("TINKER_BASE_URL", raising=False)
    with pytest.raises(ConfigError, match="give the folder"):
        register("step-tiny")
