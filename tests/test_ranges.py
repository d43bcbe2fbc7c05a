"""Every number of every setting has a range, and what is outside of it is refused by name, before anything is made."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import hypothesis
import pytest
import settings_table
from hypothesis import given, strategies as st

from stepjax.adapters.lora import LoraConfig
from stepjax.cli import main
from stepjax.errors import ConfigError
from stepjax.ranges import Range, annotations_of, check_ranges, range_of
from stepjax.train.config.mix import MIX
from stepjax.train.config.pretrain import PretrainConfig, read_pretrain
from stepjax.train.config.reader import change_settings, read_settings, write_settings
from stepjax.train.config.rewards import RewardSettings
from stepjax.train.config.tune import (
    DataSettings,
    EvalSettings,
    LoraSettings,
    ModelSettings,
    OptimSettings,
    RolloutSettings,
    RunSettings,
    TeacherSettings,
    TuneConfig,
)
from stepjax.train.objectives.objective import LossSettings

SECTIONS = {
    "model": ModelSettings,
    "lora": LoraSettings,
    "data.tasks": DataSettings,
    "teachers.main": TeacherSettings,
    "rollout": RolloutSettings,
    "loss": LossSettings,
    "optim": OptimSettings,
    "eval": EvalSettings,
    "run": RunSettings,
    "rewards": RewardSettings,
}
CLASSES: list[type[Any]] = [*SECTIONS.values(), PretrainConfig, LoraConfig]
NEEDED: dict[type, dict[str, Any]] = {DataSettings: {"path": "x", "kind": "jsonl"}, TeacherSettings: {"path": "x"}}
# What is no number, or is one that no setting can mean. In TOML, as --set gives them.
NEVER = [
    "nan",
    "-nan",
    "inf",
    "-inf",
    "1e30",
    "-1e30",
    "1" + "0" * 40,
    "-1",
    '"3"',
    '""',
    "true",
    "[1]",
    "{ a = 1 }",
    "1" * 5000,
]


def numbers(kind: Any) -> Iterator[tuple[type, Range | None]]:
    """The numbers in an annotation, each with its range."""
    limits, inner = range_of(kind), get_args(kind)
    if limits:
        yield int if limits[1] else float, limits[0]
    elif kind in (int, float):
        yield kind, None
    elif get_origin(kind) in (dict, tuple, Union):
        for part in inner:
            yield from numbers(part)


@pytest.mark.parametrize("kind", CLASSES)
def test_every_number_has_a_range_that_holds_its_default(kind):
    for name, annotation in annotations_of(kind).items():
        for _, limits in numbers(annotation):
            assert limits is not None, f"{kind.__name__}.{name} has no range: write Annotated[…, Range(…)]"
    default: dict[str, Any] = (
        {"path": "x", "kind": "jsonl"} if kind is DataSettings else {"path": "x"} if kind is TeacherSettings else {}
    )
    check_ranges(kind(**default))


def test_every_setting_of_a_number_refuses_what_is_none(tmp_path):
    """By the name that the user gave, with the value and the range."""
    file = tmp_path / "settings.toml"
    file.write_text('[teachers.main]\npath = "step-tiny"\n')
    pretrain = tmp_path / "pretrain.toml"
    pretrain.write_text("")
    tried = 0
    cases = [(TuneConfig, file, section, kind) for section, kind in SECTIONS.items()]
    for whole, path, section, kind in [*cases, (PretrainConfig, pretrain, "", PretrainConfig)]:
        for name, annotation in annotations_of(kind).items():
            if range_of(annotation) is None:
                continue
            full = f"{section}.{name}" if section else name
            for value in NEVER:
                with pytest.raises(ConfigError) as error:
                    read_settings(whole, path, [f"{full}={value}"])
                message = str(error.value)
                assert full in message
                assert "expected" in message
                assert len(message) < 300
                tried += 1
    assert tried > 60 * len(NEVER)


@pytest.mark.parametrize("kind", CLASSES)
def test_python_refuses_the_same(kind):
    """`TuneConfig` and its sections are made in Python too, where no reader has checked the types."""
    for name, annotation in annotations_of(kind).items():
        if range_of(annotation) is None:
            continue
        for value in (float("nan"), float("inf"), -float("inf"), -1, 1e30, 10**40, "3", True, [1]):
            with pytest.raises(ConfigError, match=name):
                kind(**NEEDED.get(kind, {}) | {name: value})


@pytest.mark.parametrize("kind", [PretrainConfig, DataSettings])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.1, "x", True])
def test_numbers_in_tables_have_ranges(kind, value):
    with pytest.raises(ConfigError, match=r"shares\.add"):
        kind(shares={"add": value, "sub": 1.0})


def test_numbers_in_lists_have_ranges():
    with pytest.raises(ConfigError, match="keep: is 0, expected an integer from 1"):
        PretrainConfig(keep=(0,))
    with pytest.raises(ConfigError, match="keep: has 9999, expected steps from 1 to steps = 2800"):
        PretrainConfig(keep=(9999,))


@pytest.mark.parametrize(
    ("limits", "whole", "words"),
    [
        (Range(1, 10**6), True, "an integer from 1 to 1,000,000"),
        (Range(0, 10, zero="never"), True, "an integer from 0 to 10, 0: never"),
        (Range(1e-6, 10, zero="off"), False, "0 (off) or a number from 1e-06 to 10"),
        (Range(above=0, below=1), False, "a number above 0 and below 1"),
        (Range(above=0, most=2), False, "a number above 0 and of at most 2"),
        (Range(1), False, "a number of at least 1"),
    ],
)
def test_ranges_in_words(limits, whole, words):
    assert limits.describe(whole=whole) == words


def test_bounds_belong_to_a_range_unless_they_are_open():
    assert 1 in Range(1, 2)
    assert 2 in Range(1, 2)
    assert 1 not in Range(above=1, most=2)
    assert 2 not in Range(1, below=2)
    assert 0 in Range(1, 2, zero="off")
    assert float("nan") not in Range()
    assert float("inf") not in Range(0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout.prompts": 65_536, "rollout.samples": 4096}, "rollout.prompts: prompts 65,536 × samples 4,096"),
        ({"optim.rows": 65_536, "optim.length": 2**20}, "optim.rows: rows 65,536 × length 1,048,576"),
        ({"rollout.slots": 4096, "rollout.context": 2**20}, "rollout.slots: slots 4,096 × context 1,048,576"),
        ({"rollout.slots": 4096, "optim.length": 2**20, "optim.rows": 1}, "rollout.slots: slots 4,096"),
        ({"optim.warmup_steps": 50, "optim.decay_from": 20}, "optim.decay_from: is 20, expected 0"),
        ({"optim.decay_from": 200}, "optim.decay_from: is 200"),
    ],
)
def test_sizes_that_no_machine_has_and_settings_that_contradict_each_other(changes, message):
    with pytest.raises(ConfigError) as error:
        change_settings(TuneConfig(teachers={"main": TeacherSettings(path="x")}), changes)
    assert message in str(error.value)


@pytest.mark.parametrize("objective", ["grpo", "mispo"])
def test_one_answer_to_a_prompt_has_nothing_to_be_compared_with(objective):
    rewards = {"verb": "rl", "loss.objective": objective, "teachers": {}}
    with pytest.raises(ConfigError, match=r"rollout\.samples: is 1, but .* expected at least 2"):
        change_settings(TuneConfig(teachers={"main": TeacherSettings(path="x")}), rewards | {"rollout.samples": 1})


def test_rows_in_which_nothing_fits_end_a_pretraining_run(tmp_path):
    """Rather than a search for a short example without an end."""
    from stepjax.train.pretrain.loop import pretrain

    (tmp_path / "x.toml").write_text("length = 4\ndevices = 1\n")
    with pytest.raises(ConfigError, match="length: is 4 tokens, in which none of 1000"):
        pretrain(read_pretrain(Path(tmp_path / "x.toml")), tmp_path / "run")


def test_zero_is_a_switch():
    """As it is for others: no clipping, no warm-up, all checkpoints, one checkpoint at the end, no records between."""
    zeros = {"clip": 0.0, "warmup_steps": 0, "decay_from": 0, "weight_decay": 0.0}
    assert dataclasses.asdict(OptimSettings(**zeros)).items() >= zeros.items()
    RunSettings(save_every=0, keep=0, log_every=0, transcripts_every=0, transcripts=0)
    EvalSettings(every=0, items=0, kl_prompts=0)


# --- what can be written can be read

TEXTS = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0"), max_size=12)
AWKWARD = st.sampled_from(
    [
        "",
        " ",
        "a.b",
        'a"b',
        "a'b",
        "a\\b",
        "a\nb",
        "a\r\nb",
        "\t",
        "\x01\x7f",
        "é",
        "日本",
        "𝄞",
        "[x]",
        "=",
        "#",
        "'''",
        '"""',
    ]
)
WORDS = TEXTS | AWKWARD


def a_number(kind: Any) -> Any:
    """Any number of a range, its ends included."""
    limits, whole = range_of(kind) or (Range(), False)
    low, high = limits.least, limits.most
    assert low is not None
    assert high is not None
    ends = st.sampled_from([low, high, *([0] if limits.zero else [])])
    inside = st.integers(int(low), int(high)) if whole else st.floats(low, high, allow_subnormal=False)
    return ends | inside


@st.composite
def settings(draw: Any) -> TuneConfig:
    """Settings of which no two contradict each other, with any text and any number elsewhere."""

    def some(kind: type, **fixed: Any) -> Any:
        numeric = {name: a for name, a in annotations_of(kind).items() if range_of(a) and name not in fixed}
        return kind(**fixed | {name: draw(a_number(annotation)) for name, annotation in numeric.items()})

    data = {name: DataSettings("jsonl", path=draw(WORDS) or "x", weight=1) for name in draw(st.sets(WORDS, min_size=1))}
    return TuneConfig(
        verb="sft",
        model=ModelSettings(path=draw(WORDS), keep_fp8=draw(st.booleans())),
        lora=some(LoraSettings, targets=("q",), start_from=draw(WORDS)),
        data={name: dataclasses.replace(source, shares={draw(WORDS): 0.5}) for name, source in data.items()},
        rollout=some(RolloutSettings, source="data", prompts=7, samples=3, slots=2, context=9, resample=0),
        loss=LossSettings(objective="sft", chunk=draw(st.integers(1, 10_000))),
        optim=some(OptimSettings, epochs=0.0, rows=2, length=10, decay_from=0, warmup_share=0.0, minibatches=3),
        eval=some(EvalSettings, file=draw(WORDS), tasks=tuple(draw(st.lists(st.sampled_from(list(MIX)), max_size=2)))),
        run=some(RunSettings, wandb=draw(WORDS), best=draw(WORDS) or "x", best_is="min"),
    )


@given(settings())
@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
def test_what_can_be_written_can_be_read(config):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.toml"
        write_settings(config, file)
        assert read_settings(TuneConfig, file) == config
        assert list(Path(folder).iterdir()) == [file]
    assert change_settings(config, {"optim.steps": 3}).optim.steps == 3


@pytest.mark.parametrize("text", ["\\u0000", "a\\u0000b"])
def test_text_that_no_path_can_be_is_refused(tmp_path, text):
    (tmp_path / "x.toml").write_text(f'verb = "sft"\n[model]\npath = "{text}"\n')
    with pytest.raises(ConfigError, match=r"model\.path: is .*expected text without NUL"):
        read_settings(TuneConfig, tmp_path / "x.toml")
    with pytest.raises(ConfigError, match=r"lone surrogates"):
        change_settings(TuneConfig(teachers={"main": TeacherSettings(path="x")}), {"model.path": "\udcff"})


def test_the_page_of_settings_is_that_of_the_classes():
    assert settings_table.PAGE.read_text(encoding="utf-8") == settings_table.page(), (
        "docs/settings.md is old: python tests/settings_table.py"
    )


@pytest.mark.parametrize("section", settings_table.SECTIONS)
def test_every_number_is_explained(section):
    kind = settings_table.SECTIONS[section]
    explained = settings_table.explanations(kind)
    numbers = [name for name, annotation in annotations_of(kind).items() if range_of(annotation)]
    assert [name for name in numbers if not explained[name]] == []


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "0", "1e30", "1" * 50, "1" * 5000, "x", "", "[1]", "2.5"])
def test_numbers_of_the_command_line_have_ranges(capsys, value):
    commands = [
        ["teach", "x.toml", "--out", "y", f"--top-k={value}"],
        ["release", "run", "--out", "y", f"--items={value}"],
        ["release", "run", "--out", "y", f"--step={value}"],
        *([["release", "run", "--out", "y", f"--require=add={value}"]] if value != "0" else []),
    ]
    for command in commands:
        with pytest.raises(SystemExit) as ended:
            main(command)
        assert ended.value.code == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert command[-1].partition("=")[0] in said
        assert "expected a" in said
        assert len(said) < 300
