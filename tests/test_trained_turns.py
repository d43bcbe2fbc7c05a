"""Which tokens of a conversation are trained: those that the model would have written at each turn, and no others."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from bad_rows import ANSWER, TOOLS, USER

from stepjax.errors import ConfigError
from stepjax.infer.load import load
from stepjax.infer.session import Session
from stepjax.train.config.tune import DataSettings
from stepjax.train.data.forms.table import read_content
from stepjax.train.data.prompts import Prompt
from stepjax.train.data.sources import FileSource
from stepjax.train.data.turns import trained_sequences, trained_turns, turn_ids
from stepjax.train.rollouts.sampler import data_rollouts


@pytest.fixture(scope="module")
def session() -> Session:
    return load("step-tiny")


def prompts_of(tmp_path: Path, session: Session, *rows: dict[str, Any], **settings: Any) -> list[Prompt]:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    source = FileSource("rows", DataSettings(path=str(file), **settings), session)
    return [source.line(number) for number in range(len(rows))]


def text_of(session: Session, prompt: Prompt) -> list[tuple[str, str]]:
    """Of each sequence the text that is read, and the parts that are trained."""
    assert session.tokenizer is not None
    texts = []
    for rollout in data_rollouts(prompt, group=0):
        ids = [token if trained else None for token, trained in zip(rollout.ids, rollout.answer_mask, strict=True)]
        parts: list[list[int]] = [[]]
        for token in ids:
            if token is not None:
                parts[-1].append(token)
            elif parts[-1]:
                parts.append([])
        decoded = [session.tokenizer.decode(part, skip_special=False) for part in parts if part]
        texts.append((session.tokenizer.decode(rollout.prompt.ids, skip_special=False), " ¦ ".join(decoded)))
    return texts


def turn(text: str, reasoning: str | None = None, **fields: Any) -> dict[str, Any]:
    thinking = {} if reasoning is None else {"reasoning_content": reasoning}
    return {"role": "assistant", "content": text, **thinking, **fields}


def call(number: int, reasoning: str | None = None) -> dict[str, Any]:
    function = {"name": "add", "arguments": {"x": number}}
    calls = [{"id": f"c{number}", "type": "function", "function": function}]
    return turn("", reasoning, tool_calls=calls)


def result(number: int) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"c{number}", "content": str(number)}


def conversation(rng: random.Random) -> list[dict[str, Any]]:
    """Some turns, with thinking, system texts and loops of tools."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": "Be kind."}] if rng.random() < 0.5 else []
    for question in range(rng.randint(1, 4)):
        messages.append({"role": "user", "content": f"question {question}"})
        for number in range(rng.choice([0, 0, 1, 3])):
            messages += [
                call(10 * question + number, rng.choice([None, "hm", "let me see"])),
                result(10 * question + number),
            ]
        messages.append(turn(f"answer {question}", rng.choice([None, "", "so\nit is"])))
    for message in messages:
        if message["role"] == "assistant" and rng.random() < 0.5:
            message["weight"] = rng.choice([0, 1])
    return messages


def test_the_trained_tokens_are_those_of_each_turn(session):
    """The slow twin renders each turn on its own, after the prompt that inference would show."""
    rng = random.Random(0)
    for _ in range(25):
        _, content = read_content({"messages": conversation(rng), "tools": TOOLS})
        for train_on in ("all", "marked"):
            try:
                turns = trained_turns(content, train_on)
            except ValueError:
                continue
            expected: Counter[tuple[tuple[int, ...], tuple[int, ...]]] = Counter()
            for number in turns:
                prompt, ids = turn_ids(
                    session, content.messages[:number], content.messages[number], tools=content.tools
                )
                expected.update((prompt + ids[:place], ids[place : place + 1]) for place in range(len(ids)))
            found: Counter[tuple[tuple[int, ...], tuple[int, ...]]] = Counter()
            for sequence in trained_sequences(session, content.messages, turns, tools=content.tools):
                whole = sequence.prompt + sequence.ids
                assert len(sequence.mask) == len(sequence.ids)
                for place in (place for place, trained in enumerate(sequence.mask) if trained):
                    end = len(sequence.prompt) + place
                    found[whole[:end], whole[end : end + 1]] += 1
            assert found == expected  # each token once, after exactly what inference would have read


def test_a_loop_of_tools_is_one_sequence_and_a_new_question_begins_another(session, tmp_path):
    messages = [
        USER,
        call(1, "add it"),
        result(1),
        turn("5", "so"),
        {"role": "user", "content": "And 1 + 1?"},
        turn("2"),
    ]
    (prompt,) = prompts_of(tmp_path, session, {"messages": messages, "tools": TOOLS}, train_on="all")
    (read, trained), (after, last) = text_of(session, prompt)
    assert read.endswith("What is 2 + 3?<|im_end|>\n<|im_start|>assistant\n<think>\n")
    one, two = trained.split(" ¦ ")
    assert one.startswith("add it\n</think>\n<tool_call>\n<function=add>\n")
    assert two == "so\n</think>\n5<|im_end|>"
    assert "<|im_start|>assistant\n5<|im_end|>" in after  # the thinking of the past turn is not shown
    assert last == "\n</think>\n2<|im_end|>"


def test_the_last_turn_is_trained_unless_the_settings_say_more(session, tmp_path):
    row = {"messages": [USER, turn("5"), USER, turn("6")]}
    (prompt,) = prompts_of(tmp_path, session, row)
    assert [trained for _, trained in text_of(session, prompt)] == ["\n</think>\n6<|im_end|>"]
    assert prompt.completion is not None
    marked = {"messages": [USER, turn("5", weight=1), USER, turn("6", weight=0)]}
    (prompt,) = prompts_of(tmp_path, session, marked, train_on="marked")
    assert [trained for _, trained in text_of(session, prompt)] == ["\n</think>\n5<|im_end|>"]
    assert prompt.ids == tuple(session.encode_chat([USER, turn("5"), USER]))  # what a new answer replies to
    (prompt,) = prompts_of(tmp_path, session, {"messages": [USER, turn("5"), USER]}, train_on="all")
    assert [trained for _, trained in text_of(session, prompt)] == ["\n</think>\n5<|im_end|>"]
    (prompt,) = prompts_of(tmp_path, session, {"messages": [USER]}, train_on="all")
    with pytest.raises(ConfigError, match=r"rows.jsonl:1: has no completion to learn from"):
        data_rollouts(prompt, group=0)


CHAT = "<|im_start|>user\nWhat is 2 + 3?<|im_end|>\n<|im_start|>assistant\n<think>\n"


@pytest.mark.parametrize(
    ("row", "read", "trained"),
    [
        ({"messages": [USER, ANSWER]}, CHAT, "\n</think>\n5<|im_end|>"),
        ({"messages": [USER, {**ANSWER, "reasoning": "2+3"}]}, CHAT, "2+3\n</think>\n5<|im_end|>"),
        ({"messages": [USER, turn("<think>\n2+3\n</think>\n5")]}, CHAT, "2+3\n</think>\n5<|im_end|>"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "What is 2 + 3?"}]}, ANSWER]},
            CHAT,
            "\n</think>\n5<|im_end|>",
        ),
        ({"prompt": [USER], "completion": [ANSWER]}, CHAT, "\n</think>\n5<|im_end|>"),
        ({"prompt": [USER], "completion": "5"}, CHAT, "\n</think>\n5<|im_end|>"),
        (
            {"conversations": [{"from": "human", "value": "What is 2 + 3?"}, {"from": "gpt", "value": "5"}]},
            CHAT,
            "\n</think>\n5<|im_end|>",
        ),
        ({"conversations": [USER, ANSWER]}, CHAT, "\n</think>\n5<|im_end|>"),
        ({"instruction": "What is 2 + 3?", "input": "", "output": "5"}, CHAT, "\n</think>\n5<|im_end|>"),
        (
            {"instruction": "Add.", "input": "2 + 3", "output": "5", "system": "Be kind.", "history": [["a", "b"]]},
            "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\na<|im_end|>\n"
            "<|im_start|>assistant\nb<|im_end|>\n"
            "<|im_start|>user\nAdd.\n\n2 + 3<|im_end|>\n<|im_start|>assistant\n<think>\n",
            "\n</think>\n5<|im_end|>",
        ),
        ({"prompt": "2 + 3 =", "completion": " 5"}, "2 + 3 =", " 5<｜end▁of▁sentence｜>"),
        ({"text": "2 + 3 = 5"}, "", "2 + 3 = 5<｜end▁of▁sentence｜>"),
    ],
)
def test_every_form_says_the_same(session, tmp_path, row, read, trained):
    (prompt,) = prompts_of(tmp_path, session, {**row, "source": "mine"})
    assert session.tokenizer is not None
    bos = session.tokenizer.decode([session.tokenizer.special.bos], skip_special=False)
    assert text_of(session, prompt) == [(bos + read, trained)]
    assert prompt.row["source"] == "mine"


def test_calls_may_be_text_or_bare_and_sharegpt_has_them_too(session, tmp_path):
    function = {"name": "add", "arguments": {"x": 2}}
    calls = [
        [{"id": "a", "type": "function", "function": {**function, "arguments": '{"x": 2}'}}],
        [{"id": "a", "type": "function", "function": function}],
        [function],
        json.dumps([function]),
    ]
    rows = [
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": c}], "tools": TOOLS} for c in calls
    ]
    rows.append({**rows[0], "tools": json.dumps([TOOLS[0]["function"]])})
    turns = [{"from": "human", "value": "What is 2 + 3?"}, {"from": "function_call", "value": json.dumps(function)}]
    rows.append({"conversations": turns, "tools": json.dumps(TOOLS)})
    prompts = prompts_of(tmp_path, session, *rows)
    assert len({(prompt.ids, prompt.completion) for prompt in prompts}) == 1


def test_columns_are_named_by_the_settings(session, tmp_path):
    row = {"question": "2 + 3 =", "meta": {"gold": "5"}, "text": "more"}
    (prompt,) = prompts_of(tmp_path, session, row, columns={"prompt": "question", "answer": "meta.gold"})
    assert prompt.row == {**row, "prompt": "2 + 3 =", "answer": "5"}
    assert prompt.ids == tuple(session.encode("2 + 3 ="))
    with pytest.raises(ConfigError, match=r"rows.jsonl:1: has no column 'query'; it has 'meta', 'question', 'text'"):
        prompts_of(tmp_path, session, row, columns={"prompt": "query"})
    with pytest.raises(ConfigError, match="columns has 'ask', expected names of answer, completion"):
        prompts_of(tmp_path, session, row, columns={"ask": "question"})
