"""``stepjax data check``, and the same check before a run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from bad_rows import ANSWER, BAD_ROWS, BAD_TEXT, GOOD, USER
from tuning import SHORT

from stepjax.cli import main
from stepjax.errors import ConfigError
from stepjax.train.config.tune import DataSettings, EvalSettings, TuneConfig
from stepjax.train.data.encoder import TextModel
from stepjax.train.data.files.opening import open_files
from stepjax.train.data.lengths import look
from stepjax.train.data.sources import FileSource
from stepjax.train.data.survey import survey
from stepjax.train.objectives.objective import LossSettings
from stepjax.train.rollouts.sampler import data_rollouts
from stepjax.train.teachers.scoring import cut_to_rows
from stepjax.train.tune import data_check
from stepjax.train.tune.data_check import check_data
from stepjax.train.tune.run import tune


def write(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_every_bad_row_is_a_line_that_begins_with_its_place(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    texts = [text for text, _ in BAD_TEXT.values()] + [json.dumps(row).encode() for row, _ in BAD_ROWS.values()]
    good = json.dumps(GOOD).encode()
    file.write_bytes(b"".join(good + b"\n\n" + text + b"\n" for text in texts))
    assert main(["data", "check", str(file), "--model", "step-tiny"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[0] for line in lines[: len(texts)]] == [
        f"{file}:{3 * i + 3}" for i in range(len(texts))
    ]
    assert lines[len(texts)] == f"{file}: {len(texts)} good rows ({len(texts)} messages), {len(texts)} bad"
    assert main(["data", "check", str(file), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["bad"] == len(texts)
    assert [bad["line"] for bad in report["files"][0]["bad"]] == [3 * i + 3 for i in range(len(texts))]


def test_good_rows_are_counted_and_shown(tmp_path, capsys):
    long = {"messages": [USER, {"role": "assistant", "content": "5 " * 60}]}
    longer = {"messages": [{"role": "user", "content": "5 " * 60}, ANSWER]}
    file = write(tmp_path / "rows.jsonl", GOOD, long, longer, {"prompt": "a", "completion": "b"})
    assert main(["data", "check", str(file), "--length", "40"]) == 0
    out = capsys.readouterr().out
    assert f"{file}: 4 good rows (3 messages, 1 completion), 0 bad" in out
    assert f"cut at a length of 40 tokens: 1 row ({file}:2)" in out
    assert f"left out at a length of 40 tokens: 1 row ({file}:3)" in out
    assert "    <think>\n    »\n    </think>\n    5<|im_end|>«" in out
    assert main(["data", "check", str(file), "--length", "40", "--json"]) == 0
    (report,) = json.loads(capsys.readouterr().out)["files"]
    assert (report["cut"], report["left_out"]) == ([f"{file}:2"], [f"{file}:3"])
    assert report["tokens"]["trained"]["min"] == 2
    assert [part["trained"] for part in report["example"]] == [False, True]


def test_each_sequence_of_the_first_row_is_shown_by_itself(tmp_path, capsys):
    """What follows the last trained text of one sequence is another sequence, not its continuation."""
    file = write(tmp_path / "rows.jsonl", {"messages": [USER, ANSWER] * 2})
    assert main(["data", "check", str(file), "--model", "step-tiny", "--train-on", "all"]) == 0
    shown = capsys.readouterr().out.partition("the first row, with the trained text between » and «:\n")[2]
    first, last = shown.index("    sequence 1 of 2:\n"), shown.index("«\n    sequence 2 of 2:\n")
    assert 0 == first < last
    assert main(["data", "check", str(file), "--model", "step-tiny", "--train-on", "all", "--json"]) == 0
    (report,) = json.loads(capsys.readouterr().out)["files"]
    assert [(part["sequence"], part["trained"]) for part in report["example"]] == [
        *((0, False), (0, True)),
        *((1, False), (1, True)),
    ]


def test_a_row_of_which_nothing_is_trained_is_shown_without_talk_of_marks(tmp_path, capsys):
    file = write(tmp_path / "rows.jsonl", {"messages": [USER], "answer": "5"})
    assert main(["data", "check", str(file), "--model", "step-tiny", "--for", "rl"]) == 0
    out = capsys.readouterr().out
    assert "  the first row, as the model sees it:\n" in out
    assert "»" not in out


def test_what_is_said_of_lengths_is_what_training_does(tmp_path):
    rows = [{"messages": [USER, {"role": "assistant", "content": "5" * i}]} for i in range(1, 40, 3)]
    rows += [{"messages": [{"role": "user", "content": "5" * i}, ANSWER]} for i in range(1, 60, 3)]
    rows += [{"messages": [USER, ANSWER] * i} for i in range(1, 4)]
    settings = DataSettings(path=str(write(tmp_path / "rows.jsonl", *rows)), train_on="all")
    model, records = TextModel.open("step-tiny"), open_files(settings.path)
    lengths = look(settings, records, survey(settings, records).numbers, model, length=48)
    source = FileSource("rows", settings, model)
    cut, left_out = [], []
    for number in range(len(rows)):
        prompt = source.line(number)
        kept, _ = cut_to_rows(data_rollouts(prompt, group=0), 48)
        if not kept:
            left_out.append(prompt.where)
        elif any(rollout.truncated for rollout in kept) or len(kept) < len(prompt.trained):
            cut.append(prompt.where)
    assert (lengths.cut, lengths.left_out) == (cut, left_out)
    assert cut
    assert left_out


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        ([], 1, ":2: has no completion"),  # since half of the rows have one
        (["--for", "distill"], 0, "2 good rows"),
        (["--for", "sft"], 1, ":2: has no completion to learn from"),
        (["--for", "rl"], 1, ":2: has nothing to compare an answer with"),
        (["--columns", "prompt=prompt", "answer=prompt", "--for", "rl"], 0, "2 good rows"),
        (["--columns", "answer=gold"], 1, ":1: has no column 'gold'"),
        (["--columns", "ask=prompt"], 1, "columns has 'ask'"),
        (["--columns", "prompt"], 1, "expected OURS=THEIRS"),
        (["--form", "text"], 1, ":1: has no text, which form 'text' needs"),
        (["--rows", "0"], 1, "--rows at least 1"),
        (["--model", "none"], 1, "none"),
    ],
)
def test_rows_are_checked_for_their_use(tmp_path, capsys, args, code, words):
    file = write(tmp_path / "rows.jsonl", {"prompt": "a", "completion": "b"}, {"prompt": "c"})
    assert main(["data", "check", str(file), *args]) == code
    out = capsys.readouterr()
    assert words in out.out + out.err


def test_a_file_that_is_not_there_is_named_as_a_line_too(tmp_path, capsys):
    file, missing = write(tmp_path / "rows.jsonl", GOOD), tmp_path / "none.jsonl"
    assert main(["data", "check", str(missing), str(file)]) == 1
    out = capsys.readouterr().out
    assert out.startswith(f"{missing}:1: does not exist")
    assert f"{file}: 1 good row" in out


def run_of(file: Path, **sections: Any) -> TuneConfig:
    """A short run of `sft` on a file."""
    given = {
        "verb": "sft",
        "data": {"mine": DataSettings(path=str(file))},
        "teachers": {},
        "loss": LossSettings(objective="sft"),
        "rollout": dataclasses.replace(SHORT.rollout, source="data", prompts=2),
    }
    return dataclasses.replace(SHORT, **{**given, **sections})


def test_a_run_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("stepjax.train.tune.run.open_run", lambda config: pytest.fail("loads a model"))
    out = tmp_path / "run"
    with pytest.raises(ConfigError, match=r"data.mine: 1 bad row\n  .*rows.jsonl:2: messages: is empty"):
        tune(run_of(write(tmp_path / "rows.jsonl", GOOD, {"messages": []}, GOOD)), out)
    with pytest.raises(ConfigError, match=r"data.mine: 1 bad row\n  .*rows.jsonl:1: has no completion"):
        tune(run_of(write(tmp_path / "rows.jsonl", {"prompt": "a"}, GOOD)), out)
    with pytest.raises(ConfigError, match=r"none of 2 rows fits 8 tokens \(prompts have 14 to 14\)"):
        tune(run_of(write(tmp_path / "rows.jsonl", GOOD, GOOD), optim=dataclasses.replace(SHORT.optim, length=8)), out)
    rows = write(tmp_path / "rows.jsonl", {"prompt": "a"}, GOOD)
    samples = dataclasses.replace(SHORT.rollout, samples=2)
    with pytest.raises(ConfigError, match=r"data.mine: 1 bad row\n  .*rows.jsonl:1: has nothing to compare"):
        tune(run_of(rows, verb="rl", loss=LossSettings(objective="grpo"), rollout=samples), out)
    assert not out.exists()


def test_what_each_source_holds_is_said_once(tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(data_check, "tell", said.append)
    long = {"messages": [{"role": "user", "content": "5" * 90}, ANSWER]}
    file = write(tmp_path / "rows.jsonl", GOOD, {"prompt": "a", "completion": "b"}, long)
    check_data(run_of(file, optim=dataclasses.replace(SHORT.optim, length=40), eval=EvalSettings(every=1)))
    assert said == [
        f"data.mine: 3 rows of {file} (2 messages, 1 completion)",
        "data.mine: no row is held out, so eval_held_out_* leave it out; set held_out or held_out_path",
        f"data.mine: 1 row left out at 40 tokens, such as {file}:3",
        "data.mine: the median row has 19 tokens, the longest 104",
    ]
