"""Settings and data of fine-tuning: what is refused, what comes back, and that a batch is a function of its step."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from stepjax.cli import main
from stepjax.errors import ConfigError
from stepjax.infer.load import load
from stepjax.infer.session import Session
from stepjax.train.config.reader import read_settings, write_settings
from stepjax.train.config.tune import DataSettings, RunSettings, TuneConfig
from stepjax.train.data import tasks
from stepjax.train.data.environment import ExactMatch, environment
from stepjax.train.data.sources import FileSource, Stream, TaskSource
from stepjax.train.data.text_checks import mixes_languages, repeats
from stepjax.train.data.turns import reply_ids, turn_ids
from stepjax.train.environments.episode import Turn
from stepjax.train.rollouts.sampler import Rollout, data_rollouts
from stepjax.train.runs.sinks import TensorBoard, flat, open_sinks
from stepjax.train.teachers.scoring import cut_to_rows, make_batch
from stepjax.train.tune import verbs

RECIPES = Path(__file__).parents[1] / "train" / "recipes"


@pytest.fixture(scope="module")
def session() -> Session:
    return load("step-tiny")


def read(tmp_path: Path, text: str, *overrides: str) -> TuneConfig:
    file = tmp_path / "config.toml"
    file.write_text(text)
    return read_settings(TuneConfig, file, overrides)


TEACHER = '[teachers.main]\npath = "step-tiny"\n'


def test_settings_survive_the_file(tmp_path):
    config = read_settings(TuneConfig, RECIPES / "step-tiny-distill.toml", ["optim.steps=160"])
    assert config.optim.steps == 160
    assert config.teachers["main"].path == "step-tiny"
    write_settings(config, tmp_path / "config.toml")
    assert read_settings(TuneConfig, tmp_path / "config.toml") == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[optim]\nsped = 3", "optim.sped is not a setting; there are steps, epochs, lr"),
        ("[optim]\nsteps = 1.5", "optim.steps: is 1.5, expected an integer from 1 to"),
        ("[optim]\nsteps = 0", "optim.steps: is 0"),
        ("optim = 3", "optim: is 3, expected a OptimSettings"),
        ("[loss]\nobjective = 'kl'", "loss.objective: is 'kl', expected one of 'exact'"),
        ("[loss]\nobjective = 'grpo'", "stepjax distill expects one of exact, sampled, top_k, mtp"),
        ("[loss]\nbeta = 1.0", "the ends are reverse and forward"),
        ("[loss]\nobjective = 'exact'", "teachers: exact needs a teacher"),
        (TEACHER + "[data.x]\nkind = 'jsonl'", "expected a path for a file"),
        (TEACHER + "[rollout]\nreplay = true\nsource = 'data'", "only answers of the student have recorded experts"),
        (
            "[rollout]\nreplay = true\n[loss]\nobjective = 'mtp'\n[lora]\nkind = 'mtp'",
            "prediction heads have no experts",
        ),
        (
            TEACHER + "[data.x]\npath = 'x'\ntrain_on = 'all'",
            "data.x.train_on: is 'all', but rollout.source = 'student'",
        ),
        (TEACHER + "[data.x]\npath = 'x'\nsplit = 'test'", "split applies to kind 'hub' only"),
        (TEACHER + "[data.x]\ntrain_on = 'all'", "train_on does not apply to kind 'tasks'"),
        (TEACHER + "[data.x]\npath = 'x'\nheld_out = 0.1\nheld_out_path = 'y'", "both held_out and held_out_path"),
        (TEACHER + "[data.x]\nteacher = 'other'", "is 'other', expected one of main"),
        (TEACHER + "[eval]\ntasks = ['add', 'adding']", "eval.tasks: has 'adding', expected names of add, sub"),
        (TEACHER + "[eval]\nforgetting = ['x']", "eval.forgetting: has 'x', expected names of add"),
        (TEACHER + "[data.x]\nshares = { adding = 1.0 }", "expected shares of add, sub"),
        (TEACHER + "[teachers.second]\nkind = 'base'", "data.tasks.teacher: is empty, expected one of main, second"),
        ("[teachers.main]\nkind = 'remote'", "'remote' needs url"),
        ("[teachers.main]\nkind = 'base'\nurl = 'http://x'", "url does not apply to kind 'base'"),
        (TEACHER + "[loss]\nobjective = 'sampled'\n[rollout]\ntop_p = 0.9", "unbiased only at 1.0"),
        (TEACHER + "[loss]\nobjective = 'sampled'\n[rollout]\ntemperature = 0.5", "rollout.temperature: is 0.5"),
        (
            TEACHER + "[loss]\nobjective = 'sampled'\n[rollout]\nsource = 'teacher'",
            "expected 'student', on_policy 1",
        ),
        (TEACHER + "[loss]\nobjective = 'top_k'", "use exact for one in this process"),
        (TEACHER + "[loss]\nobjective = 'mtp'", "lora.kind: is 'lora' with objective 'mtp'"),
        (
            "[teachers.m]\nkind = 'stored'\npath = 'x'\n[loss]\nobjective = 'top_k'",
            "a stored teacher has scores of a file's completions only",
        ),
    ],
)
def test_bad_settings_are_refused_by_name(tmp_path, text, message):
    with pytest.raises(ConfigError) as error:
        read(tmp_path, text)
    assert message in str(error.value)


def test_overrides_reach_sections(tmp_path):
    found = read(tmp_path, TEACHER, "optim.lr=1", "data.tasks.shares={add=1.0}", 'rollout.source="teacher"')
    assert found.optim.lr == 1.0
    assert found.data["tasks"].shares == {"add": 1.0}
    with pytest.raises(ConfigError, match="a value, not a section"):
        read(tmp_path, TEACHER, "teachers.main.path.x=1")
    with pytest.raises(ConfigError, match="expected name=value"):
        read(tmp_path, TEACHER, "optim.lr")


@pytest.fixture(scope="module")
def lines(tmp_path_factory) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": f"What is {i} + 1?"}], "answer": str(i + 1)} for i in range(5)
    ] + [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there!"}]},
        {"prompt": "one two", "completion": " three"},
    ]
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    file.write_text("\n\n".join(json.dumps(row) for row in rows))  # empty lines are no rows, the last has no end
    return file


def test_rows_of_a_file(lines, session):
    rows = FileSource("rows", DataSettings(path=str(lines)), session)
    assert len(rows) == 7
    for turn in range(2):
        found = [rows.row(0, 7 * turn + i) for i in range(7)]
        assert sorted(each.index for each in found) == list(range(7))  # each once a round
    assert [rows.row(0, i).index for i in range(7)] != [rows.row(0, 7 + i).index for i in range(7)]
    assert [rows.row(0, i).index for i in range(7)] != [rows.row(1, i).index for i in range(7)]
    assert rows.row(0, 3).ids == rows.row(0, 3).ids
    tokenizer = session.tokenizer
    assert tokenizer is not None
    chat, text = rows.line(5), rows.line(6)
    assert chat.completion is not None
    assert tokenizer.decode(chat.completion, skip_special=False).endswith("Hello there!<|im_end|>")
    assert chat.ids == tuple(session.encode_chat([{"role": "user", "content": "Hi"}]))
    assert text.completion is not None
    assert text.completion[-1] in session.config.eos_ids
    assert tokenizer.decode([*text.ids, *text.completion]) == "one two three"
    episode = rows.line(2).new_environment()
    episode.respond(Turn("", " 3 ", (), True))
    assert episode.reward() == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "rows.jsonl:1: not readable as JSON"),
        ("[]", "holds a JSON list"),
        ('{"words": "x"}', "has 'words'; expected messages"),
        ('{"prompt": 3}', "prompt is 3, expected text"),
    ],
)
def test_bad_rows_are_refused_by_place(tmp_path, session, row, message):
    file = tmp_path / "rows.jsonl"
    file.write_text(row)
    with pytest.raises(ConfigError) as error:
        FileSource("rows", DataSettings(path=str(file)), session).line(0)
    assert message in str(error.value)
    file.write_text("")
    with pytest.raises(ConfigError, match="holds no rows"):
        FileSource("rows", DataSettings(path=str(file)), session)


def test_array_records(tmp_path, session):
    from array_record.python.array_record_module import ArrayRecordWriter

    for part in range(2):
        writer = ArrayRecordWriter(str(tmp_path / f"part-{part}.array_record"), "group_size:1")
        for i in range(3):
            writer.write(json.dumps({"prompt": f"{part} {i}"}).encode())
        writer.close()
    rows = FileSource("rows", DataSettings(path=str(tmp_path / "part-*.array_record")), session)
    found = [rows.row(0, i).ids for i in range(12)]
    assert len(set(found[:6])) == 6
    assert sorted(found[:6]) == sorted(found[6:])
    with pytest.raises(ConfigError, match=r"^data\.rows: .*none-\*: does not exist"):
        FileSource("rows", DataSettings(path=str(tmp_path / "none-*")), session)


def test_a_batch_is_a_function_of_its_step(session):
    rows = {name: TaskSource(name, DataSettings(shares={"add": 1.0}), session) for name in "ab"}
    mixed = Stream(rows, {"a": 3.0, "b": 1.0, "c": 0.0}, 0, 5)
    batches = [mixed.batch(step) for step in range(8)]
    assert all(len(each) == 5 for each in batches)
    for name, count in (("a", 30), ("b", 10)):
        own = [each.index for batch in batches for each in batch if each.source == name]
        assert own == list(range(count))  # each row once, in its order
    assert [each.ids for each in mixed.batch(6)] == [each.ids for each in batches[6]]


def test_turns_are_rendered_as_the_template_does(session):
    """Prompt, call, answer of the tool and last turn, put together, are the whole conversation."""
    item = tasks.make("tool_round_trip", np.random.default_rng(0), "test")
    *before, call, answer = item.messages
    prompt, said = turn_ids(session, before, call, tools=item.tools)
    reply = reply_ids(session, [*before, call], [answer], tools=item.tools)
    whole = session.encode_chat(item.messages, tools=item.tools)
    assert [*prompt, *said, *reply] == whole


def test_a_user_who_replies_leaves_the_reasoning_in_the_episode(session):
    """The template drops it from earlier turns. What the model wrote stays, and the reply is rendered after it."""
    asked = [{"role": "user", "content": "Guess."}]
    turn = {"role": "assistant", "reasoning_content": "Three is odd.", "content": "3"}
    replies = [{"role": "user", "content": "Wrong."}]
    prompt, said = turn_ids(session, asked, turn, tools=None)
    reply = reply_ids(session, [*asked, turn], replies, tools=None)
    assert session.tokenizer
    text = session.tokenizer.decode([*prompt, *said, *reply], skip_special=False)
    assert text.endswith("3<|im_end|>\n<|im_start|>user\nWrong.<|im_end|>\n<|im_start|>assistant\n<think>\n")
    assert text.count("Three is odd.") == 1
    second = [*asked, turn, *replies, turn]
    assert reply_ids(session, second, replies, tools=None) == reply


def test_environments_grade(session):
    item = tasks.make("tool_round_trip", np.random.default_rng(1), "test")
    call = item.messages[-2]["tool_calls"][0]["function"]
    right, wrong = (
        Turn("", "", ({"name": name, "arguments": call["arguments"]},), True) for name in (call["name"], "x")
    )
    start = environment(item, tools_answer=True)
    assert list(start.respond(right)) == [item.messages[-1]]
    assert list(start.respond(Turn("", item.target["content"], (), True))) == []
    assert start.reward() == 1
    start = environment(item, tools_answer=True)
    assert list(start.respond(wrong)) == []
    assert start.reward() == 0
    single = environment(tasks.make("add", np.random.default_rng(1), "test"), tools_answer=True)
    single.respond(Turn("", single.item.target["content"], (), False))  # type: ignore[attr-defined]
    assert single.reward() == 0  # cut off
    assert ExactMatch((), None, None).reward() == 0


def test_rollouts_become_rows(session):
    prompt = TaskSource("a", DataSettings(shares={"add": 1.0}), session).row(0, 0)
    (one,) = data_rollouts(prompt, group=0)
    two = Rollout(prompt, 1, 0, [9, 8, 7], [True, False, True], [-1.0, 0.0, -3.0])
    kept, lost = cut_to_rows(
        [one, two, dataclasses.replace(two, prompt=dataclasses.replace(prompt, ids=(1,) * 99))], 96
    )
    assert (len(kept), lost) == (2, 1)
    batch, packed = make_batch(kept, np.asarray([1.0, 2.0], np.float32), rows=2, length=96)
    assert batch.rows.ids.shape == (1, 2, 96)
    (row, first), start = packed.places[1], len(prompt.ids)
    at = (0, row, slice(first + start, first + start + 3))
    assert batch.rows.ids[at].tolist() == [9, 8, 7]
    assert batch.rows.loss_mask[at].tolist() == [1, 0, 1]
    assert batch.sampler[at].tolist() == [-1, 0, -3]
    assert batch.advantage[at].tolist() == [2, 2, 2]
    assert int(batch.rows.loss_mask.sum()) == 2 + len(one.ids)
    long = dataclasses.replace(one, ids=[5] * 200, answer_mask=[True] * 200, logprobs=[0.0] * 200, truncated=False)
    (cut,), _ = cut_to_rows([long], 96)
    assert len(cut.ids) == 96 - start
    assert cut.truncated


def test_signs_of_decay():
    assert repeats([1, 2, 3] * 4)
    assert repeats([5] * 8)
    assert not repeats([5] * 7)
    assert not repeats(list(range(50)) + [1, 2] * 3)
    assert mixes_languages("числа 12", "What is 12?")
    assert not mixes_languages("Zahl 12", "Что?")
    assert not mixes_languages("числа", "Какие числа?")


def test_numbers_go_to_tensorboard(tmp_path):
    record = {"step": 3, "loss": 0.5, "eval_accuracy": {"add": 1.0}, "depth": [1, 2], "objective": "exact"}
    assert dict(flat(record)) == {"loss": 0.5, "eval_accuracy/add": 1.0, "depth/0": 1.0, "depth/1": 2.0}
    sink = TensorBoard(tmp_path, 0)
    sink.write(record)
    sink.close()
    assert list(tmp_path.glob("events*"))


def test_numbers_go_to_weights_and_biases(tmp_path, monkeypatch):
    """Under the folder's name; taken up again by an id of its own, which another folder of that name does not share."""
    calls: list[tuple[str, Any]] = []

    class Run:
        def log(self, numbers: dict[str, float], *, step: int) -> None:
            calls.append(("log", (numbers, step)))

        def finish(self) -> None:
            calls.append(("finish", None))

    def init(**options: Any) -> Run:
        calls.append(("init", options))
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", cast(ModuleType, SimpleNamespace(init=init)))
    folders = tmp_path / "a" / "run", tmp_path / "b" / "run"
    for folder in (*folders, folders[0]):
        folder.mkdir(parents=True, exist_ok=True)
        sink = open_sinks(RunSettings(wandb="mine"), folder, 0, {"optim": {"lr": 1e-3}})["wandb"]
        sink.write({"step": 3, "loss": 0.5, "eval_accuracy": {"add": 1.0}, "objective": "exact"})
        sink.close()
    given = [options for name, options in calls if name == "init"]
    ids = [options.pop("id") for options in given]
    assert ids[0] == ids[2] != ids[1]
    same = {"project": "mine", "name": "run", "resume": "allow", "config": {"optim": {"lr": 1e-3}}}
    assert given == [same | {"dir": str(folder)} for folder in (*folders, folders[0])]
    assert calls[1:3] == [("log", ({"loss": 0.5, "eval_accuracy/add": 1.0}, 3)), ("finish", None)]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"run\.wandb: needs wandb"):
        open_sinks(RunSettings(wandb="mine"), tmp_path, 0, {})


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_run_ends_with_where_its_result_is_and_what_makes_an_adapter_of_it(tmp_path, monkeypatch, capsys, kind):
    """The adapter is what the next command reads. A run of all weights has leaves alone."""

    def ended(config: TuneConfig, folder: Path, **others: object) -> verbs.TuneResult:
        adapter = folder / "adapter" if config.lora.kind == "lora" else None
        return verbs.TuneResult(folder, 2, (), folder / "leaves" / "2.safetensors", adapter)

    monkeypatch.setattr(verbs, "run_tuning", ended)
    file, out = tmp_path / "mine.toml", tmp_path / "a run"
    data = '[data.a]\n[rollout]\nsource = "data"\n[loss]\nobjective = "sft"\n'
    file.write_text(f'model.path = "step-tiny"\n{data}[lora]\nkind = "{kind}"\n')
    assert main(["sft", str(file), "--out", str(out), "--no-program-cache"]) == 0
    lines = capsys.readouterr().out.splitlines()
    result = out / "adapter" if kind == "lora" else out / "leaves" / "2.safetensors"
    assert lines[0] == f"{out}: 2 steps done; the result is in {result}"
    following = f"stepjax export-adapter '{out}/adapter' FOLDER --model step-tiny"
    assert lines[1:] == ([f"as a PEFT folder, to serve or to merge: {following}"] if kind == "lora" else [])
