"""The full-parameter trainer: losses against a slow twin, exact resumption, and agreement across devices."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from tiny import random_params, small_config

from stepjax.cli import main
from stepjax.config import ASSETS, ModelConfig
from stepjax.errors import ConfigError, TrainingError
from stepjax.model.cache import Chunk
from stepjax.model.step3p5 import abstract, axes_of, bind
from stepjax.sharding.mesh import MeshSpec
from stepjax.sharding.mesh_layout import MeshLayout
from stepjax.sharding.rules import ShardingRules as RuleTable
from stepjax.train.config.mix import MIX
from stepjax.train.config.pretrain import PretrainConfig, read_pretrain
from stepjax.train.config.reader import write_settings
from stepjax.train.losses.next_token import losses
from stepjax.train.packing.rows import Example, PackedRows, pack
from stepjax.train.pretrain import loop
from stepjax.train.pretrain.accuracy import TaskScore
from stepjax.train.pretrain.step import Placement, TrainState, balanced, make_step, split_biases
from stepjax.train.runs.optimizer import adamw, learning_rate

CONFIG = small_config()
MODEL = abstract(CONFIG, dtype=jnp.float32)


@pytest.fixture(scope="module")
def rows() -> PackedRows:
    rng = np.random.default_rng(0)
    examples = [
        Example(rng.integers(8, 128, p).tolist(), rng.integers(8, 128, c).tolist())
        for p, c in [(5, 7), (3, 2), (9, 12), (1, 1), (4, 9), (6, 8), (2, 20)]
    ]
    packed = pack(examples, 32)
    assert len(packed.ids) % 2 == 0
    return packed


@pytest.fixture(scope="module")
def params() -> dict[str, jax.Array]:
    return random_params(CONFIG, 3)


@jax.jit
def all_heads(params: dict[str, jax.Array], ids: jax.Array) -> list[jax.Array]:
    model, chunk = bind(MODEL, params), Chunk.whole(*ids.shape)
    hidden = model.forward(ids, chunk).hidden_BTD
    states = model.mtp_hidden(ids, hidden, chunk)
    return [model.logits(hidden)] + [layer.logits(h) for layer, h in zip(model.mtp, states, strict=True)]


def one_by_one(params: dict[str, jax.Array], rows: PackedRows) -> tuple[list[float], list[float]]:
    """Loss and accuracy per depth, example by example, without packing, rolling or masks."""
    sums, counts, hits = np.zeros(4), np.zeros(4), np.zeros(4)
    for ids, segments, mask in zip(rows.ids, rows.segment_ids, rows.loss_mask, strict=True):
        for segment in range(1, segments.max() + 1):
            here = segments == segment
            tokens, wanted = ids[here], mask[here]
            padded = jnp.zeros((1, 32), jnp.int32).at[0, : len(tokens)].set(tokens)
            for k, logits in enumerate(np.asarray(each[0], np.float64) for each in all_heads(params, padded)):
                for t in range(len(tokens) - k - 1):
                    if wanted[t + k + 1]:
                        row = logits[t] - logits[t].max()
                        sums[k] -= row[tokens[t + k + 1]] - np.log(np.exp(row).sum())
                        hits[k] += row.argmax() == tokens[t + k + 1]
                        counts[k] += 1
    return (sums / counts).tolist(), (hits / counts).tolist()


@pytest.mark.slow
def test_packed_losses_equal_those_of_the_examples_one_by_one(params, rows):
    found = jax.jit(lambda p, r: losses(bind(MODEL, p), r, mtp_weight=0.3))(params, jax.tree.map(jnp.asarray, rows))
    loss, accuracy = one_by_one(params, rows)
    np.testing.assert_allclose([found.next_token, *found.mtp], loss, rtol=2e-5)
    np.testing.assert_allclose(found.accuracy, accuracy, rtol=1e-6)
    np.testing.assert_allclose(found.total, loss[0] + 0.3 * np.mean(loss[1:]), rtol=2e-5)


def test_load_counts_the_real_tokens(params, rows):
    found = jax.jit(lambda p, r: losses(bind(MODEL, p), r, mtp_weight=0.0))(params, jax.tree.map(jnp.asarray, rows))
    for load in found.load:
        assert int(load.sum()) == CONFIG.top_k * int((rows.segment_ids > 0).sum())


def test_the_balance_rule_lifts_experts_below_their_share():
    bias, load = jnp.asarray([0.1, 0.0, -0.2, 0.0]), jnp.asarray([10, 2, 4, 4])
    np.testing.assert_allclose(balanced(bias, load, jnp.asarray(0.01)), [0.09, 0.01, -0.19, 0.01], atol=1e-7)
    assert (balanced(bias, jnp.full((4,), 3), jnp.asarray(0.01)) == bias).all()


def test_the_schedule_has_its_corners():
    schedule = learning_rate(1.0, warmup=10, decay_from=50, steps=100, floor=0.02)
    found = [float(np.asarray(schedule(step))) for step in (0, 9, 10, 49, 50, 75, 100)]
    np.testing.assert_allclose(found, [0.1, 1, 1, 1, 1, 0.51, 0.02], rtol=1e-5)


def run_steps(
    params, rows, *, devices: int = 1, layout: MeshLayout | None = None, count: int, of: ModelConfig = CONFIG
) -> tuple[TrainState, list[float]]:
    """Steps on copies of the state, or on the parts of it that a layout makes."""
    schedule = learning_rate(1e-2, warmup=2, decay_from=50, steps=100, floor=0.1)
    optimizer = adamw(schedule, b1=0.9, b2=0.98, weight_decay=0.01, clip=1.0)
    trained, biases = split_biases(jax.tree.map(jnp.copy, params))
    state = TrainState(trained, biases, optimizer.init(trained), jnp.zeros((), jnp.int32))
    model = abstract(of, dtype=jnp.float32, layout=layout)
    if layout:
        placement = Placement.split(layout, state, rows, axes_of(model))
    else:
        mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
        placement = Placement.data_parallel(mesh)
    mtp_weight = 0.3 if of.mtp_layers else 0.0
    step = make_step(model, optimizer, schedule, placement, mtp_weight=mtp_weight, balance_rate=1.0)
    state = jax.device_put(state, placement.state)
    history = []
    for _ in range(count):
        state, report = step(state, jax.tree.map(jnp.asarray, rows))
        history.append(float(report.losses.total))
    return state, history


@pytest.mark.long
@pytest.mark.slow
def test_two_devices_learn_what_one_learns(params, rows):
    one, losses_one = run_steps(params, rows, devices=1, count=6)
    two, losses_two = run_steps(params, rows, devices=2, count=6)
    np.testing.assert_allclose(losses_one, losses_two, rtol=1e-4)
    assert losses_one[-1] < 0.8 * losses_one[0]
    for name in one.biases:
        np.testing.assert_array_equal(one.biases[name], two.biases[name])
    norms = [name for name in one.params if name.endswith("norm.weight")]
    assert all((one.params[name] != params[name]).any() for name in norms if name.startswith("layers"))


@pytest.mark.slow
def test_a_state_in_parts_learns_what_a_whole_one_learns(rows):
    short = dataclasses.replace(CONFIG, layers=CONFIG.layers[:2], mtp_layers=())  # for the sake of compiling
    params = random_params(short, 3)
    spec = MeshSpec(data=2, expert=2, tensor=2)
    layout = MeshLayout(spec.build(), RuleTable(short, spec, "fsdp"))
    _, whole = run_steps(params, rows, count=4, of=short)
    state, parts = run_steps(params, rows, layout=layout, count=4, of=short)
    np.testing.assert_allclose(parts, whole, rtol=1e-4)
    gate = state.params["layers.1.moe.experts.gate"]
    assert gate.sharding.shard_shape(gate.shape) == (8 // 2, 32 // 2, 64 // 2)
    leaves = jax.tree_util.tree_leaves_with_path(state.optimizer)
    moments = [leaf for path, leaf in leaves if "layers.1.moe.experts.gate" in jax.tree_util.keystr(path)]
    assert [moment.sharding for moment in moments] == [gate.sharding] * 2


SHORT = PretrainConfig(
    devices=2,
    rows=2,
    length=160,
    steps=6,
    warmup_steps=1,
    decay_from=4,
    mtp_from=3,
    log_every=1,
    save_every=2,
    held_out_every=3,
    keep=(4,),
)


def two_layers(folder: Path) -> Path:
    """A folder of assets in which step-tiny has a dense layer, one with experts and one head."""
    name = SHORT.model
    shutil.copytree(ASSETS / name, folder / name, ignore=shutil.ignore_patterns("*.safetensors*"))
    file = folder / name / "config.json"
    hub = json.loads(file.read_text())
    for field in ("layer_types", "rope_theta", "partial_rotary_factors", "swiglu_limits", "swiglu_limits_shared"):
        hub[field] = [hub[field][layer] for layer in (0, 1, hub["num_hidden_layers"])]
    fewer = {"num_hidden_layers": 2, "num_nextn_predict_layers": 1, "moe_layers_enum": "1"}
    file.write_text(json.dumps(hub | fewer))
    return folder


@pytest.fixture(scope="module")
def brief(tmp_path_factory) -> Callable[[pytest.MonkeyPatch], None]:
    """Has runs of `SHORT` train two layers, with the compiled functions of the first run: nearly all of their time goes
    into tracing and compiling.
    """
    assets = two_layers(tmp_path_factory.mktemp("assets"))
    made: dict[Any, Any] = {}

    def once(make: Callable[..., Any], key: Callable[..., Any]) -> Callable[..., Any]:
        def kept(*args: Any, **options: Any) -> Any:
            name = make, key(*args, **options)
            if name not in made:
                made[name] = make(*args, **options)
            return made[name]

        return kept

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("make_step", "make_held_out"):
            monkeypatch.setattr(loop, name, once(getattr(loop, name), lambda *_, mtp_weight, **__: mtp_weight))
        stored = once(loop.StoredFunction, lambda name, function, **_: (name, function))
        monkeypatch.setattr(loop, "StoredFunction", stored)
        for module in ("stepjax.config", "stepjax.train.pretrain.loop", "stepjax.train.pretrain.release"):
            monkeypatch.setattr(f"{module}.ASSETS", assets)

    return patch


@pytest.fixture(scope="module")
def finished(tmp_path_factory, brief) -> tuple[Path, TrainState]:
    out = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as monkeypatch:
        brief(monkeypatch)
        return out, loop.pretrain(SHORT, out)


@pytest.mark.slow
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(finished, brief, tmp_path, monkeypatch):
    """Killed after the save at step 2, in the middle of step 4 (the MTP heads have joined), and finished."""
    whole, expected = finished
    brief(monkeypatch)
    monkeypatch.chdir(tmp_path)  # a relative folder is what people type
    out, real, calls = Path("parts"), loop.task_batches.batch, []

    def failing(*args, step, **kwargs):
        calls.append(step)
        if step == 4 and calls.count(4) == 1:
            raise KeyboardInterrupt
        return real(*args, step=step, **kwargs)

    monkeypatch.setattr(loop.task_batches, "batch", failing)
    with pytest.raises(KeyboardInterrupt):
        loop.pretrain(SHORT, out)
    found = loop.pretrain(SHORT, out)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_array_equal(a, b)

    def history(folder: Path) -> list[dict]:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if k != "tokens_per_s"} for line in lines]

    assert history(out) == history(whole)
    assert [record["step"] for record in history(out) if "loss" in record] == list(range(6))
    held_out = [record for record in history(out) if "held_out_loss" in record]
    assert [record["step"] for record in held_out] == [2, 5]
    assert all(0 < record["held_out_loss"] < 10 for record in held_out)


@pytest.mark.slow
def test_a_run_whose_loss_is_no_number_stops_and_keeps_its_checkpoints(brief, tmp_path, monkeypatch):
    """The step that ruins the weights reports a good loss; the next one finds out."""
    brief(monkeypatch)
    real = loop.make_step

    def ruining(*args, **kwargs):
        update = real(*args, **kwargs)

        def step(state, rows):
            state, report = update(state, rows)
            ruined = jax.tree.map(lambda x: x * jnp.where(state.step == 3, jnp.nan, 1) if x.ndim else x, state)
            return ruined, report

        return step

    monkeypatch.setattr(loop, "make_step", ruining)
    with pytest.raises(TrainingError, match="step 3: the loss is nan"):
        loop.pretrain(SHORT, tmp_path / "run")
    assert [file.name for file in (tmp_path / "run" / "checkpoints").iterdir()] == ["2"]
    assert not (tmp_path / "run" / "weights").exists()


@pytest.mark.long
@pytest.mark.slow
def test_stages_follow_each_other_from_one_command(tmp_path, capsys):
    short = {"rows": 2, "length": 160, "steps": 3, "warmup_steps": 1, "decay_from": 2, "mtp_from": 9}
    for number in (1, 2):
        lines = [f"{name} = {value}" for name, value in (short | {"seed": number}).items()]
        (tmp_path / f"{number}.toml").write_text("\n".join(lines))
    files = [str(tmp_path / f"{number}.toml") for number in (1, 2)]
    assert main(["pretrain", *files, "--out", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.count("3 steps done") == 2
    second = read_pretrain(tmp_path / "run" / "2" / "config.toml")
    assert second.start_from == str(tmp_path / "run" / "1" / "weights" / "3.safetensors")
    first, last = (loop.load_weights(tmp_path / "run" / number, 3) for number in "12")
    assert max(float(np.abs(first[name] - last[name]).max()) for name in first) < 0.05  # a step from there, not anew
    Path(files[1]).write_text('start_from = "x"')
    assert main(["pretrain", *files, "--out", str(tmp_path / "other")]) == 1
    assert "stage 2 starts from the weights of stage 1" in capsys.readouterr().err


@pytest.mark.slow
def test_a_release_that_falls_short_changes_nothing(finished, brief, tmp_path, monkeypatch, capsys):
    brief(monkeypatch)
    score = TaskScore(4, 0.25, 1.5)
    monkeypatch.setattr("stepjax.train.pretrain.release.evaluate", lambda session, **_: dict.fromkeys(MIX, score))
    run, target = str(finished[0]), tmp_path / "released"
    assert main(["release", run, "--out", str(target), "--require", "add=0.95"]) == 1
    assert "add 0.250 < 0.95" in capsys.readouterr().err
    assert not target.exists()
    assert main(["release", run, "--out", str(target), "--require", "add=0.2"]) == 0
    report = json.loads((target / "accuracy.json").read_text())
    digest = hashlib.sha256((finished[0] / "weights" / "6.safetensors").read_bytes()).hexdigest()
    assert [(stage["weights_of_step"], stage["weights_sha256"]) for stage in report["stages"]] == [(6, digest)]
    (target / "config.json").unlink()
    assert main(["release", run, "--out", str(target)]) == 1  # before it grades: that is no checkpoint
    assert "released" in capsys.readouterr().err


@pytest.mark.slow
def test_kept_weights_are_those_of_the_run(finished):
    out, state = finished
    last = loop.load_weights(out, 6)
    assert set(last) == set(loop.weights_of(state))
    for name, value in loop.weights_of(state).items():
        np.testing.assert_array_equal(last[name], value)
    assert (loop.load_weights(out, 4)["embed.weight"] != last["embed.weight"]).any()
    with pytest.raises(ConfigError, match=r"kept the weights of steps \[4, 6\]"):
        loop.load_weights(out, 5)


def test_a_folder_of_a_run_with_other_settings_is_refused(finished):
    with pytest.raises(ConfigError, match="other settings"):
        loop.pretrain(dataclasses.replace(SHORT, seed=1), finished[0])


def test_too_many_devices_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="devices: is 64, but jax sees 8"):
        loop.pretrain(dataclasses.replace(SHORT, devices=64, rows=64), tmp_path)


def test_settings_survive_the_file(tmp_path):
    write_settings(SHORT, tmp_path / "config.toml")
    assert read_pretrain(tmp_path / "config.toml") == SHORT


def test_the_shipped_recipe_reads():
    recipe = Path(__file__).parents[1] / "train" / "recipes" / "step-tiny.toml"
    assert read_pretrain(recipe, ["steps=3000", "peak_lr=1"]).steps == 3000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sped = 3", "sped is not a setting"),
        ("steps = 'many'", "steps: is 'many', expected an integer from 1"),
        ("steps = true", "steps: is True"),
        ("keep = [1.5]", "keep"),
        ("model = 'llama'", "model: is 'llama'"),
        ("rows = 3", "rows: 3 rows cannot be split"),
        ("rows = 0", "rows: is 0"),
        ("decay_from = 9000", "decay_from: is 9000"),
        ("steps = ", "not valid TOML"),
    ],
)
def test_bad_settings_are_refused_by_name(tmp_path, text, message):
    file = tmp_path / "config.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        read_pretrain(file)


def test_the_command_reports_errors_without_a_traceback(tmp_path, capsys):
    assert main(["pretrain", str(tmp_path / "none.toml"), "--out", str(tmp_path)]) == 1
    assert "none.toml: cannot be read" in capsys.readouterr().err
    file = tmp_path / "config.toml"
    file.write_text("")
    assert main(["pretrain", str(file), "--out", str(tmp_path), "--set", "steps"]) == 1
    assert "expected name=value" in capsys.readouterr().err
