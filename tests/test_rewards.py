"""Rewards of a user: they run in processes, may fail in any way, and what they return is read strictly."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stepjax import memory
from stepjax.errors import ConfigError
from stepjax.train.config.reader import read_settings, write_settings
from stepjax.train.config.rewards import RewardSettings
from stepjax.train.config.tune import DataSettings, TuneConfig
from stepjax.train.plugins.reference import anchored
from stepjax.train.rewards.answer import RewardAnswer, RewardPrompt
from stepjax.train.rewards.value import RewardValueError, parts_of
from stepjax.train.workers import pool
from stepjax.train.workers.code import UserCode, results_of
from stepjax.train.workers.plugin import UserCodeError

CODE = str(Path(__file__).parent / "user_code.py")
ANSWER = RewardAnswer(text="5", ids=[1, 2])
PROMPT = RewardPrompt(messages=[{"role": "user", "content": "2 + 3"}], text="2 + 3", question="2 + 3")
VALUES = {"prompt": PROMPT, "answer": ANSWER, "row": {"answer": "5"}, "source": "mine"}


def source(*names: str, **changes) -> DataSettings:
    return DataSettings(kind="jsonl", path="rows.jsonl", reward=tuple(f"{CODE}:{name}" for name in names), **changes)


def graded(*names: str, timeout_s: float = 20.0, workers: int = 1, values=VALUES, times: int = 1):
    """The results of each reward, ``times`` times."""
    with UserCode({"mine": source(*names)}, RewardSettings(timeout_s=timeout_s, workers=workers)) as code:
        mine = code.of_source("mine")
        assert mine
        futures = [mine.reward(reward, values) for _ in range(times) for reward in mine.rewards]
        return results_of(futures)


GOOD = {
    "exact": (1.0, {}),
    "parts": (6.0, {"length": 1.0, "asked": 5.0}),
    "totalled": (0.25, {"right": 1.0}),
    "everything": (1.0, {}),
    "Judge": (1.0, {}),
    "greedy_writer": (2.0, {}),
    "numpy_scalar": (0.5, {}),
    "array_0d": (0.5, {}),
    "decimal": (0.5, {}),
    "talker": (0.5, {}),
    "forks": (1.0, {}),
}
BAD = {
    "raises": r"ZeroDivisionError: division by zero \(user_code\.py:\d+\)",
    "leaves": r"SystemExit: 3 \(user_code\.py:\d+\)",
    "interrupts": r"Pressed: now \(user_code\.py:\d+\)",
    "none": "the reward is None of type NoneType, expected a number",
    "nan": "the reward is nan, expected a finite number",
    "infinite": "part 'b' of the reward is inf",
    "text": "the reward is 'True' of type str, expected a number",
    "vector": "the reward is array",
    "empty": "expected a number or a table of named numbers",
    "dies": "its process ended with code 7",
}


def test_what_rewards_return_is_read():
    """One process runs them all, twice: none changes what the others are given."""
    results = graded(*GOOD, times=2)
    for name, result in zip(GOOD, results, strict=False):
        assert (result["total"], result["parts"]) == GOOD[name], name
    again = dict(zip(GOOD, results[len(GOOD) :], strict=True))
    assert again.pop("Judge")["total"] == 2  # one instance
    assert {name: (result["total"], result["parts"]) for name, result in again.items()} == {
        name: value for name, value in GOOD.items() if name != "Judge"
    }
    assert ANSWER.messages == []


def test_a_reward_that_fails_says_why_and_hurts_no_other():
    results = graded(*BAD, "exact")
    for (name, reason), result in zip(BAD.items(), results, strict=False):
        assert isinstance(result, UserCodeError), name
        assert re.search(reason, str(result)), (name, str(result))
    assert results[-1]["total"] == 1


def test_what_takes_too_long_is_ended():
    """A plain function that hangs, a coroutine that waits, and one that will not be cancelled."""
    began = time.monotonic()
    hanging = {**VALUES, "answer": RewardAnswer(text="hang")}
    results = graded("hangs", "waits_forever", "will_not_stop", "exact", timeout_s=0.4, values=hanging)
    assert [str(result) for result in results[:3]] == ["no result within 0.4 s"] * 3
    assert results[3]["total"] == 0
    assert time.monotonic() - began < 20


def test_coroutines_run_at_the_same_time(tmp_path):
    """Twenty that wait for each other, in one process."""
    file = tmp_path / "together.py"
    file.write_text(
        "import asyncio\n"
        "arrived = asyncio.Barrier(20)\n"
        "async def meet(answer):\n"
        "    await arrived.wait()\n"
        "    return 1\n"
    )
    settings = DataSettings(kind="jsonl", path="x", reward=f"{file}:meet")
    with UserCode({"mine": settings}, RewardSettings(timeout_s=20.0, workers=1)) as code:
        mine = code.of_source("mine")
        assert mine
        results = results_of([mine.reward(mine.rewards[0], VALUES) for _ in range(20)])
    assert [result["total"] for result in results] == [1.0] * 20


def test_processes_end_with_the_run():
    with UserCode({"mine": source("exact")}, RewardSettings(workers=2)) as code:
        pool = code._pool
        assert pool
        processes = [process.popen for process in pool._processes]
    assert all(process.poll() is not None for process in processes)


@pytest.mark.slow
def test_a_hung_reward_does_not_hold_up_the_end(tmp_path):
    """The command ends although its last reward never does, and leaves no process."""
    script = f"""
import sys
from stepjax.train.config.rewards import RewardSettings
from stepjax.train.config.tune import DataSettings
from stepjax.train.rewards.answer import RewardAnswer
from stepjax.train.workers.code import UserCode

code = UserCode(
    {{"mine": DataSettings(kind="jsonl", path="x", reward={CODE + ":hangs"!r})}}, RewardSettings(workers=1)
)
mine = code.of_source("mine")
mine.reward(mine.rewards[0], {{"answer": RewardAnswer(text="hang")}})
print(code._pool._processes[0].popen.pid)
"""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True, env=environment
    )
    deadline = time.monotonic() + 20
    while Path(f"/proc/{done.stdout.strip()}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{done.stdout.strip()}").exists()


LOADING = {
    "user_code.py:exct": r"has no 'exct'; it defines .*exact.*Did you mean exact\?",
    "missing.py:exact": r"missing\.py: no such file; a relative path is looked for beside the settings file",
    "user_code.py:not_callable": "is int 3, expected a function",
    "user_code.py:positional": r"its parameter 'answer' is positional only; it may take prompt",
    "user_code.py:trl": r"its parameter 'prompts' is not offered \(take prompt\.messages, of one prompt a call\)",
    "syntax.py:exact": r"syntax\.py cannot be loaded: SyntaxError: .*\(syntax\.py:2\)",
    "imports.py:exact": r"cannot be loaded: ModuleNotFoundError: No module named 'nowhere_at_all' \(imports\.py:2\)",
    "ends.py:exact": r"cannot be loaded: SystemExit: 4 \(ends\.py:2\)",
    "unmade.py:Judge": r"cannot be made without arguments: TypeError.*model",
    "no_such_package.rewards:exact": r"there is no module 'no_such_package'; install its package",
    "no_entry_point": r"'no_entry_point' is no entry point of stepjax\.rewards",
    "user_code.py:": r"is '.*user_code\.py:', expected FILE\.py:NAME",
    "two words": "expected FILE.py:NAME",
}


@pytest.mark.parametrize("reference", LOADING)
def test_what_cannot_be_loaded_is_refused_before_the_run(reference, tmp_path):
    (tmp_path / "syntax.py").write_text("x = 1\ndef exact(:\n")
    (tmp_path / "imports.py").write_text("x = 1\nimport nowhere_at_all\n")
    (tmp_path / "ends.py").write_text("import sys\nsys.exit(4)\n")
    (tmp_path / "unmade.py").write_text(
        "class Judge:\n    def __init__(self, model): ...\n    def __call__(self): ...\n"
    )
    name = reference.replace("user_code.py", CODE)
    name = anchored(name, tmp_path)
    if reference in ("user_code.py:", "two words"):
        if reference == "two words":
            name = "two:words here"
        with pytest.raises(ConfigError, match=r"data\.reward: is .* expected FILE\.py:NAME"):
            DataSettings(kind="jsonl", path="x", reward=name)
        return
    settings = DataSettings(kind="jsonl", path="x", reward=name)
    with pytest.raises(ConfigError, match=LOADING[reference]) as error:
        UserCode({"mine": settings}, RewardSettings(workers=1))
    assert str(error.value).startswith("data.mine.reward: ")


TOML = """
verb = "rl"
[data.mine]
kind = "jsonl"
path = "rows.jsonl"
reward = {REWARD}
[loss]
objective = "grpo"
[rollout]
samples = 2
"""


def read(folder: Path, reward: str, *overrides: str) -> TuneConfig:
    file = folder / "settings.toml"
    file.write_text(TOML.replace("{REWARD}", reward))
    return read_settings(TuneConfig, file, overrides)


def test_files_are_found_beside_the_settings_and_then_in_the_working_directory(tmp_path, monkeypatch):
    beside, here = tmp_path / "beside", tmp_path / "here"
    for folder in (beside, here):
        folder.mkdir()
        (folder / "both.py").touch()
    (here / "only_here.py").touch()
    monkeypatch.chdir(here)
    config = read(beside, '{"both.py:a" = 1.0, "only_here.py:b" = 0.5, "package.module:c" = 2}')
    assert config.data["mine"].reward_weights == {
        f"{beside}/both.py:a": 1.0,
        f"{here}/only_here.py:b": 0.5,
        "package.module:c": 2.0,
    }
    changed = read(beside, '"both.py:a"', 'data.mine.reward="both.py:a"')
    assert changed.data["mine"].reward == f"{here}/both.py:a"
    write_settings(config, tmp_path / "again.toml")
    assert read_settings(TuneConfig, tmp_path / "again.toml") == config


def test_three_forms_of_the_setting(tmp_path):
    assert read(tmp_path, '"a.b:c"').data["mine"].reward_weights == {"a.b:c": 1.0}
    assert read(tmp_path, '["a.b:c", "a.b:d"]').data["mine"].reward_weights == {"a.b:c": 1.0, "a.b:d": 1.0}
    for wrong in ("3", "[1]", '{"a.b:c" = "much"}', '["a.b:c", "a.b:c"]', '{"a.b:c" = nan}', '"a b:c"'):
        with pytest.raises(ConfigError, match=r"data\.(mine\.)?reward"):
            read(tmp_path, wrong)


def test_contradictions_are_refused():
    for changes, reason in (
        ({"kind": "environment"}, "needs environment"),
        ({"kind": "environment", "environment": "a:b", "path": "x"}, "expected a path for a file and none"),
        ({"environment": "a:b", "tool_functions": "a:c"}, "both environment and tool_functions"),
        ({"environment_options": {"a": 1}}, "environment_options without environment"),
        ({"kind": "tasks", "path": "", "tool_functions": ("a:c",)}, "generated tasks have their own tools"),
    ):
        with pytest.raises(ConfigError, match=reason):
            DataSettings(**{"kind": "jsonl", "path": "" if changes.get("kind") == "environment" else "x", **changes})
    for name, value in (("timeout_s", 0.0), ("timeout_s", float("nan")), ("workers", -1), ("max_failed", 1.5)):
        with pytest.raises(ConfigError, match=rf"rewards\.{name}"):
            dataclasses.replace(RewardSettings(), **{name: value})


def test_numbers():
    class Odd:
        def __float__(self):
            return "no"

    assert parts_of(True) == (1.0, {})
    for value in ("1", b"1", None, [1.0], object(), 1j, Odd(), {"a": "1"}, {1: 1.0}, 10**400, {"a": 1e308, "b": 1e308}):
        with pytest.raises((RewardValueError, OverflowError)):
            parts_of(value)


def test_more_processes_than_the_machine_has_room_for_are_refused(monkeypatch):
    """After the first one is loaded, and before the others are started; it is ended."""
    started: list[subprocess.Popen] = []
    real = subprocess.Popen

    def start(*arguments, **options):
        if len(started) == 2:
            raise OSError(24, "Too many open files")
        started.append(real(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(pool.subprocess, "Popen", start)
    with monkeypatch.context() as small:
        small.setattr(memory, "host_bytes", lambda: 2**30)
        small.setattr(pool, "private_bytes", lambda pid: 2**24)
        with pytest.raises(ConfigError, match=r"^rewards\.workers: 1,024 processes .* needs 16\.0 GiB"):
            graded("exact", workers=1024)
    assert len(started) == 1
    with pytest.raises(ConfigError, match=r"^rewards\.workers: process 2 of 3 cannot be started \(Too many"):
        graded("exact", workers=3)
    assert all(process.poll() is not None for process in started)
