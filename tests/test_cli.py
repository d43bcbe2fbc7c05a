"""The command line as users and outside checks meet it: exit codes, refusals, the files and lines that it writes."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from checkpoints import COMPANIONS, random_tensors, short_hub_config, sparse, speaking_folder, without_mtp, write_folder

from stepjax import cli
from stepjax.cli import VERBS, main
from stepjax.config import ASSETS
from stepjax.errors import RequestError
from stepjax.infer.commands.options import Printer
from stepjax.infer.generate import generate
from stepjax.infer.load import load, use_caches
from stepjax.infer.sampling.params import SamplingParams
from stepjax.infer.session import Session
from stepjax.infer.transcript import Delta, Part
from stepjax.text.tool_calls import ContentDelta

ROOT = Path(__file__).resolve().parent.parent
TOKENS = [[0, 3, 5, 90], [7]]


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    """A random checkpoint without tokenizer, as outside checks make one; its path is not a plain word."""
    hub = short_hub_config()
    return without_companions(write_folder(tmp_path_factory.mktemp("bare") / "mödel 名", hub, random_tensors(hub)))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return speaking_folder(tmp_path_factory.mktemp("whole") / "model")


@pytest.fixture(scope="module")
def session(bare) -> Session:
    """With the programs of the commands."""
    return load(bare, dtype="float32", program_cache=use_caches())


@pytest.fixture
def tokens(tmp_path) -> Path:
    file = tmp_path / "in.json"
    file.write_text(json.dumps(TOKENS))
    return file


def without_companions(folder: Path) -> Path:
    for name in COMPANIONS:
        (folder / name).unlink()
    return folder


def run(*args: object) -> int:
    return main([str(arg) for arg in args])


def refused(capsys, *args: object) -> str:
    """The one line of a refusal."""
    assert run(*args) == 1
    out, err = capsys.readouterr()
    assert out == ""
    *notes, line = err.splitlines()
    assert all(note.startswith("stepjax: ") for note in notes)
    assert line.startswith("stepjax: error: ")
    return line


def process(command: str, **options) -> subprocess.CompletedProcess[str]:
    """A shell command with ``stepjax`` as this interpreter runs it."""
    command = command.replace("stepjax ", f"'{sys.executable}' -m stepjax ")
    env = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    return subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=300, env=env, check=False, **options
    )


# Exit codes


@pytest.mark.parametrize("args", [["--help"], ["--version"], *([verb, "--help"] for verb in VERBS)], ids=" ".join)
def test_help_is_no_error(capsys, args):
    with pytest.raises(SystemExit) as ended:
        main(args)
    assert ended.value.code == 0
    assert "stepjax" in capsys.readouterr().out


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_an_example_and_every_default(verb):
    """The example is a command line that the parser takes; an option that may be left out says what it then is."""
    parser = cli._parser(verb)
    name, *args = shlex.split(VERBS[verb].example)
    assert (name, parser.parse_args(args).verb) == ("stepjax", verb)
    (verbs,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    sub = verbs.choices[verb]
    assert VERBS[verb].example in sub.format_help()
    one_of = {id(action) for group in sub._mutually_exclusive_groups for action in group._group_actions}
    for action in sub._actions[1:]:
        assert action.help, action.dest
        if action.option_strings and not action.required and id(action) not in one_of:
            assert "default: " in action.help or "same as" in action.help, action.help


def test_help_lists_every_command_once(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    listed = re.findall(r"^  ([a-z-]+)  +\S", capsys.readouterr().out.partition("\n\nRun a model:")[2], re.MULTILINE)
    assert listed == list(VERBS)


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["nope"],
        ["--", "generate"],
        ["generate"],
        ["generate", "--prompt", "x", "--tokens", "y"],
        ["generate", "--prompt", "x", "--max-tokens", "many"],
        ["generate", "--prompt", "x", "--dtype", "int8"],
        ["score", "--tokens", "x"],
        ["info"],
        ["chat", "--tokens", "x"],
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_is_2(capsys, args):
    with pytest.raises(SystemExit) as ended:
        main(args)
    assert ended.value.code == 2
    assert "usage: stepjax" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-tokens", "0"], "max_tokens: is 0"),
        (["--max-tokens", "9" * 30], "max_tokens: is 999"),
        (["--temperature", "nan"], "temperature: is nan"),
        (["--temperature", "-1"], "temperature: is -1"),
        (["--top-p", "0"], "top_p: is 0"),
        (["--top-k", "-1"], "top_k: is -1"),
        (["--min-p", "inf"], "min_p: is inf"),
        (["--seed", "-1"], "seed: is -1"),
        (["--speculate", "4"], "speculate: is 4, but this checkpoint has 3"),
        (["--speculate", "-1"], "speculate: is -1"),
        (["--stop", ""], "stop: is"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_numbers_out_of_range_are_refused(capsys, bare, tokens, flags, message):
    assert message in refused(capsys, "generate", "--model", bare, "--tokens", tokens, *flags)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "nope",
        "/nope",
        "a" * 5000,
        "a/b/c",
        "../..",
        "-",
        "step-3.5-flash",
        "step\0tiny",
        "\udcff",
        str(ROOT / "LICENSE"),
    ],
    ids=lambda name: repr(name[:20]),
)
def test_models_that_are_none(capsys, name):
    refused(capsys, "generate", "--model", name, "--prompt", "x")
    if name != "step-3.5-flash":
        refused(capsys, "info", "--", name)


def test_an_interrupt_is_130_and_a_full_disk_1(capsys, monkeypatch):
    def raising(error):
        def run(args):
            raise error

        monkeypatch.setattr("stepjax.commands.info.run", run)

    raising(KeyboardInterrupt())
    assert run("info", "step-tiny") == 130
    raising(OSError(28, "No space left on device"))
    assert "No space left" in refused(capsys, "info", "step-tiny")
    raising(BrokenPipeError())
    assert run("info", "step-tiny") == 0


def test_a_tokenizer_without_template_still_takes_ids(capsys, whole, tokens, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    assert run("score", "--model", folder, "--tokens", tokens, "--out", tmp_path / "out.npz") == 0
    assert "2 sequences" in capsys.readouterr().out
    assert "no chat template" in refused(capsys, "chat", "--model", folder)


# info

FIGURES = {
    ("release", "bf16", "tensors"): 804,
    ("release", "bf16", "bytes"): 398_768_626_944,
    ("release", "fp8", "tensors"): 930,
    ("release", "fp8", "bytes"): 208_561_446_144,
    ("release", "int4 in 64s", "tensors"): 930,
    ("release", "int4 in 64s", "bytes"): 119_333_608_704,
    ("parameters", "total"): 199_384_301_376,
    ("parameters", "without_mtp"): 196_956_130_368,
    ("parameters", "active"): 10_931_407_936,
    ("kv", "bytes_per_token"): 49_152,
}


def test_info_has_the_figures_of_the_release(capsys):
    assert run("info", "step-3.5-flash", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    for path, expected in FIGURES.items():
        value = found
        for key in path:
            value = value[key]
        assert value == expected, path
    assert len(found["layers"]) == 48
    assert run("info", "step-3.5-flash") == 0
    shown = capsys.readouterr().out
    assert all(f"{figure:,}" in shown for figure in FIGURES.values())


def test_info_reads_a_folder_a_file_and_a_name_alike(capsys):
    shown = []
    for name in ("step-tiny", ASSETS / "step-tiny", ASSETS / "step-tiny" / "config.json"):
        assert run("info", name, "--json") == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] == shown[2]


@pytest.mark.parametrize("make", [os.mkfifo, sparse, Path.mkdir], ids=["pipe", "huge", "folder"])
def test_info_does_not_block_or_fill_the_memory(capsys, tmp_path, make):
    make(tmp_path / "config.json")
    refused(capsys, "info", tmp_path)
    refused(capsys, "info", tmp_path / "config.json")


# score


def test_score_writes_what_the_session_computes(capsys, bare, session, tokens, tmp_path):
    out = tmp_path / "out.bin"  # written under this very name
    assert run("score", "--model", bare, "--tokens", tokens, "--out", out, "--dtype", "float32", "--mtp") == 0
    with np.load(out) as found:
        assert set(found) == {
            f"p{j}_{kind}" for j in (0, 1) for kind in ("ids", "logits", "mtp1_logits", "mtp2_logits", "mtp3_logits")
        }
        for j, ids in enumerate(TOKENS):
            logits, depths = session.score(ids)
            assert found[f"p{j}_ids"].tolist() == ids
            assert found[f"p{j}_logits"].dtype == np.float32
            np.testing.assert_array_equal(found[f"p{j}_logits"], logits)
            for k, depth in enumerate(depths, start=1):
                assert found[f"p{j}_mtp{k}_logits"].shape == (max(len(ids) - k, 0), 128)
                np.testing.assert_array_equal(found[f"p{j}_mtp{k}_logits"], depth)
    assert "2 sequences, 5 tokens" in capsys.readouterr().out


def test_a_mesh_says_what_it_copies_and_one_that_cannot_be_is_refused(capsys, bare, session, tokens, tmp_path):
    score = ("score", "--model", bare, "--tokens", tokens, "--out", tmp_path / "o.npz", "--dtype", "float32")
    assert run(*score, "--mesh", "expert=8") == 0
    assert (
        "query heads (4 and 6) are not split over all of expert=8: 8 devices each hold a copy"
        in capsys.readouterr().err
    )
    with np.load(tmp_path / "o.npz") as found:
        np.testing.assert_allclose(found["p0_logits"], session.logits(TOKENS[0]), atol=2e-4)
    for mesh, message in (
        ("expert=3", "routed experts (8) cannot be split 3 ways; the nearest that can is 2"),
        ("tensor=4", "query heads (4 and 6) cannot be split 4 ways"),
        ("expert=16", "takes 16 devices, found 8"),
        ("model=2", "'model' is not an axis"),
    ):
        assert message in refused(capsys, *score, "--mesh", mesh)


def test_score_without_mtp(bare, session, tokens, tmp_path):
    assert run("score", "--model", bare, "--tokens", tokens, "--out", tmp_path / "o.npz", "--dtype", "float32") == 0
    with np.load(tmp_path / "o.npz") as found:
        assert set(found) == {"p0_ids", "p0_logits", "p1_ids", "p1_logits"}
        np.testing.assert_array_equal(found["p0_logits"], session.logits(TOKENS[0]))


def test_a_checkpoint_without_mtp_layers(capsys, tokens, tmp_path):
    hub = short_hub_config()
    folder = without_companions(write_folder(tmp_path / "model", hub, without_mtp(random_tensors(hub), hub)))
    score = ("score", "--model", folder, "--tokens", tokens, "--out", tmp_path / "o.npz")
    assert "has no MTP layers" in refused(capsys, *score, "--mtp")
    assert not (tmp_path / "o.npz").exists()
    assert run(*score) == 0
    assert "cannot draft for itself" in capsys.readouterr().err


BAD_TOKENS = {
    "absent": None,
    "empty": "",
    "cut": "[[0, 3]",
    "binary": b"\xff\xfe",
    "deep": "[" * 100_000,
    "object": '{"a": [1]}',
    "number": "3",
    "flat": "[0, 3]",
    "no-lists": "[]",
    "empty-list": "[[0], []]",
    "fraction": "[[0, 3.0]]",
    "text": '[["a"]]',
    "truth": "[[true]]",
    "null": "[[null]]",
    "nan": "[[NaN]]",
    "endless-number": f"[[{'9' * 5000}]]",
    "large": "[[128]]",
    "larger": f"[[{2**63}]]",
    "negative": "[[0], [-1]]",
    "long": json.dumps([[0], [5] * 257]),
}


@pytest.mark.parametrize("kind", BAD_TOKENS)
@pytest.mark.parametrize("verb", ["score", "generate"])
def test_files_of_tokens_that_are_none(capsys, bare, tmp_path, verb, kind):
    file, content = tmp_path / "in.json", BAD_TOKENS[kind]
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    flags = ["--out", tmp_path / "out.npz"] if verb == "score" else []
    line = refused(capsys, verb, "--model", bare, "--tokens", file, *flags)
    assert re.search("in.json|tokens: ", line)
    assert not (tmp_path / "out.npz").exists()


@pytest.mark.parametrize("out", [".", "missing/out.npz", "in.json/out.npz"])
def test_a_place_that_cannot_be_written_is_refused_before_the_work(capsys, monkeypatch, bare, tokens, tmp_path, out):
    monkeypatch.setattr("stepjax.infer.commands.score.open_session", lambda args: pytest.fail("opened"))
    assert str(tmp_path) in refused(capsys, "score", "--model", bare, "--tokens", tokens, "--out", tmp_path / out)


def test_a_full_disk_is_one_line(capsys, tmp_path, bare, tokens):
    if not Path("/dev/full").exists():  # Linux only
        return
    assert "/dev/full: cannot be written" in refused(
        capsys, "score", "--model", bare, "--tokens", tokens, "--out", "/dev/full"
    )
    assert "/dev/full: cannot be written" in refused(
        *(capsys, "score", "--model", bare, "--tokens", tokens, "--out", tmp_path / "a", "--record-loads", "/dev/full")
    )


# generate

LINE = {"ids", "text", "reasoning_content", "content", "tool_calls", "finish_reason"}
LINE |= {"prefill_tokens_per_s", "decode_tokens_per_s", "accepted_per_step"}


def lines(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("temperature", "drafts"),
    [("1.5", "0"), ("1.5", "3"), ("0", "0"), ("0", "3")],
)
def test_generate_from_tokens_is_the_sessions_answer_with_any_number_of_drafts(
    capsys, bare, session, tokens, temperature, drafts
):
    flags = ["--max-tokens", "9", "--temperature", temperature, "--seed", "3", "--dtype", "float32", "--json"]
    params = SamplingParams(max_tokens=9, temperature=float(temperature), seed=3)
    expected = [generate(session, [ids], params, speculate=0)[0].ids for ids in TOKENS]
    assert run("generate", "--model", bare, "--tokens", tokens, "--speculate", drafts, *flags) == 0
    found = lines(capsys)
    assert [line["ids"] for line in found] == expected
    assert {(frozenset(line), line["text"]) for line in found} == {(frozenset(LINE), "")}
    assert {line["finish_reason"] for line in found} <= {"length", "stop"}


@pytest.mark.slow
def test_one_token(capsys, bare, tokens):
    assert run("generate", "--model", bare, "--tokens", tokens, "--max-tokens", 1, "--temperature", 0, "--json") == 0
    assert [(len(line["ids"]), line["decode_tokens_per_s"]) for line in lines(capsys)] == [(1, 0.0), (1, 0.0)]


def test_a_prompt_that_fills_the_context_is_refused_before_the_first_answer(capsys, bare, tmp_path):
    (tmp_path / "in.json").write_text(json.dumps([[0], [5] * 256]))
    assert "the context is 256" in refused(capsys, "generate", "--model", bare, "--tokens", tmp_path / "in.json")


def test_a_prompt_of_text(capsys):
    ask = ("generate", "--prompt", "What is 467 + 358?", "--temperature", "0")
    assert run(*ask, "--json") == 0
    (line,) = lines(capsys)
    assert (line["content"], line["finish_reason"]) == ("825", "stop")
    assert line["text"] == f"{line['reasoning_content']}\n</think>\n825"
    assert 1 <= line["accepted_per_step"] <= 4
    assert run(*ask) == 0
    out, err = capsys.readouterr()
    assert out == f"{line['reasoning_content']}\n\n825\n"
    assert err.splitlines()[-1].startswith(f"[{len(line['ids'])} tokens, stop; decode ")
    assert run(*ask, "--json", "--stop", "2") == 0
    assert lines(capsys)[0]["text"] == line["text"].removesuffix("25")


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("prompt", ["", "<|im_end|></think><tool_call>", "\0\x1b[31m", "é" * 50])
def test_strange_prompts_are_text(capsys, whole, prompt):
    ask = ["generate", "--model", whole, "--max-tokens", "1", "--speculate", "0", "--temperature", "0", "--json"]
    assert run(*ask, "--prompt", prompt) == 0
    assert run(*ask, "--prompt", prompt, "--raw") == 0
    assert run(*ask, "--prompt", prompt, "--no-thinking", "--system", prompt) == 0
    assert len(lines(capsys)) == 3


def test_a_prompt_that_is_no_unicode_is_refused(capsys):
    assert "lone surrogate" in refused(capsys, "generate", "--prompt", "\udcff")


def test_a_json_line_is_one_line_in_ascii(capsys, monkeypatch, bare, tokens):
    """U+2028 and others end a line for str.splitlines, and a terminal's encoding may lack any letter."""
    monkeypatch.setattr("stepjax.infer.commands.generate._as_dict", lambda done: {"text": "a\u2028é\x85"})
    assert run("generate", "--model", bare, "--tokens", tokens, "--max-tokens", 1, "--json") == 0
    assert [line["text"] for line in lines(capsys)] == ["a\u2028é\x85"] * 2


def test_an_answer_is_printed_as_it_is(capsys):
    printer, answer = Printer(), "a\tb :smile: [bold]x[/bold] " + "w" * 200 + "     \n\n"
    for piece in (answer, " ", "\ttail  "):
        printer.write(Delta("", (Part(ContentDelta(piece), 0),)))
    printer.write(Delta("", (Part(ContentDelta("\x1b[2J\r"), 0),)))
    printer.end()
    assert capsys.readouterr().out == answer + " \ttail  \ufffd[2J\ufffd\n"


def test_the_checkpoints_defaults_are_checked_unless_a_flag_replaces_them():
    with pytest.raises(RequestError, match=r"generation_config\.json: temperature: is -1"):
        SamplingParams.from_defaults({"temperature": -1})
    assert SamplingParams.from_defaults({"temperature": -1}, temperature=0.5).temperature == 0.5


@pytest.mark.parametrize("home", ["/dev/null/cache", "~nobody-of-this-name/cache"])
def test_without_a_folder_for_compiled_programs_there_is_none(monkeypatch, home):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.delenv("STEPJAX_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", home)
    monkeypatch.setattr(jax.config, "update", lambda *change: pytest.fail(f"{change}"))
    assert use_caches() is None


# The streams of a process


def test_output_that_nobody_reads_is_no_error():
    done = process(
        "stepjax info step-tiny | true; echo ${PIPESTATUS[0]};"
        "stepjax info step-tiny --json | head -1 >/dev/null; echo ${PIPESTATUS[0]}"
    )
    assert (done.stdout, done.stderr) == ("0\n0\n", "")


def test_closed_streams():
    done = process("stepjax info step-tiny >&- && stepjax info step-tiny --json >&- <&-")
    assert (done.returncode, done.stderr) == (0, "")
    assert process("stepjax info nope >&- 2>&-").returncode == 1


def test_an_encoding_without_the_letters():
    done = process("stepjax info step-tiny", env={"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, "")
    assert "2,3" in done.stdout


def test_without_home_and_from_another_folder(tmp_path):
    done = process("env -u HOME -u XDG_CACHE_HOME stepjax info step-tiny --json", cwd=tmp_path)
    assert done.returncode == 0
    assert list(tmp_path.iterdir()) == []
