"""Two processes with four devices each: the same answers as one device, and each reads its own part."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from adapters import lora_config, trained
from checkpoints import speaking_folder
from devices import with_devices
from packed_folders import folder_of
from ports import two_free_ports
from two_processes import GUIDED, constraints, requests

from stepjax.adapters.merge import merge_checkpoint
from stepjax.adapters.peft import export_adapter
from stepjax.checkpoint.reader import Checkpoint
from stepjax.cli import VERBS, main
from stepjax.infer.engine.config import EngineConfig
from stepjax.infer.engine.engine import Engine
from stepjax.infer.generate import generate
from stepjax.infer.load import load
from stepjax.infer.sampling.params import SamplingParams
from stepjax.train.runs.folder import read_metrics
from stepjax.train.tune.trainable import load_leaves

ROOT = Path(__file__).resolve().parent.parent
TOKENS = [[0, 3, 5, 300, 17] * 8, [7, 8] * 20]  # one shape, so that each program compiles once


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return speaking_folder(tmp_path_factory.mktemp("hosts") / "model")


def together(*args: object, cwd: Path, devices: int | None = 4) -> list[str]:
    """What each of two processes prints on stdout: of a stepjax command, or of a task of ``two_processes.py``."""
    port = two_free_ports()

    def command(process: int) -> list[str]:
        if args[0] in VERBS:
            place = ["--coordinator", f"localhost:{port}", "--processes", "2", "--process-id", str(process)]
            return ["-m", "stepjax", *map(str, args), *place]
        return [str(ROOT / "tests" / "two_processes.py"), str(port), str(process), *map(str, args)]

    running = [
        subprocess.Popen(
            [sys.executable, *command(process)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**with_devices(devices), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
            cwd=cwd,
        )
        for process in (0, 1)
    ]
    ended = [each.communicate(timeout=300) for each in running]
    for each, (_, errors) in zip(running, ended, strict=True):
        assert each.returncode == 0, errors
    return [out for out, _ in ended]


@pytest.mark.parametrize(
    "mesh",
    [
        ("--mesh", "expert=8"),
        pytest.param(
            ("--mesh", "data=2,expert=4", "--strategy", "wide_data", "--dispatch", "node"), marks=pytest.mark.slow
        ),
    ],
)
def test_scores_are_those_of_one_device(folder, tmp_path, mesh):
    (tmp_path / "in.json").write_text(json.dumps(TOKENS))
    flags = ["--model", folder, "--tokens", "in.json", "--out", "out.npz", "--dtype", "float32", "--mtp"]
    outs = together("score", *flags, *mesh, cwd=tmp_path)
    assert outs == ["out.npz: 2 sequences, 80 tokens\n", ""]
    session = load(folder, dtype="float32")
    with np.load(tmp_path / "out.npz") as found:
        for j, ids in enumerate(TOKENS):
            logits, depths = session.score(ids)
            np.testing.assert_allclose(found[f"p{j}_logits"], logits, atol=2e-4)
            for k, depth in enumerate(depths, start=1):
                np.testing.assert_allclose(found[f"p{j}_mtp{k}_logits"], depth, atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["int4", "nvfp4", "mxfp4"])
def test_what_other_tools_read_is_scored_by_two_processes(folder, tmp_path, form):
    """Experts in another tool's form, whose groups the mesh cuts, and MTP layers of another checkpoint."""
    assert main(["convert", str(folder), str(tmp_path / "packed"), "--form", form]) == 0
    (tmp_path / "in.json").write_text(json.dumps(TOKENS[:1]))
    flags = ["--model", "packed", "--tokens", "in.json", "--out", "out.npz", "--dtype", "float32", "--mtp"]
    together("score", *flags, "--mtp-from", folder, "--mesh", "expert=4,tensor=2", cwd=tmp_path)
    logits, depths = load(tmp_path / "packed", dtype="float32").score(TOKENS[0])
    with np.load(tmp_path / "out.npz") as found:
        np.testing.assert_allclose(found["p0_logits"], logits, atol=2e-4)
        np.testing.assert_allclose(found["p0_mtp3_logits"], depths[2], atol=2e-4)


LAYOUTS = "int8-zeros int4-channel fp8-block modelopt-nvfp4 awq gptq gptq8 gptq-order q4_0.gguf".split()


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("case", LAYOUTS)
def test_every_layout_is_scored_by_two_processes(folder, tmp_path, case):
    """Each process reads its half of the experts, and of their widths."""
    model = tmp_path / "model.gguf" if case.endswith(".gguf") else tmp_path / "model"
    if case.endswith(".gguf"):
        assert main(["convert", str(folder), str(model), "--form", case.removesuffix(".gguf")]) == 0
    else:
        folder_of(model, case)
    ids = [token % 128 for token in TOKENS[0]]
    (tmp_path / "in.json").write_text(json.dumps([ids]))
    flags = ["--model", model, "--tokens", "in.json", "--out", "out.npz", "--dtype", "float32"]
    together("score", *flags, "--mesh", "expert=2,tensor=2", cwd=tmp_path, devices=2)
    with np.load(tmp_path / "out.npz") as found:
        expected = load(model, dtype="float32").logits(ids)
        np.testing.assert_allclose(found["p0_logits"], expected, atol=2e-4)  # sums in another order


@pytest.mark.long
@pytest.mark.slow
def test_two_checkpoints_are_compared_by_two_processes(folder, tmp_path):
    """Each process takes part in both checkpoints' passes, and one of them writes."""
    assert main(["convert", str(folder), str(tmp_path / "packed"), "--form", "int8"]) == 0
    (tmp_path / "in.json").write_text(json.dumps(TOKENS))
    flags = [
        "--model",
        tmp_path / "packed",
        "--against",
        folder,
        "--tokens",
        tmp_path / "in.json",
        "--dtype",
        "float32",
    ]
    outs = together("score", *flags, "--out", tmp_path / "two.npz", "--mesh", "expert=8", cwd=tmp_path)
    assert outs[1] == ""
    assert main([*map(str, ["score", *flags, "--out", tmp_path / "one.npz"])]) == 0
    two, one = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("two", "one"))
    assert two["kl"]["mean"] == pytest.approx(one["kl"]["mean"], rel=1e-3, abs=1e-6)
    assert two["router_agreement"]["mean"] == one["router_agreement"]["mean"]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(("strategy", "slots"), [("expert_tensor", ()), ("wide", ()), ("wide", (16,))])
def test_an_engine_that_the_others_follow_answers_as_one_device(folder, tmp_path, strategy, slots):
    """Orders, announced compilations, preemptions, snapshots, sampling rules, masks and moves of experts reach the
    other process, and each keeps its own part of what goes to host memory.
    """
    outs = together("answer", folder, "expert=4,tensor=2", strategy, *slots, cwd=tmp_path)
    first, second = (out.splitlines()[-1] for out in outs)
    found = json.loads(first)  # after what gloo says
    assert second == "followed"
    assert found["preemptions"] > 0
    assert found["loaded"] > 0 or strategy == "wide"  # whose four shards keep the pages
    assert (found["moved"] > 0) == bool(slots)
    session = load(folder, dtype="float32")
    config = EngineConfig(num_slots=1, context=128, speculate=0, num_snapshots=0, widths=(32,), token_budget=32)
    engine = Engine(session, config)
    asked, guided = requests(SamplingParams), constraints(session)
    for id, (prompt, params) in asked.items():
        engine.add(prompt, params, id=id, constraint=guided.get(id))
    expected: dict[str, list[int]] = {id: [] for id in asked}
    for update in engine.run():
        expected[update.id] += update.tokens
    assert found["answers"] == expected
    assert session.tokenizer
    assert re.fullmatch(GUIDED, session.tokenizer.decode(expected["9"]))
    assert expected["8"].index(session.tokenizer.special.think_close) == 3
    assert set(json.loads(session.tokenizer.decode(expected["8"][4:]))) == {"a"}
    session.grammars.close()


@pytest.mark.slow
def test_processes_take_a_stored_program_together_or_not_at_all(tmp_path):
    """Each has a folder of its own. One whose entry is missing or damaged makes both compile it, and nothing hangs."""

    def compiled() -> list[int]:
        results = [json.loads(out.splitlines()[-1]) for out in together("programs", tmp_path, cwd=tmp_path)]
        assert [result["sums"] for result in results] == [[120.0, 240.0, 360.0]] * 2
        return [result["compiled"] for result in results]

    assert compiled() == [3, 3]
    assert compiled() == [0, 0]
    gone, damaged, _ = sorted((tmp_path / "1" / "programs").iterdir())
    gone.unlink()
    damaged.write_bytes(damaged.read_bytes()[:-10])
    assert compiled() == [2, 2]
    assert compiled() == [0, 0]


@pytest.mark.slow
def test_processes_without_accelerators_make_the_devices_of_the_mesh(folder, tmp_path):
    (tmp_path / "in.json").write_text("[[7, 8]]")
    flags = ["--model", folder, "--tokens", "in.json", "--out", "o.npz", "--mesh", "expert=4"]
    outs = together("score", *flags, cwd=tmp_path, devices=None)
    assert outs == ["o.npz: 1 sequences, 2 tokens\n", ""]


@pytest.mark.long
@pytest.mark.slow
def test_answers_are_those_of_one_device(folder, tmp_path):
    """Sampled with a seed that only process 0 draws would show if the processes disagreed."""
    (tmp_path / "in.json").write_text(json.dumps(TOKENS))
    flags = ["--model", folder, "--tokens", "in.json", "--dtype", "float32", "--max-tokens", "12", "--speculate", "1"]
    greedy = together("generate", *flags, "--json", "--temperature", "0", "--mesh", "expert=4,tensor=2", cwd=tmp_path)
    session = load(folder, dtype="float32")
    params = session.sampling(temperature=0.0, max_tokens=12)
    expected = [generate(session, [ids], params, speculate=0)[0].ids for ids in TOKENS]
    assert [json.loads(line)["ids"] for line in greedy[0].splitlines()] == expected
    assert greedy[1] == ""


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["expert=8", pytest.param("data=2,expert=4", marks=pytest.mark.slow)])
def test_a_process_reads_its_own_part(folder, mesh):
    """Copied weights are read by both; with data outermost each process holds everything."""
    reports = [json.loads(out.splitlines()[-1]) for out in together("load", folder, mesh, cwd=ROOT)]
    whole = Checkpoint(folder).num_bytes
    for report in reports:
        assert report["parts"] <= report["bytes_read"] <= 1.05 * report["parts"]
        assert report["bytes_read"] == whole if mesh.startswith("data") else report["bytes_read"] < 0.75 * whole


@pytest.mark.slow
def test_one_process_asks_a_teacher_and_all_have_its_scores():
    """Equal to the bit, and an error of the one that asks ends both with its class and message."""
    first, second = (json.loads(out.splitlines()[-1]) for out in together("scores", cwd=ROOT, devices=1))
    assert first["results"] == second["results"]
    assert (first["asked"], second["asked"]) == (3, 0)
    values = (np.arange(3, dtype=np.float32) / 3).tolist()
    assert first["results"][:2] == [7, [values, None, None]]
    assert first["results"][4] == [[0.0], [[0, 1]], [[0.0, 0.0]]]
    assert first["results"][5] == "no answer\nin 3 tries"


DICE = """
import random

def drawn(answer):
    return random.random()

def fails(answer):
    raise ValueError(random.random())

class Dice:
    messages = [{"role": "user", "content": "Throw."}]

    def respond(self, turn):
        return str(random.random())

    def reward(self):
        return {"eyes": random.random()}
"""


@pytest.mark.slow
def test_rewards_that_draw_random_numbers_are_the_same_in_all_processes(tmp_path):
    """One process runs the code of the user, and all have what it returned, its failures too."""
    (tmp_path / "dice.py").write_text(DICE)
    first, second = (
        json.loads(out.splitlines()[-1]) for out in together("chances", tmp_path / "dice.py", cwd=ROOT, devices=1)
    )
    assert first["results"] == second["results"]
    assert (first["runs"], second["runs"]) == (True, False)
    assert "ValueError: 0." in first["results"][2]
    assert first["results"][-1].endswith("has no 'none'; it defines Dice, drawn, fails")


@pytest.mark.slow
def test_a_merge_is_written_file_by_file_by_both(folder, tmp_path):
    """The bytes of one process, in files that two wrote."""
    config = Checkpoint(folder).config
    lora = lora_config(targets=("q", "dense"))
    adapter = trained(config, lora)
    peft = export_adapter(tmp_path / "adapter", config, adapter, lora)
    flags = ["--max-shard-gib", "0.0002"]
    first, second = together("merge", folder, peft, tmp_path / "two", *flags, cwd=tmp_path)
    assert "weights changed" in first
    assert second == ""
    one = merge_checkpoint(folder, tmp_path / "one", adapter, lora, max_shard_bytes=int(0.0002 * 2**30)).folder
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "two").iterdir())
    assert len([name for name in names if name.startswith("model-")]) > 4
    for name in names:
        assert (one / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "one", "two"]


@pytest.mark.slow
@pytest.mark.long
def test_a_run_of_two_processes_goes_on_with_one(tmp_path):
    """The last checkpoint of the former is taken away: the latter begins with the bits of the one before, and logs the
    losses that the former logged, to 1e-6.
    """
    (tmp_path / "config.toml").write_text(TUNE)
    run = tmp_path / "run"
    together("distill", "config.toml", "--out", "run", "--set", 'model.mesh="data=2,expert=4"', cwd=tmp_path)
    before = {record["step"]: record for record in read_metrics(run)}
    first = load_leaves(run / "leaves" / "4.safetensors")[0]
    shutil.rmtree(run / "checkpoints" / "4")
    assert main(["distill", str(tmp_path / "config.toml"), "--out", str(run)]) == 0
    after = {record["step"]: record for record in read_metrics(run)}
    assert list(before) == list(after) == [0, 1, 2, 3]
    for step in after:
        assert after[step]["loss"] == pytest.approx(before[step]["loss"], abs=1e-6)
        assert after[step]["tokens"] == before[step]["tokens"]
    for name, leaf in load_leaves(run / "leaves" / "4.safetensors")[0].items():
        np.testing.assert_allclose(leaf, first[name], atol=2e-4)  # Adam's first steps divide by tiny moments


TUNE = """
[lora]
rank = 2
targets = ["q", "shared"]
experts = "none"
[data.tasks]
shares = { add = 0.5, copy = 0.5 }
[teachers.main]
path = "step-tiny"
[rollout]
prompts = 4
max_tokens = 12
slots = 4
[optim]
steps = 4
lr = 1e-3
warmup_steps = 1
rows = 2
length = 96
[eval]
every = 0
[run]
save_every = 2
"""
