"""Adding a format is one class and one entry of the table: that of docs/extending.md goes through every part."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import speaking_folder
from shown import shown

from stepjax.checkpoint.reader import Checkpoint
from stepjax.checkpoint.writer import save
from stepjax.cli import main
from stepjax.commands.info import describe
from stepjax.errors import CheckpointError, ConfigError, MeshError
from stepjax.infer.load import load
from stepjax.infer.session import Session
from stepjax.model.step3p5 import abstract
from stepjax.ops.expert_dense import ExpertWeights
from stepjax.ops.experts import routed_experts
from stepjax.sharding.compiled.step_study import abstract_params, device_bytes
from stepjax.sharding.mesh import MeshSpec
from stepjax.sharding.mesh_layout import MeshLayout
from stepjax.sharding.planner.device_bytes import layout_of, parameters, placed
from stepjax.sharding.planner.hardware import parse
from stepjax.sharding.planner.options import PlanRequest
from stepjax.sharding.planner.search import rank_options
from stepjax.sharding.rules import ShardingRules
from stepjax.weights.expert_format import ExpertFormat, Unit
from stepjax.weights.formats import FORMATS, described
from stepjax.weights.fp8 import Fp8Blocks
from stepjax.weights.inventory import inventory
from stepjax.weights.quantised import Quantised, dequantize, quantise

E, D, F = 6, 64, 128
GATE = "layers.2.moe.experts.gate"


HALF: ExpertFormat = shown("HalfPerExpert")()


@dataclass(frozen=True)
class Lookalike(ExpertFormat):
    """Integers that are held as another format or packing holds them, with another rule: a scale is inverted."""

    values: str = "I8"
    scales: str = "F32"
    suffix: str = "_scale"
    rounded: bool = True

    @property
    def name(self) -> str:
        return "lookalike"

    @property
    def scale_suffix(self) -> str:  # type: ignore[override]
        return self.suffix

    @property
    def value_dtype(self) -> str:
        return self.values

    @property
    def scale_dtypes(self) -> tuple[str, ...]:
        return (self.scales,)

    @property
    def bits(self) -> int:
        return 8

    @property
    def unit(self) -> Unit:
        return 1, None

    def quantise_matrix(self, w):
        wide = np.float32(16) / np.maximum(np.abs(w).max(axis=1, keepdims=True), np.float32(1e-30))
        scale = np.maximum(np.exp2(np.floor(np.log2(wide))), np.float32(1)).astype(self.numpy_dtypes[1])
        return np.rint(w * scale.astype(np.float32)).astype(self.numpy_dtypes[0]), scale

    def widen(self, q, scale, array):
        return q.astype(array.float32) / scale.astype(array.float32)


@pytest.fixture(autouse=True)
def entry(monkeypatch):
    monkeypatch.setitem(FORMATS, HALF.name, HALF)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return speaking_folder(tmp_path_factory.mktemp("formats") / "model")


@pytest.fixture
def converted(folder, tmp_path) -> Path:
    assert main(["convert", str(folder), str(tmp_path / "half"), "--experts", "half"]) == 0
    return tmp_path / "half"


def on_device(w: Quantised) -> Quantised:
    return jax.tree.map(jnp.asarray, w)


def twin(folder: Path) -> Session:
    """The model with plain experts that hold what the format makes of them."""
    plain = load(folder, dtype="float32")
    params = {
        path: dequantize(on_device(quantise(np.asarray(value), HALF)), jnp.float32) if ".experts." in path else value
        for path, value in plain.params.items()
    }
    return Session(plain.config, params, dtype=jnp.float32)


@pytest.mark.parametrize("form", ["gathered", "batched", "capacity", "blocked", "in_turn"])
def test_products_agree_with_the_widened_weights(monkeypatch, form):
    monkeypatch.setattr("stepjax.ops.expert_choice.WIDENED_BYTES", 2 * D * F * 4)  # some experts at a time
    random = np.random.default_rng(0)
    drawn = [0.1 * random.standard_normal(shape, np.float32) for shape in ((E, F, D), (E, F, D), (E, D, F))]
    quantised = [on_device(quantise(w, HALF)) for w in drawn]
    held = ExpertWeights(*quantised)
    wide = ExpertWeights(*(dequantize(w, jnp.float32) for w in quantised))
    x = jnp.asarray(random.standard_normal((20, D)), jnp.float32)
    ids = jnp.asarray(np.stack([random.permutation(E)[:2] for _ in range(20)]), jnp.int32)
    combine = jnp.asarray(random.random((20, 2)), jnp.float32)
    expected = routed_experts(x, ids, combine, wide, limit=None, form="reference")
    out = routed_experts(x, ids, combine, held, limit=None, form=form)
    np.testing.assert_allclose(out, expected, atol=2e-5)  # float32 sums in another order


def test_convert_writes_it_and_the_reader_recognises_it(folder, converted):
    plain, checkpoint = Checkpoint(folder), Checkpoint(converted)
    assert checkpoint.experts == HALF
    release = inventory(checkpoint.config, experts=HALF)
    assert checkpoint.num_bytes == sum(tensor.num_bytes for tensor in release)
    exact = plain.read(GATE, dtype=np.float32)
    stored = checkpoint.read_kept(GATE, dtype=np.float32)
    assert isinstance(stored, Quantised)
    expected = quantise(exact, HALF)
    assert stored.q.tobytes() == expected.q.tobytes()
    assert stored.scale.tobytes() == expected.scale.tobytes()
    part = (slice(1, 3), slice(2, 9), slice(4, 20))
    np.testing.assert_array_equal(
        checkpoint.read(GATE, dtype=np.float32, index=part), expected.dequantize_numpy(np.float32)[part]
    )


LOOKALIKES = {
    "int8": Lookalike(),
    "compressed-tensors": Lookalike(scales="BF16"),
    "eight bits": Lookalike(values="F8_E4M3"),
    "fp8": Lookalike(values="F8_E4M3", suffix="_scale_inv"),
}


@pytest.mark.parametrize("kind", LOOKALIKES)
def test_a_folder_says_which_of_two_formats_it_holds(monkeypatch, folder, tmp_path, kind):
    format = LOOKALIKES[kind]
    monkeypatch.setitem(FORMATS, format.name, format)
    assert main(["convert", str(folder), str(tmp_path / "new"), "--experts", format.name]) == 0
    checkpoint = Checkpoint(tmp_path / "new")
    assert checkpoint.experts == format
    exact = Checkpoint(folder).read(GATE, dtype=np.float32)
    expected = quantise(exact, format).dequantize_numpy(np.float32)
    np.testing.assert_array_equal(checkpoint.read(GATE, dtype=np.float32), expected)
    assert np.abs(expected - exact).max() < np.abs(exact).max() / 8


@pytest.mark.parametrize(("kind", "other"), [("int8", "int8"), ("compressed-tensors", "another tool's ")])
def test_a_folder_that_does_not_say_is_refused_with_both_names(monkeypatch, folder, tmp_path, kind, other):
    format = LOOKALIKES[kind]
    monkeypatch.setitem(FORMATS, format.name, format)
    save(tmp_path / "new", Checkpoint(folder).config, {}, source=folder, experts=format)
    silent(tmp_path / "new")
    with pytest.raises(
        CheckpointError, match=rf"gate_proj\.weight may be {other}.* or lookalike, .* name one in config"
    ):
        Checkpoint(tmp_path / "new")


def silent(folder: Path) -> None:
    """Take quantization_config out of a folder."""
    hub = json.loads((folder / "config.json").read_text())
    del hub["quantization_config"]
    (folder / "config.json").write_text(json.dumps(hub))


def test_the_folder_s_sizes_are_used(monkeypatch, folder, tmp_path):
    monkeypatch.setitem(FORMATS, "lookalike", Lookalike())
    written = Lookalike(rounded=False)
    save(tmp_path / "new", Checkpoint(folder).config, {}, source=folder, experts=written)
    assert Checkpoint(tmp_path / "new").experts == written


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"name": "nothing"}, "quantization_config.name: is 'nothing', expected one of bf16"),
        ({"name": ["half"]}, "quantization_config.name: is "),
        ({"name": "int4", "columns": "32"}, "quantization_config.columns: is '32', which is not a size of int4"),
        ({"name": "int4", "columns": True}, "quantization_config.columns: is True"),
        ({"name": "int4", "width": 32}, "quantization_config.width: is 32"),
        ({"name": "int8"}, "is F16, expected I8 since it has scales"),
        ({"name": "int4", "columns": 32}, "is F16, expected U8 since it has scales"),
    ],
)
def test_settings_that_do_not_fit_are_refused(converted, settings, problem):
    hub = json.loads((converted / "config.json").read_text())
    hub["quantization_config"] = {"quant_method": "stepjax", **settings}
    (converted / "config.json").write_text(json.dumps(hub))
    with pytest.raises((CheckpointError, ConfigError), match=re.escape(problem)):
        Checkpoint(converted)


def test_a_format_whose_folder_would_be_read_as_another_is_not_written(monkeypatch, folder, tmp_path):
    @dataclass(frozen=True)
    class Copy(Fp8Blocks):
        @property
        def name(self) -> str:
            return "copy"

        def named_by(self, settings):
            return False

    config = Checkpoint(folder).config
    with pytest.raises(ConfigError, match="a folder of copy would be read as fp8"):
        save(tmp_path / "new", config, {}, source=folder, experts=Copy())
    monkeypatch.setattr(Copy, "named_by", Fp8Blocks.named_by)
    monkeypatch.setitem(FORMATS, "copy", Copy())
    with pytest.raises(ConfigError, match="names fp8 and copy alike, expected one format"):
        save(tmp_path / "new", config, {}, source=folder, experts=Copy())


def test_a_checkpoint_of_it_goes_back_to_the_release_s_format(converted, tmp_path):
    assert main(["convert", str(converted), str(tmp_path / "bf16"), "--experts", "bf16"]) == 0
    back, half = Checkpoint(tmp_path / "bf16"), Checkpoint(converted)
    assert not back.experts.quantised
    np.testing.assert_array_equal(back.read(GATE, dtype=jnp.bfloat16), half.read(GATE, dtype=jnp.bfloat16))


@pytest.mark.parametrize(
    ("mesh", "stored"),
    [
        (None, False),
        ("expert=8", True),
        pytest.param(None, True, marks=pytest.mark.slow),
        pytest.param("expert=8", False, marks=pytest.mark.slow),
    ],
)
def test_it_is_loaded_and_answers_as_its_widened_twin(folder, converted, mesh, stored):
    source, quantize = (converted, None) if stored else (folder, "half")
    session = load(source, dtype="float32", quantize=quantize, mesh=mesh)
    kinds = {path: isinstance(value, Quantised) for path, value in session.params.items()}
    assert kinds == {path: ".experts." in path for path in kinds}
    ids = list(range(20, 60))
    np.testing.assert_allclose(session.logits(ids), twin(folder).logits(ids), atol=2e-4)  # sums in another order


def test_rules_refuse_to_cut_what_shares_a_scale(folder):
    config = Checkpoint(folder).config
    ShardingRules(config, MeshSpec(expert=8), experts=HALF)
    with pytest.raises(MeshError, match="would be cut inside a unit of half of 32; expected 1 ways, or split whole"):
        ShardingRules(config, MeshSpec(expert=4, tensor=2), experts=HALF)


def test_the_planner_counts_the_bytes_that_a_device_holds(folder):
    config, spec = Checkpoint(folder).config, MeshSpec(expert=4)
    layout = MeshLayout(spec.build(), ShardingRules(config, spec, experts=HALF))
    held = device_bytes(abstract_params(abstract(config, dtype=jnp.bfloat16, layout=layout), layout))
    kinds = parameters(config, experts=HALF, depths=len(config.mtp_layers))
    planned = placed(kinds, layout_of(config, spec, "expert_tensor", HALF))
    assert sum(array.num_bytes for array in planned) == held
    assert describe(config)["release"]["half"]["bytes"] == sum(
        spec.num_bytes for spec in inventory(config, experts=HALF)
    )


def test_the_planner_names_its_flag(folder):
    config = Checkpoint(folder).config
    found = rank_options(config, parse("1xH100"), PlanRequest("latency", context=64, experts=(HALF,)))
    assert found.options[0].choice.flags().endswith("--quantize half")


@pytest.mark.parametrize("name", [*FORMATS, "half"])
def test_a_format_survives_json(name):
    assert described(FORMATS[name].with_group(32).describe()) == FORMATS[name].with_group(32)
