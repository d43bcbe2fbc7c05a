"""Experts rounded by what they see: less error than rounding to nearest, every expert covered, the same bytes again."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import speaking_folder

from stepjax.calibration.budget import LayerBits, chosen_bits
from stepjax.calibration.certificate import log_softmax
from stepjax.calibration.data import HELD_OUT, read_data
from stepjax.calibration.encoder import COVERED, covered, hidden
from stepjax.calibration.forward import Forward
from stepjax.calibration.rounding import gptq
from stepjax.checkpoint.folder import open_folder, open_weights
from stepjax.checkpoint.reader import Checkpoint
from stepjax.cli import main
from stepjax.errors import RequestError
from stepjax.infer.load import load
from stepjax.infer.session import Session
from stepjax.ops.swiglu import swiglu
from stepjax.packings.mixed_integers import MixedInts
from stepjax.packings.written import FORMS, PackedInts, rounded_groups


def inputs_and_weights(seed: int, *, columns: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Correlated inputs, as activations are, and a matrix."""
    random = np.random.default_rng(seed)
    mixing = random.standard_normal((8, columns)) + 0.1 * random.standard_normal((8, columns))
    x = random.standard_normal((400, 8)) @ mixing + 0.3 * random.standard_normal((400, columns))
    return x.astype(np.float32), (0.2 * random.standard_normal((24, columns))).astype(np.float32)


def output_error(x: np.ndarray, w: np.ndarray, q: np.ndarray, scale: np.ndarray) -> float:
    wide = (q.reshape(*scale.shape, -1) * scale.astype(np.float32)[..., None]).reshape(w.shape)
    return float(np.square(x @ (wide - w).T).sum() / np.square(x @ w.T).sum())


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("bits", [4, 8])
def test_outputs_are_nearer_than_those_of_rounding_to_nearest(seed, bits):
    x, w = inputs_and_weights(seed)
    q, scale = gptq(w, x.T @ x, bits=bits, columns=32)
    assert np.abs(q).max() <= 1 << (bits - 1)
    plain = rounded_groups(w.reshape(24, -1, 32), bits)
    assert output_error(x, w, q, scale) < 0.5 * output_error(x, w, *plain)


def test_rounding_is_that_of_the_definition():
    """Column by column over the whole matrix, with the inverse made anew for the columns that are left."""
    x, w = inputs_and_weights(3, columns=8)
    moments = x.T.astype(np.float64) @ x
    q, scale = gptq(w, moments, bits=4, columns=8)
    step = scale.astype(np.float64)[:, 0]
    h = moments + 0.01 * np.diag(moments).mean() * np.eye(8)
    left = w.astype(np.float64)
    for j in range(8):
        inverse = np.linalg.inv(h[j:, j:])
        chosen = np.clip(np.rint(left[:, j] / step), -8, 7)
        np.testing.assert_array_equal(q[:, j], chosen)
        left[:, j:] -= np.outer((left[:, j] - chosen * step) / inverse[0, 0], inverse[0])


def test_inputs_without_any_size_are_rounded_to_nearest():
    _, w = inputs_and_weights(4)
    q, scale = gptq(w, np.zeros((64, 64), np.float32), bits=4, columns=32)
    assert np.isfinite(scale.astype(np.float32)).all()
    wide = q.reshape(24, 2, 32) * scale.astype(np.float32)[..., None]
    assert np.abs(wide.reshape(w.shape) - w).max() < 0.2


def test_an_expert_of_few_tokens_is_covered_by_its_layer():
    random = np.random.default_rng(0)
    own, layer = random.standard_normal((5, 7)), random.standard_normal((300, 7))
    expected = own.T @ own + (COVERED - 5) / 300 * layer.T @ layer
    np.testing.assert_allclose(covered(own, layer), expected, rtol=1e-5)
    np.testing.assert_array_equal(covered(layer, own), layer.T @ layer)
    np.testing.assert_allclose(covered(own[:0], layer), COVERED / 300 * layer.T @ layer, rtol=1e-5)


@pytest.mark.parametrize("limit", [None, 0.3])
def test_what_a_down_projection_is_given(limit):
    random = np.random.default_rng(1)
    x, gate, up = (random.standard_normal(shape).astype(np.float32) for shape in ((9, 6), (4, 6), (4, 6)))
    expected = swiglu(jnp.asarray(x @ gate.T), jnp.asarray(x @ up.T), limit)
    np.testing.assert_allclose(hidden(x, gate, up, limit), expected, atol=1e-6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return speaking_folder(tmp_path_factory.mktemp("calibrated") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    random = np.random.default_rng(5)
    path = tmp_path_factory.mktemp("data") / "tokens.json"
    path.write_text(json.dumps(random.integers(0, 500, (9, 24)).tolist()))
    return path


def test_a_forward_pass_is_the_session_s(folder):
    rows = [list(range(20, 50)), [4, 5, 6]]
    forward, session = Forward(open_weights(folder)), load(folder, dtype="float32")
    for ids, ours in zip(rows, forward.scored(rows), strict=True):
        logits, experts = session.routed(ids)
        np.testing.assert_allclose(ours.logits, logits, atol=2e-4)
        np.testing.assert_array_equal(ours.experts, experts)
    given = forward.layer_inputs(rows)
    assert set(given) == {1, 2}
    assert given[1].x.shape == (33, 64)
    router = np.asarray(session.params["layers.1.moe.router.weight"], np.float32)
    bias = np.asarray(session.params["layers.1.moe.router.bias"])
    scores = 1 / (1 + np.exp(-given[1].x @ router.T)) + bias
    np.testing.assert_array_equal(np.sort(given[1].ids), np.sort(np.argsort(-scores)[:, :2]))


def test_a_calibrated_folder_has_its_certificate(capsys, folder, data, tmp_path):
    for name in ("one", "two"):
        assert main(["convert", str(folder), str(tmp_path / name), "--form", "int4", "--calibrate", str(data)]) == 0
    assert "on 24 tokens that were held out" in capsys.readouterr().out
    assert Checkpoint(tmp_path / "one").stored_as("layers.1.moe.experts.up") == "pack-quantized int4, groups of 32"
    found = json.loads((tmp_path / "one" / "quantisation.json").read_text())
    assert found["data"]["tokens"] == 8 * 24
    assert found["data"]["held_out_rows"] == 1
    assert set(found["experts"]) == {"1", "2"}
    assert found["experts"]["1"]["experts_joined_by_their_layer"] == 8  # none has 256 tokens
    assert 0 < found["experts"]["2"]["output_error"] < 0.2
    assert 0 < found["held_out"]["kl"]["mean"] < 1
    assert found["command"].startswith(f"stepjax convert {folder} {tmp_path / 'one'} --form int4 --calibrate")
    for file in (tmp_path / "one").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
    again = json.loads((tmp_path / "two" / "quantisation.json").read_text())
    assert {**again, "command": ""} == {**found, "command": ""}


def test_one_row_of_eight_is_held_out(folder, tmp_path):
    path = tmp_path / "tokens.json"
    path.write_text(json.dumps([[i, i + 1] for i in range(20)]))
    data = read_data(path, open_folder(folder))
    assert [row[0] for row in data.held_out] == [HELD_OUT - 1, 2 * HELD_OUT - 1]
    assert len(data.rows) == 18
    text = tmp_path / "text.txt"
    text.write_text("What is 3 + 4? " * 400)
    rows = read_data(text, open_folder(folder))
    assert len(rows.held_out) == 1
    assert max(map(len, rows.rows)) == 512


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[[1, 2]]", "holds 1 rows, expected at least 2"),
        ("[[1], [2, 512]]", "row 1 holds 512, expected integers from 0 to 511"),
        ("[[1], [true]]", "row 1 holds True"),
        ("[[1], []]", "expected a JSON list of lists"),
        ("{", "not valid JSON"),
    ],
)
def test_data_that_are_no_rows_of_tokens(folder, tmp_path, content, message):
    path = tmp_path / "tokens.json"
    path.write_text(content)
    with pytest.raises(RequestError, match=message):
        read_data(path, open_folder(folder))


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--form", "nvfp4"], "goes with --form int4 or int8"), (["--experts", "bf16"], "--calibrate: goes with --form")],
)
def test_what_is_not_calibrated_is_said(capsys, folder, data, tmp_path, flags, message):
    assert main(["convert", str(folder), str(tmp_path / "out"), *flags, "--calibrate", str(data)]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_budget_gives_more_bits_to_the_layers_that_cost_most(folder, data, tmp_path, capsys):
    asked = ["--form", "int4", "--calibrate", str(data), "--budget", "6"]
    for name in ("one", "two"):
        assert main(["convert", str(folder), str(tmp_path / name), *asked]) == 0
    mixed = Checkpoint(tmp_path / "one")
    found = json.loads((tmp_path / "one" / "quantisation.json").read_text())
    bits, costs = found["bits"]["layers"], found["bits"]["kl_of_each_in_4_bits"]
    assert sorted(bits.values()) == [4, 8]
    assert found["bits"]["mean"] == 6
    assert bits[max(costs, key=costs.__getitem__)] == 8
    for layer, count in bits.items():
        name = {4: "pack-quantized int4, groups of 32", 8: "pack-quantized int8, groups of"}[count]
        assert mixed.stored_as(f"layers.{layer}.moe.experts.up").startswith(name)
    for file in (tmp_path / "one").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
    again = json.loads((tmp_path / "two" / "quantisation.json").read_text())
    assert {**again, "command": ""} == {**found, "command": ""}
    assert "--budget 6" in found["command"]
    assert "experts in int4 and int8" in capsys.readouterr().out


def test_a_layer_costs_what_its_rounding_does_to_the_model(folder):
    """By hand: a folder of which one layer alone was rounded."""
    rows = [list(range(20, 60)), list(range(100, 130))]
    source, form = open_weights(folder), FORMS["int4"]
    assert isinstance(form, PackedInts)
    forward = Forward(source)
    found = chosen_bits(6, forward, source, form, rows)
    values = {path: np.array(source.read(path, dtype=np.float32)) for path in source.paths}
    for path in [path for path in values if path.startswith("layers.2.moe.experts.")]:
        shape = values[path].shape
        q, scale = rounded_groups(values[path].reshape(*shape[:2], -1, 32), 4)
        values[path] = (q * scale.astype(np.float32)[..., None]).reshape(shape)
    session = Session(source.config, {p: jnp.asarray(v) for p, v in values.items()}, dtype=jnp.float32)
    with forward.replaced({}):
        plain = forward.scored(rows)
    p, q = (
        np.concatenate([log_softmax(x) for x in logits])
        for logits in ([s.logits for s in plain], [session.logits(ids) for ids in rows])
    )
    assert found.costs[2] == pytest.approx((np.exp(p) * (p - q)).sum(axis=-1).mean(), rel=1e-3)
    assert found.fine == (max(found.costs, key=found.costs.__getitem__),)
    assert isinstance(found.form(form), MixedInts)
    whole = LayerBits(8, found.costs, 1, tuple(found.costs))
    assert (whole.form(form), LayerBits(4, found.costs, 1, ()).form(form)) == (FORMS["int8"], form)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--form", "int8", "--budget", "6"], "goes with --form int4"),
        (["--form", "int4", "--budget", "9"], "is 9, expected 4 to 8 bits"),
        (["--form", "int4", "--budget", "nan"], "is nan, expected 4 to 8 bits"),
    ],
)
def test_budgets_that_are_no_choice(capsys, folder, data, tmp_path, flags, message):
    assert main(["convert", str(folder), str(tmp_path / "out"), *flags, "--calibrate", str(data)]) == 1
    assert message in capsys.readouterr().err
    assert main(["convert", str(folder), str(tmp_path / "out"), *flags]) == 1
    assert "give it together with --calibrate" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
