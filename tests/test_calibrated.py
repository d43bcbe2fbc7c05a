"""Experts rounded by what they see: less error than rounding to nearest, every expert covered, the same bytes again."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import speaking_folder

from stepjax.calibration.data import HELD_OUT, read_data
from stepjax.calibration.encoder import COVERED, covered, hidden
from stepjax.calibration.forward import Forward
from stepjax.calibration.rounding import gptq
from stepjax.checkpoint.folder import open_folder, open_weights
from stepjax.checkpoint.reader import Checkpoint
from stepjax.cli import main
from stepjax.errors import RequestError
from stepjax.infer.load import load
from stepjax.ops.swiglu import swiglu
from stepjax.packings.written import rounded_groups


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
    [(["--form", "nvfp4"], "goes with --form int4 or int8"), (["--experts", "int4"], "--calibrate: goes with --form")],
)
def test_what_is_not_calibrated_is_said(capsys, folder, data, tmp_path, flags, message):
    assert main(["convert", str(folder), str(tmp_path / "out"), *flags, "--calibrate", str(data)]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
