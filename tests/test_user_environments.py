"""Environments and tools of a user, played by hand and by step-tiny."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import user_code

from stepjax.errors import ConfigError
from stepjax.infer.load import load
from stepjax.infer.session import Session
from stepjax.train.config.rewards import RewardSettings
from stepjax.train.config.tune import DataSettings
from stepjax.train.data.coded import coded
from stepjax.train.data.prompts import Prompt
from stepjax.train.data.sources import open_source
from stepjax.train.environments.episode import Turn
from stepjax.train.environments.functions import FunctionTool, described_parameters
from stepjax.train.environments.stepped import ActionError, action_of, text_of
from stepjax.train.rollouts.failures import reward_record
from stepjax.train.rollouts.sampler import Rollout, Sampler
from stepjax.train.workers.code import CodeEpisode, UserCode, results_of
from stepjax.train.workers.plugin import UserCodeError

CODE = str(Path(__file__).parent / "user_code.py")
WAYS = RewardSettings(timeout_s=20.0, workers=1)
ROWS = [
    {"messages": [{"role": "user", "content": f"What is the weather in {city}?"}], "answer": "x", "item": city}
    for city in ("Paris", "Rome")
]


@pytest.fixture(scope="module")
def session() -> Session:
    return load("step-tiny")


@pytest.fixture
def rows(tmp_path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def own(name: str) -> str:
    return f"{CODE}:{name}"


def first(session: Session, settings: DataSettings, code: UserCode) -> Prompt:
    return coded("mine", open_source("mine", settings, session), code, session, split="train").row(0, 0)


def said(content: str = "", *calls: tuple[str, dict], finished: bool = True) -> Turn:
    return Turn("", content, tuple({"name": name, "arguments": arguments} for name, arguments in calls), finished)


def play(session: Session, settings: DataSettings, *turns: Turn) -> tuple[Prompt, list[Any], Any]:
    """The prompt, what follows each turn, and the reward of the environment."""
    with UserCode({"mine": settings}, WAYS) as code:
        prompt = first(session, settings, code)
        episode = prompt.new_environment()
        assert isinstance(episode, CodeEpisode)
        replies = [results_of([episode.respond(turn)])[0] for turn in turns]
        return prompt, replies, results_of([episode.reward()])[0]


def test_an_environment_with_a_tool_and_a_second_turn(session, rows):
    settings = DataSettings(kind="jsonl", path=str(rows), environment=own("Shop"), environment_options={"price": 7})
    prompt, replies, reward = play(session, settings, said("Hm."), said("", ("buy", {"item": "tea"})), said("Done."))
    assert prompt.messages[0]["content"] in ("Buy Paris.", "Buy Rome.")
    assert prompt.tools
    assert prompt.tools[0]["function"] == {
        "name": "buy",
        "description": "Buy something.",
        "parameters": {
            "type": "object",
            "properties": {"item": {"type": "string", "description": "what to buy"}},
            "required": ["item"],
            "additionalProperties": False,
        },
    }
    assert session.tokenizer
    assert "buy" in session.tokenizer.decode(prompt.ids)
    assert replies == [
        [{"role": "user", "content": "Please buy something."}],
        [{"role": "tool", "tool_call_id": "call_0", "content": "It costs 7."}],
        [],
    ]
    assert reward == {"total": 1.0, "parts": {"bought": 1.0, "cheap": 0.0}}


def test_what_a_tool_does_wrong_is_told_to_the_model(session, rows):
    """Unknown names, wrong arguments and exceptions are messages, as agents have it."""
    settings = DataSettings(kind="jsonl", path=str(rows), tool_functions=(own("lookup"), own("total")))
    turn = said(
        "",
        ("lookup", {"city": "Atlantis"}),
        ("lookup", {"town": "Paris"}),
        ("nothing", {}),
        ("total", {"values": [1, "2.5"]}),
        ("lookup", {"city": "Paris", "unit": "K"}),
        ("lookup", {"city": "Paris", "unit": "F"}),
    )
    prompt, (replies, last), reward = play(session, settings, turn, said("x"))
    assert prompt.messages == ROWS[prompt.index]["messages"]
    texts = [reply["content"] for reply in replies]
    assert texts[0] == "Error: KeyError: 'Atlantis'"
    assert "city" in texts[1]
    assert texts[1].startswith("Error: ")
    assert texts[2] == "Error: there is no tool 'nothing'; there are lookup, total"
    assert texts[3] == "3.5"
    assert "'C' or 'F'" in texts[4]
    assert texts[5] == "Paris: 20 F"
    assert [reply["tool_call_id"] for reply in replies] == [f"call_{number}" for number in range(6)]
    assert last == []
    assert reward["total"] == 1  # the row's answer, since nothing else rewards


def test_schemas_are_those_of_transformers():
    """What `transformers.utils.get_json_schema` makes of the same function, beside what JSON schema adds."""
    schema = FunctionTool(user_code.lookup, "tools").schema
    assert schema["function"]["description"] == "The temperature of a city."
    parameters = schema["function"]["parameters"]
    assert parameters["required"] == ["city"]
    assert parameters["properties"] == {
        "city": {"type": "string", "description": "Name of the city, in any language."},
        "unit": {"type": "string", "description": "Celsius or Fahrenheit.", "enum": ["C", "F"]},
    }
    array = FunctionTool(user_code.total, "tools").schema["function"]["parameters"]["properties"]["values"]
    assert array == {"type": "array", "items": {"type": "number"}, "description": "numbers"}
    assert described_parameters("One.\n\nTwo.") == ("One.\n\nTwo.", {})

    def untyped(city): ...

    def many(*cities: str): ...

    def odd(city: object()): ...  # type: ignore[valid-type]

    for function, reason in ((untyped, "has no type"), (many, "cannot be called by name"), (odd, "JSON schema|types")):
        with pytest.raises(ConfigError, match=reason):
            _ = FunctionTool(function, "tools").schema


def test_environments_with_reset_and_step(session):
    """OpenEnv's form with coroutines, and Gymnasium's with a discrete action and a seed."""
    settings = DataSettings(kind="environment", environment=own("Guess"))
    prompt, replies, reward = play(session, settings, said("2"), said("3"))
    assert [message["content"] for message in prompt.messages] == ["Guess.", "Guess a number."]
    assert replies == [[{"role": "user", "content": "Wrong."}], []]
    assert reward == {"total": 1.0, "parts": {"steps": 2.0, "ended": 1.0}}
    settings = DataSettings(kind="environment", environment=own("make_counter"))
    turns = [said("I take 2"), said("none"), said("9"), said("1"), said("1"), said("1")]
    prompt, replies, reward = play(session, settings, *turns)
    assert prompt.messages[0]["content"] == "Answer each message with one integer from 1 to 3."
    left = json.loads(prompt.messages[1]["content"])[0]
    assert replies[0] == [{"role": "user", "content": f"[{left - 2}]"}]
    assert replies[1][0]["content"] == "Error: expected one integer from 1 to 3"
    assert replies[2][0]["content"] == "Error: '9' is no action, expected one integer from 1 to 3"
    assert reward["total"] == 1


def test_actions_and_observations():
    class Box:
        dtype = np.float32

        def contains(self, action):
            return action.shape == (2,)

    np.testing.assert_array_equal(action_of("[1, 2]", Box()), np.asarray([1, 2], np.float32))
    for text in ("one", "[1]"):
        with pytest.raises(ActionError):
            action_of(text, Box())
    assert text_of({"text": "a", "reward": 1, "done": True}) == "a"
    assert json.loads(text_of({"a": np.float32(1), "b": np.ones(2)})) == {"a": 1.0, "b": [1.0, 1.0]}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Mute", r"it has no method respond\(turn\) and no tools that are functions"),
        ("Unsteady", "two episodes of one row and seed begin with other messages"),
        ("nothing", "has no 'nothing'"),
        ("exact", r"its parameter 'answer' is not offered"),
    ],
)
def test_environments_that_cannot_begin_are_refused(session, name, reason):
    settings = DataSettings(kind="environment", environment=own(name))
    with pytest.raises(ConfigError, match=reason):
        play(session, settings)


@pytest.mark.parametrize("library", ["gymnasium", "verifiers"])
def test_libraries_that_are_not_installed_are_named(library, tmp_path, monkeypatch, session):
    (tmp_path / f"{library}.py").write_text(f'raise ModuleNotFoundError("No module named {library}")')
    monkeypatch.syspath_prepend(tmp_path)
    settings = DataSettings(kind="environment", environment=f"{library}:Taxi-v3")
    with pytest.raises(ConfigError, match=rf"needs {library}; install the extra as pip install 'stepjax\[{library}\]'"):
        play(session, settings)


def answers(session: Session, settings: DataSettings, *, samples: int = 1) -> list[Rollout]:
    """Greedy answers of step-tiny to two prompts."""
    with UserCode({"mine": settings}, WAYS) as code:
        source = coded("mine", open_source("mine", settings, session), code, session, split="train")
        sampler = Sampler(session, slots=3, context=512, max_tokens=200, turns=4)
        prompts = [source.row(3, i) for i in range(2)]
        return sampler.run(session.params, prompts, samples=samples, seed=0, policy_step=0, greedy=True)


@pytest.mark.slow
def test_step_tiny_calls_tools_of_the_user(session, rows):
    """A file with tools and a reward, and an environment with prompts of its own: the same two turns."""
    settings = DataSettings(
        kind="jsonl", path=str(rows), tool_functions=own("weather"), reward={own("told"): 2.0, own("exact"): 1.0}
    )
    rollouts = answers(session, settings)
    assert session.tokenizer
    for rollout in rollouts:
        assert rollout.turns == 2
        assert rollout.parts == {"told/called": 1.0, "told/told": 1.0, "told/turns": 2.0, "exact": 0.0}
        assert rollout.reward == 8
        replied = [token for token, own_token in zip(rollout.ids, rollout.answer_mask, strict=True) if not own_token]
        assert "21" in session.tokenizer.decode(replied)
    record = reward_record(rollouts)
    assert record["reward/told/called"] == 1
    assert record["reward_failed"] == 0
    alone = answers(session, DataSettings(kind="environment", environment=own("Weather")))
    assert [rollout.parts for rollout in alone] == [{"told": 1.0, "test": 0.0}] * 2
    assert sorted(rollout.text for rollout in alone) == sorted(rollout.text for rollout in rollouts)


@pytest.mark.slow
def test_an_environment_that_fails_ends_its_episode(session):
    rollouts = answers(session, DataSettings(kind="environment", environment=own("Broken")), samples=2)
    for rollout in rollouts:
        assert rollout.failure.startswith(
            "data.mine.environment: user_code.py:Broken failed: RuntimeError: no reply (user_code.py:"
        )
        assert np.isnan(rollout.reward)
    assert reward_record(rollouts) == {"reward_failed": 4}


def test_the_episodes_of_a_process_that_ends_fail(session, rows):
    settings = DataSettings(kind="jsonl", path=str(rows), tool_functions=own("lookup"), reward=own("dies"))
    with UserCode({"mine": settings}, WAYS) as code:
        prompt = first(session, settings, code)
        episode = prompt.new_environment()
        assert isinstance(episode, CodeEpisode)
        assert prompt.code
        results_of([prompt.code.reward(prompt.code.rewards[0], {"answer": ""})])
        (reply,) = results_of([episode.respond(said("", ("lookup", {"city": "Paris"})))])
        assert isinstance(reply, UserCodeError)
        assert "its process ended with code 7" in str(reply)
        assert results_of([episode.close()]) == [None]
        again = prompt.new_environment()
        assert isinstance(again, CodeEpisode)
        assert results_of([again.respond(said(""))]) == [[]]


@pytest.fixture
def fake_verifiers(tmp_path, monkeypatch):
    """The interface of the library, whether it is installed or not; worker processes look in the same places."""
    shutil.copy(Path(__file__).parent / "fake_verifiers.py", tmp_path / "verifiers.py")
    monkeypatch.syspath_prepend(tmp_path)


def verifier(**options) -> DataSettings:
    return DataSettings(kind="environment", environment="verifiers:echo", environment_options=options)


@pytest.mark.slow
def test_an_environment_of_verifiers_plays_its_own_rollout(session, fake_verifiers):
    prompt, replies, reward = play(session, verifier(), said("I say a and b"), said("a b", finished=False))
    word = prompt.messages[0]["content"].removeprefix("Say ").removesuffix(".")
    assert word in "ab"
    assert replies == [[{"role": "user", "content": "More?"}], []]
    assert reward == {"total": 1.2, "parts": {"told": 1.0, "turns": 2.0}}
    # out of room after one turn: the request that is open is refused, and what there is is scored
    reward = play(session, verifier(), said("a b"))[2]
    assert reward == {"total": pytest.approx(0.1), "parts": {"told": 0.0, "turns": 1.0}}


@pytest.mark.slow
def test_what_verifiers_would_hide_is_told(session, fake_verifiers):
    """An exception in a rubric is no 0, and earlier messages cannot change."""
    reward = play(session, verifier(fails=True), said("a b"), said("a b"))[2]
    assert isinstance(reward, UserCodeError)
    assert re.search(r"turns: ZeroDivisionError: division by zero \(verifiers\.py:\d+\)", str(reward))
    replies = play(session, verifier(rewrites=True), said("a b"))[1]
    assert "its next request changes earlier messages" in str(replies[0])
    with pytest.raises(ConfigError, match="scores all answers to a prompt together"):
        play(session, verifier(grouped=True))
    missing = DataSettings(kind="environment", environment="verifiers:other")
    with pytest.raises(ConfigError, match="verifiers:other: cannot be loaded: ValueError: Could not import 'other'"):
        play(session, missing)


REAL = '''
import verifiers as vf
from datasets import Dataset

def shout(text: str) -> str:
    """Say it loudly.

    Args:
        text: what to say
    """
    return text.upper()

def told(completion, answer):
    return answer in completion[-1].content

def load_environment(times: int = 1):
    rows = Dataset.from_list([{"question": "Shout a.", "answer": "A"}])
    return vf.ToolEnv(dataset=rows, rubric=vf.Rubric(funcs=[told], weights=[float(times)]), tools=[shout])
'''


@pytest.mark.skipif(importlib.util.find_spec("verifiers") is None, reason="verifiers is not installed")
def test_the_real_verifiers(session, tmp_path, monkeypatch):
    (tmp_path / "vf_shout.py").write_text(REAL)
    # tests/agents.py hides the package `agents`, which the library needs
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(entry for entry in sys.path if Path(entry).name != "tests")])
    settings = DataSettings(kind="environment", environment="verifiers:vf-shout", environment_options={"times": 2})
    prompt, replies, reward = play(session, settings, said("", ("shout", {"text": "a"})), said("It says A."))
    assert prompt.tools
    assert prompt.tools[0]["function"]["name"] == "shout"
    assert replies == [[{"role": "tool", "tool_call_id": "call_0", "content": "A"}], []]
    assert reward["total"] == 2
    assert reward["parts"]["told"] == 1


@pytest.mark.skipif(importlib.util.find_spec("gymnasium") is None, reason="gymnasium is not installed")
def test_the_real_gymnasium(session):
    settings = DataSettings(
        kind="environment", environment="gymnasium:FrozenLake-v1", environment_options={"is_slippery": False}
    )
    prompt, replies, reward = play(session, settings, said("1"), said("1"), said("7"))
    assert [message["content"] for message in prompt.messages] == [
        "Answer each message with one integer from 0 to 3.",
        "0",
    ]
    assert [reply[0]["content"] for reply in replies[:2]] == ["4", "8"]
    assert "no action" in replies[2][0]["content"]
    assert reward == {"total": 0.0, "parts": {"steps": 2.0, "ended": 0.0}}
