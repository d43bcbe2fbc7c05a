"""The generated tasks: the splits, the answers and the grading."""

from __future__ import annotations

import copy
import itertools
import json
import re
from typing import Any

import numpy as np
import pytest

from stepjax.train.data import tasks, tools as toolbox, words

SPLITS: tuple[words.Split, ...] = ("train", "test")


def items(split: words.Split, count: int = 60, seed: int = 0) -> list[tasks.Item]:
    rng = np.random.default_rng(seed)
    return [tasks.make(task, rng, split) for task in tasks.MIX for _ in range(count)]


def parse(completion: str) -> tuple[str, str, list[dict[str, Any]]]:
    """A completion in the strict form that the targets have; integers stay text."""
    reasoning, _, rest = completion.removesuffix("<|im_end|>").partition("\n</think>\n")
    content, *blocks = rest.split("<tool_call>\n")
    calls = []
    for block in blocks:
        arguments = dict(re.findall(r"<parameter=(.+?)>\n(.*?)\n</parameter>\n", block, re.DOTALL))
        calls.append({"name": re.findall(r"<function=(.+?)>", block)[0], "arguments": arguments})
    return reasoning, content, calls


def typed(calls: list[dict[str, Any]], schemas: list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    kinds = {s["function"]["name"]: s["function"]["parameters"]["properties"] for s in schemas or []}
    for call in calls:
        for key, value in call["arguments"].items():
            if kinds[call["name"]][key]["type"] == "integer":
                call["arguments"][key] = int(value)
    return calls


@pytest.mark.parametrize("task", tasks.MIX)
def test_items_repeat_with_the_generator(task: str) -> None:
    first, second = ([tasks.make(task, rng, "train") for _ in range(20)] for rng in map(np.random.default_rng, (5, 5)))
    assert first == second
    assert tasks.make(task, np.random.default_rng(6), "train") not in first


def test_shares_sum_to_one_and_draw_follows_them() -> None:
    assert sum(tasks.MIX.values()) == pytest.approx(1.0)
    rng = np.random.default_rng(0)
    drawn = [tasks.draw(rng, "train").task for _ in range(3000)]
    for task, share in tasks.MIX.items():
        assert drawn.count(task) / 3000 == pytest.approx(share, abs=4 * (share / 3000) ** 0.5)


def test_splits_are_symmetric_and_both_populated() -> None:
    for a, b in itertools.product(range(0, 400, 7), repeat=2):
        assert words.pair_split(a, b) == words.pair_split(b, a)
    rng = np.random.default_rng(0)
    for split in SPLITS:
        for _ in range(200):
            word = words.word(rng, split)
            assert words.word_split(word) == words.word_split(word[::-1]) == words.word_split(word.upper()) == split
            assert words.word_split(words.city(rng, split)) == words.word_split(words.symbol(rng, split)) == split
    shares = [words.word_split(city) == "test" for city in words.CITIES]
    assert len(words.CITIES) == len(set(words.CITIES)) >= 400
    assert 40 <= sum(shares) <= 0.2 * len(shares)
    assert words.pair_split(467, 358) == words.word_split("hello") == words.word_split("Havana") == "test"


def test_no_operands_or_words_are_shared_between_the_splits() -> None:
    seen: dict[words.Split, set[object]] = {}
    for split in SPLITS:
        found = seen.setdefault(split, set())
        for item in items(split, count=150):
            asked = [m["content"] for m in item.messages if m["role"] == "user"]  # earlier questions count as seen too
            for text in asked:
                numbers = [int(n) for n in re.findall(r"\d+", text)]
                if item.task in ("add", "sub", "compare") and len(numbers) == 2 and '"' not in text:
                    found.add(tuple(sorted(numbers)))
            if item.task in ("reverse", "copy"):
                found.add(min(item.answer.lower(), item.answer.lower()[::-1]))
    assert min(map(len, seen.values())) > 400
    assert not seen["train"] & seen["test"]


@pytest.mark.parametrize("split", SPLITS)
def test_arithmetic_is_right(split: words.Split) -> None:
    rng = np.random.default_rng(1)
    for _ in range(300):
        for task in ("add", "sub", "compare"):
            item = tasks.make(task, rng, split)
            question = item.messages[-1]["content"]
            a, b = (int(n) for n in re.findall(r"\d+", question))
            a, b = (b, a) if "ubtract" in question else (a, b)
            assert item.answer == str({"add": a + b, "sub": a - b, "compare": max(a, b)}[task])
            if task != "compare":  # the trace's results, last column first, are the answer
                trace = item.target["reasoning_content"]
                digits = "".join(re.findall(r"=(\d)", trace)[::-1])
                digits = ("1" if task == "add" and trace.endswith("carry 1") else "") + digits
                assert int(digits) == int(item.answer)


@pytest.mark.parametrize("split", SPLITS)
def test_tools_are_varied_and_valid(split: words.Split) -> None:
    assert len(toolbox.TOOLS) >= 12
    assert len({key for tool in toolbox.TOOLS for key in tool.parameters}) >= 12
    rng = np.random.default_rng(2)
    for _ in range(400):
        tool, schemas = toolbox.offer(rng, split)
        functions = {schema["function"]["name"]: schema["function"]["parameters"] for schema in schemas}
        assert 1 <= len(functions) == len(schemas) <= 3
        given = toolbox.arguments(rng, tool, split)
        assert list(given) == functions[tool.name]["required"] == list(functions[tool.name]["properties"])
        for key, value in given.items():
            expected = "integer" if isinstance(value, int) else "string"
            assert functions[tool.name]["properties"][key]["type"] == expected
            if tool.parameters[key] in ("city", "name", "word", "symbol"):
                assert words.word_split(str(value)) == split
        returned, answer = toolbox.respond(rng, tool, given, split)
        assert json.loads(returned)
        assert "{" not in answer


@pytest.mark.parametrize("split", SPLITS)
def test_grading_accepts_the_target_and_nothing_near_it(split: words.Split, template: tasks.TinyTemplate) -> None:
    for item in items(split):
        reasoning, content, calls = parse(tasks.render(item, template)[1])
        calls = typed(calls, item.tools)
        assert tasks.grade(item, reasoning, content, calls)
        assert tasks.grade(item, "", content, calls)  # only the answer counts
        assert tasks.grade(item, reasoning, content, item.target.get("tool_calls", []))
        assert not tasks.grade(item, reasoning, content + "1", calls)
        if content:
            assert not tasks.grade(item, reasoning, content[:-1], calls)
            assert not tasks.grade(item, reasoning, content, [{"name": "get_time", "arguments": {}}])
        else:
            assert not tasks.grade(item, reasoning, content, [])
            assert not tasks.grade(item, reasoning, content, calls * 2)
            for key, value in calls[0]["arguments"].items():
                wrong = copy.deepcopy(calls)
                wrong[0]["arguments"][key] = value + 1 if isinstance(value, int) else value[:-1]
                assert not tasks.grade(item, reasoning, content, wrong)
                wrong[0]["arguments"][key] = str(value) if isinstance(value, int) else value.swapcase()
                assert not tasks.grade(item, reasoning, content, wrong)
