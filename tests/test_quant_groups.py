"""Weights in integers: what they hold, how near they are, and that every formulation of the experts agrees on them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import COMPANIONS, integer_folder, speaking_folder

import stepjax.ops.expert_choice
from stepjax.checkpoint.reader import Checkpoint
from stepjax.checkpoint.safetensors_file import SafetensorsFile
from stepjax.checkpoint.writer import save
from stepjax.errors import ConfigError, MeshError, RequestError
from stepjax.infer.load import load
from stepjax.ops.expert_dense import ExpertWeights
from stepjax.ops.experts import routed_experts
from stepjax.weights.formats import FORMATS
from stepjax.weights.int_groups import IntGroups
from stepjax.weights.quantised import Quantised, dequantize, quantise, take

CASES = [("int8", 64), ("int4", 64), ("int4", 32)]
E, D, F = 6, 64, 128


def drawn(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def by_hand(w: np.ndarray, bits: int, group: int) -> np.ndarray:
    """Value by value, with Python's own numbers."""
    out = np.empty_like(w)
    low = 2 ** (bits - 1)
    for lead in np.ndindex(w.shape[:-1]):
        for start in range(0, w.shape[-1], group):
            values = w[lead][start : start + group]
            scale = values[np.abs(values).argmax()] / np.float32(-low)
            scale = np.float32(jnp.bfloat16(scale)) if bits == 4 else np.float32(scale)
            scale = scale or np.float32(1)
            out[lead][start : start + group] = [
                np.float32(min(max(int(np.rint(v / scale)), -low), low - 1)) * scale for v in values
            ]
    return out


@pytest.mark.parametrize(("name", "group"), CASES)
def test_values_are_those_by_hand(name, group):
    w = drawn((2, 3, F))
    w[0, 1] = 0  # a group of zeros has no scale of its own
    held = quantise(w, FORMATS[name].with_group(group))
    bits = int(name[3:])
    expected = by_hand(w, bits, F if bits == 8 else group)
    np.testing.assert_array_equal(np.asarray(dequantize(jax.tree.map(jnp.asarray, held), jnp.float32)), expected)
    assert held.shape == w.shape
    assert held.format.unit_of(w.shape) == (1, F if bits == 8 else group)
    assert held.nbytes == w.size * bits // 8 + held.scale.nbytes


@pytest.mark.parametrize(("name", "group", "bound"), [("int8", 64, 0.011), ("int4", 64, 0.12), ("int4", 32, 0.10)])
def test_errors_are_those_of_the_format(name, group, bound):
    """Of normal values, relative: half a step over √3, a step being the largest of the group over 2^(bits−1)."""
    w = drawn((4, 32, 256))
    held = quantise(w, FORMATS[name].with_group(group))
    wide = np.asarray(dequantize(jax.tree.map(jnp.asarray, held), jnp.float32))
    assert bound / 2 < np.sqrt(np.mean((wide - w) ** 2)) < bound


def test_a_weight_may_be_cut_at_any_group_and_any_expert():
    w = drawn((E, 4, F))
    whole = jax.tree.map(jnp.asarray, quantise(w, IntGroups(4, 32)))
    part = quantise(w[2:4, :, 32:96], IntGroups(4, 32))
    np.testing.assert_array_equal(
        dequantize(whole, jnp.float32)[2:4, :, 32:96], dequantize(jax.tree.map(jnp.asarray, part), jnp.float32)
    )
    np.testing.assert_array_equal(
        take(whole, jnp.asarray([[5, 0]])).dequantize(jnp.float32),
        dequantize(whole, jnp.float32)[jnp.asarray([[5, 0]])],
    )


def test_what_cannot_be_held_is_refused():
    with pytest.raises(ConfigError, match="groups of 64"):
        quantise(drawn((2, 96)), IntGroups(4, 64))
    broken = drawn((2, 64))
    broken[1, 3] = np.inf
    for name in ("int8", "int4"):
        with pytest.raises(ConfigError, match="not finite"):
            quantise(broken, FORMATS[name].with_group(64))


@pytest.mark.parametrize(
    ("name", "group"), [pytest.param(*case, marks=() if case == ("int4", 32) else pytest.mark.slow) for case in CASES]
)
@pytest.mark.parametrize("form", ["gathered", "batched", "capacity", "blocked", "in_turn"])
def test_every_form_agrees_with_the_widened_weights(monkeypatch, name, group, form):
    """Some experts at a time, as where they are large."""
    monkeypatch.setattr(stepjax.ops.expert_choice, "WIDENED_BYTES", 2 * D * F * 4)
    weights = [drawn(shape, at) * 0.1 for at, shape in enumerate([(E, F, D), (E, F, D), (E, D, F)])]
    held = [jax.tree.map(jnp.asarray, quantise(w, FORMATS[name].with_group(group))) for w in weights]
    wide = [dequantize(w, jnp.float32) for w in held]
    x, random = jnp.asarray(drawn((20, D), 7)), np.random.default_rng(8)
    ids = jnp.asarray(np.stack([random.permutation(E)[:2] for _ in range(20)]), jnp.int32)
    combine = jnp.asarray(random.random((20, 2)), jnp.float32)
    expected = routed_experts(x, ids, combine, ExpertWeights(*wide), limit=None, form="reference")
    found = jax.jit(lambda *a: routed_experts(*a, limit=None, form=form))(x, ids, combine, ExpertWeights(*held))
    np.testing.assert_allclose(found, expected, atol=2e-5)  # float32 sums in another order
    gradient = jax.grad(lambda x: routed_experts(x, ids, combine, ExpertWeights(*held), limit=None, form=form).sum())
    wanted = jax.grad(lambda x: routed_experts(x, ids, combine, ExpertWeights(*wide), limit=None, form=form).sum())
    np.testing.assert_allclose(gradient(x), wanted(x), atol=2e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return speaking_folder(tmp_path_factory.mktemp("groups") / "model")


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [None, "expert=8", "expert=4,tensor=2"])
def test_a_checkpoint_is_quantised_as_it_is_read(folder, mesh):
    """Experts only, split by whole experts or between groups; the logits are those of the widened weights."""
    session = load(folder, dtype="float32", quantize="int4", group=16, mesh=mesh)
    kinds = {path: isinstance(value, Quantised) for path, value in session.params.items()}
    assert kinds == {path: ".experts." in path for path in kinds}
    plain = load(folder, dtype="float32")
    wide = dict(plain.params)
    for path in Checkpoint(folder).paths:
        if ".experts." in path:
            held = quantise(np.asarray(plain.params[path]), IntGroups(4, 16))
            wide[path] = dequantize(jax.tree.map(jnp.asarray, held), jnp.float32)
    ids = list(range(20, 60))
    expected = type(plain)(plain.config, wide, dtype=jnp.float32).logits(ids)
    np.testing.assert_allclose(session.logits(ids), expected, atol=2e-4)
    assert np.abs(expected - plain.logits(ids)).max() > 1e-3  # it is another model, if a near one


def test_bad_requests_are_refused(folder):
    with pytest.raises(RequestError, match="int8 or int4"):
        load(folder, quantize="int5")  # pyright: ignore[reportArgumentType]
    with pytest.raises(RequestError, match="expected one of them"):
        load(folder, quantize="int8", keep_fp8=True)
    with pytest.raises(MeshError, match=r"cut inside an int8 group of 32; expected 1 ways, or split whole experts"):
        load(folder, quantize="int8", mesh="expert=4,tensor=2")
    with pytest.raises(MeshError, match="cut inside an int4 group of 32"):
        load(folder, quantize="int4", group=32, mesh="expert=4,tensor=2")
    with pytest.raises(ConfigError, match="groups of 48"):
        load(folder, quantize="int4", group=48)


@pytest.mark.parametrize("form", [("int8", 64), ("int4", 16)])
@pytest.mark.parametrize("mesh", [None, "expert=8"])
def test_a_converted_checkpoint_is_held_as_it_is_stored(folder, tmp_path, form, mesh):
    """To the byte what quantising while reading gives, on one device and on a mesh that reads slices."""
    """A folder that an earlier version wrote."""
    written = in_integers(folder, tmp_path / "out", FORMATS[form[0]].with_group(form[1]))
    stored = load(written, dtype="float32", mesh=mesh)
    expected = load(folder, dtype="float32", quantize=form[0], group=form[1], mesh=mesh)
    assert stored.params.keys() == expected.params.keys()
    for path, value in expected.params.items():
        found = stored.params[path]
        assert isinstance(found, Quantised) == (".experts." in path)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(value), strict=True):
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path
    checkpoint = Checkpoint(written)
    assert checkpoint.experts == FORMATS[form[0]].with_group(form[1])
    assert checkpoint.num_bytes == sum(file.nbytes for file in stored.params.values()) - _widening(stored)
    with pytest.raises(RequestError, match=f"in {form[0][3:]} bits already"):
        load(written, quantize="int4")


def in_integers(source: Path, target: Path, format: Any) -> Path:
    files = [SafetensorsFile(path) for path in source.glob("*.safetensors")]
    tensors = {name: np.array(file.view(name)) for file in files for name in file.entries}
    written = integer_folder(target, json.loads((source / "config.json").read_text()), tensors, format)
    for name in COMPANIONS:
        shutil.copy(source / name, written / name)
    return written


def test_no_folder_is_written_so_any_more(folder, tmp_path):
    config = Checkpoint(folder).config
    with pytest.raises(ConfigError, match=r"stepjax convert --form int4"):
        save(tmp_path / "out", config, {}, source=folder, experts=IntGroups(4, 16))
    assert not list(tmp_path.iterdir())
    old = in_integers(folder, tmp_path / "old", IntGroups(4, 16))
    path = "layers.2.moe.experts.gate"
    exact = Checkpoint(old).read(path, dtype=jnp.bfloat16)
    for name, params, source in (("copied", {}, old), ("params", load(old, dtype="float32").params, None)):
        plain = Checkpoint(save(tmp_path / name, config, params, source=source))
        assert not plain.experts.quantised
        np.testing.assert_array_equal(plain.read(path, dtype=jnp.bfloat16), exact)


def _widening(session) -> int:
    """Bytes that plain weights, BF16 in the files, take more in float32."""
    return sum(
        value.nbytes // 2
        for path, value in session.params.items()
        if not isinstance(value, Quantised) and not path.endswith("router.bias")
    )


def test_part_of_a_stored_weight_is_that_part(folder, tmp_path):
    checkpoint = Checkpoint(in_integers(folder, tmp_path / "out", IntGroups(4, 16)))
    assert "as earlier versions of stepjax spelled it" in checkpoint.notes[-1]
    path = "layers.2.moe.experts.gate"
    whole = checkpoint.read(path, dtype=np.float32)
    index = (slice(1, 3), slice(5, 20), slice(16, 48))
    np.testing.assert_array_equal(checkpoint.read(path, dtype=np.float32, index=index), whole[index])
    kept = checkpoint.read_kept(path, dtype=np.float32, index=index, copy=True)
    assert isinstance(kept, Quantised)
    np.testing.assert_array_equal(dequantize(jax.tree.map(jnp.asarray, kept), jnp.float32), whole[index])
    assert checkpoint.stored_bytes(path, index) == kept.nbytes
    ragged = (slice(None), slice(None), slice(5, 21))
    np.testing.assert_array_equal(checkpoint.read(path, dtype=np.float32, index=ragged), whole[ragged])
