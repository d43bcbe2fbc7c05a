"""PEFT folders are plain LoRA by every key of their configuration, or refused by the key."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters import lora_config, trained
from checkpoints import random_tensors, small_hub_config, write_folder
from hypothesis import given, settings, strategies as st
from peft_folders import WRITTEN, factors, peft_folder
from safetensors.numpy import load_file
from tiny import small_config

from stepjax.adapters.lora import LoraConfig, adapted_paths, filled, merge, shapes
from stepjax.adapters.peft import CONFIG, WEIGHTS, export_adapter, import_adapter
from stepjax.adapters.peft_keys import KEYS
from stepjax.adapters.peft_names import PREFIX, modules, unstacked
from stepjax.cli import main
from stepjax.errors import CheckpointError, ConfigError
from stepjax.sharding.sharded_checkpoint import restore_adapter
from stepjax.train.tune.trainable import read_leaves

MODEL = small_config()
STEMS = {
    module.stem: module.spec.path
    for module in modules(MODEL)
    if module.spec.layer in (0, 1) and module.stem.endswith((".q_proj", ".v_proj"))
}
SHAPES = {module.stem: module.spec.shape for module in modules(MODEL)}
TENSORS = factors({stem: SHAPES[stem] for stem in STEMS})
Q = "model.layers.0.self_attn.q_proj"


def scales(folder: Path) -> dict[str, float]:
    """alpha / r as import found it, by module: the factors' product over that of the file."""
    adapter, lora = import_adapter(folder, MODEL)
    tensors = load_file(folder / WEIGHTS)
    out = {}
    for stem, path in STEMS.items():
        a, b = (tensors[f"{PREFIX}{stem}.lora_{factor}.weight"] for factor in "AB")
        found = lora.scale(a.shape[0]) * adapter[f"{path}.b"] @ adapter[f"{path}.a"]
        out[stem] = float(np.vdot(found, b @ a) / np.vdot(b @ a, b @ a))
        np.testing.assert_allclose(found, out[stem] * (b @ a), rtol=1e-4, atol=1e-5 * abs(out[stem]))
    return out


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as error:
        import_adapter(folder, MODEL, **options)
    return str(error.value)


# Keys and their values


def test_the_keys_are_those_that_peft_writes():
    assert WRITTEN.keys() | {"runtime_config"} == KEYS.keys()


@pytest.mark.parametrize(
    ("key", "value", "advice"),
    [
        ("peft_type", "LOHA", "only LoRA is read"),
        ("peft_type", ..., "expected 'LORA'"),
        ("init_lora_weights", "pissa", "path_initial_model_for_weight_conversion"),
        ("init_lora_weights", "pissa_niter_16", "path_initial_model_for_weight_conversion"),
        ("init_lora_weights", "olora", "path_initial_model_for_weight_conversion"),
        ("init_lora_weights", "OLoRA", "path_initial_model_for_weight_conversion"),
        ("init_lora_weights", "corda", "path_initial_model_for_weight_conversion"),
        ("init_lora_weights", "lora_ga", "path_initial_model_for_weight_conversion"),
        ("init_lora_weights", "loftq", "merge_and_unload"),
        ("init_lora_weights", "eva", "set init_lora_weights to true and eva_config to null"),
        ("init_lora_weights", "next_year", "if it leaves the weights of the base as they are"),
        ("init_lora_weights", 1, "expected true, false"),
        ("alora_invocation_tokens", [1, 2], "on from certain tokens only"),
        ("use_qalora", True, "merge_and_unload"),
        ("use_dora", True, "merge_and_unload"),
        ("use_dora", 1, "expected false"),
        ("lora_bias", True, "train it without"),
        ("bias", "all", "merge_and_unload"),
        ("bias", "lora_only", "merge_and_unload"),
        ("fan_in_fan_out", True, "stored transposed"),
        ("trainable_token_indices", [3], "merge_and_unload"),
        ("trainable_token_indices", {"embed_tokens": [3]}, "merge_and_unload"),
        ("layer_replication", [[0, 2], [1, 3]], "more layers"),
        ("arrow_config", {"top_k": 3}, "several adapters"),
        ("corda_config", {"corda_method": "kpm"}, "set it to null"),
        ("eva_config", {"rho": 2.0}, "set it to null"),
        ("lora_ga_config", {"direction": "ArB2r"}, "set it to null"),
        ("loftq_config", {"loftq_bits": 4}, "set it to null"),
        ("megatron_config", {"hidden_size": 64}, "Megatron"),
        ("use_bdlora", {"nblocks": 2}, "block-diagonal"),
        ("use_bdlora", {}, "block-diagonal"),  # PEFT takes it for its defaults, as those of the next two
        ("velora_config", {}, "merge_and_unload"),
        ("arrow_config", {}, "several adapters"),
        ("kasa_config", {"beta": 1e-4}, "third factor"),
        ("velora_config", {"scale": 1.0}, "merge_and_unload"),
        ("monteclora_config", {"num_samples": 8}, "at random"),
        ("modules_to_save", ["norm"], "merge_and_unload"),
        ("task_type", "SEQ_CLS", "head of their own"),
        ("r", 8, "says rank 8 for model.layers.0"),
        ("r", 4.0, "a positive integer"),
        ("r", ..., "is missing"),
        ("lora_alpha", ..., "is missing"),
        ("lora_alpha", 0, "a positive number"),
        ("lora_alpha", True, "a positive number"),
        ("lora_alpha", "8", "a positive number"),
        ("lora_alpha", float("nan"), "a positive number"),
        ("lora_alpha", 10**400, "a positive number"),
        ("lora_alpha", 1e-60, "a scale of 0"),
        ("use_rslora", "false", "a bool"),
        ("lora_dropout", 1.5, "from 0 to 1"),
        ("rank_pattern", {"q_proj": 5}, "says rank 5"),
        ("rank_pattern", {"q_proj": 4.0}, "integers"),
        ("rank_pattern", [], "a table"),
        ("rank_pattern", {"(": 4}, "expected a regular expression"),
        ("alpha_pattern", {"q_proj": None}, "positive numbers"),
        ("alpha_pattern", {"*": 4}, "expected a regular expression"),
        ("alpha_pattern", {"[": 4}, "expected a regular expression"),
        ("target_modules", ["q_proj"], "does not name model.layers.0.self_attn.v_proj"),
        ("target_modules", ["proj"], "does not name"),
        ("target_modules", r".*\.q_proj", "does not match model.layers.0.self_attn.v_proj"),
        ("target_modules", "(", "expected a regular expression"),
        ("target_modules", 3, "a list of names"),
        ("exclude_modules", ["layers.1.self_attn.q_proj"], "leaves out model.layers.1"),
        ("exclude_modules", r".*\.1\..*", "leaves out model.layers.1"),
        ("layers_to_transform", [0, 2], "leaves out model.layers.1"),
        ("layers_to_transform", 1, "leaves out model.layers.0"),
        ("peft_version", "new", "expected a version"),
        ("peft_version", 21, "a string"),
        ("use_tomorrow", True, "does not know this key"),
        ("tomorrow_size", 0, "does not know this key"),
        ("tomorrow_config", {"a": None}, "does not know this key"),
    ],
)
def test_what_is_not_plain_lora_is_refused_by_its_key(tmp_path, key, value, advice):
    message = refusal(peft_folder(tmp_path / "adapter", {key: value}, TENSORS))
    assert key in message
    assert advice in message
    assert message.startswith(str(tmp_path / "adapter" / CONFIG))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"init_lora_weights": False},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "Gaussian"},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "mica"},
        {"lora_dropout": 0.1, "inference_mode": False, "revision": "main", "task_type": None},
        {"auto_mapping": {"base_model_class": "Step3p7ForConditionalGeneration"}, "runtime_config": {"a": 1}},
        {"megatron_core": "megatron.core.v2", "qalora_group_size": 32, "ensure_weight_tying": True},
        {"exclude_modules": ["layers.2.self_attn.q_proj", "o_proj"]},
        {"exclude_modules": r".*vision_model.*"},
        {"layers_to_transform": [0, 1, 2], "layers_pattern": "layers"},
        {"target_modules": r"model\.layers\.\d\.self_attn\.(q|v)_proj"},
        {"target_modules": "all-linear"},
        {"target_modules": [*STEMS]},
        {"target_modules": ...},
        {"merge_weights": False, "enable_lora": None, "tomorrow": {}},  # what is off is off, whatever it would be
        {"peft_version": "0.22.0.dev0@1a2b3c"},
        {"peft_version": ...},
    ],
)
def test_what_changes_nothing_changes_nothing(tmp_path, changes):
    assert scales(peft_folder(tmp_path / "adapter", changes, TENSORS)) == pytest.approx(dict.fromkeys(STEMS, 2.0))


def test_files_of_old_versions_have_few_keys(tmp_path):
    old = ("peft_type", "task_type", "base_model_name_or_path", "inference_mode", "r", "lora_alpha", "target_modules")
    removed = {key: ... for key in WRITTEN if key not in (*old, "bias", "fan_in_fan_out", "modules_to_save")}
    assert scales(peft_folder(tmp_path / "adapter", removed, TENSORS)) == pytest.approx(dict.fromkeys(STEMS, 2.0))


# Versions


@pytest.mark.parametrize(
    ("version", "alpha"),
    [("0.21.2", (6, 4)), ("0.18.0", (6, 4)), ("0.15.0", (6, 4)), ("0.14.0", (8, 4)), ("0.13.2", (8, 8))],
)
def test_patterns_are_read_as_the_version_of_the_file_reads_them(tmp_path, version, alpha):
    """Of q, by a pattern of the whole name, known since 0.15; of v, by one of another table, apart since 0.14."""
    patterns = {
        "rank_pattern": {r"self_attn\.v_proj": 4},
        "alpha_pattern": {r"model\.layers\.\d\.self_attn\.q_proj": 6, "v_proj": 4},
    }
    told = scales(peft_folder(tmp_path / "told", {**patterns, "peft_version": version}, TENSORS))
    assert told == pytest.approx({stem: alpha["v_proj" in stem] / 4 for stem in STEMS})


def test_a_file_without_version_is_refused_only_where_versions_differ(tmp_path):
    bare = {key: ... for key in WRITTEN if key not in ("peft_type", "r", "lora_alpha", "target_modules")}
    whole = {"alpha_pattern": {r"model\.layers\.0\.self_attn\.q_proj": 6}}
    message = refusal(peft_folder(tmp_path / "bare", bare | whole, TENSORS))
    assert "alpha_pattern gives model.layers.0.self_attn.q_proj an alpha of 6 or 8" in message
    assert '"peft_version"' in message
    odd = bare | {"alpha_pattern": {"q_proj)(": 6}}  # no regular expression to some versions
    assert "alpha_pattern has 'q_proj)('" in refusal(peft_folder(tmp_path / "odd", odd, TENSORS))
    found = scales(peft_folder(tmp_path / "told", bare | whole | {"peft_version": "0.18.1"}, TENSORS))
    assert found[Q] == pytest.approx(1.5)
    found = scales(peft_folder(tmp_path / "key", bare | whole | {"corda_config": None}, TENSORS))  # a key of 0.15
    assert found[Q] == pytest.approx(1.5)
    found = scales(peft_folder(tmp_path / "alike", bare | {"alpha_pattern": {"q_proj": 6}}, TENSORS))
    assert found[Q] == pytest.approx(1.5)


def test_the_version_tells_the_layout_of_square_experts():
    random = np.random.default_rng(0)
    a, b = random.standard_normal((24, 32)), random.standard_normal((32, 24))
    now = unstacked(a, b, (8, 32, 32), where="here", as_linear=True)
    before = unstacked(a, b, (8, 32, 32), where="here", as_linear=False)
    np.testing.assert_allclose(now[1] @ now[0], np.einsum("ore,eri->eoi", b.reshape(32, 3, 8), a.reshape(8, 3, 32)))
    np.testing.assert_allclose(
        before[1] @ before[0], np.einsum("ire,ero->eoi", b.reshape(32, 3, 8), a.reshape(8, 3, 32))
    )


# Tensors


def test_parts_are_left_out_by_name_only(tmp_path):
    vision = factors({"model.vision_model.layers.0.self_attn.q_proj": (16, 16), "vit_large_projector": (64, 16)})
    folder = peft_folder(tmp_path / "vision", {"target_modules": "all-linear"}, TENSORS | vision)
    assert "--leave-out vision" in refusal(folder)
    assert "--leave-out vision" in refusal(folder, leave_out=("lm_head",))
    found, _ = import_adapter(folder, MODEL, leave_out=("vision", "lm_head"))
    expected, _ = import_adapter(peft_folder(tmp_path / "text", {}, TENSORS), MODEL)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in found)


def test_an_adapter_of_the_output_matrix_is_refused_and_can_be_left_out(tmp_path):
    head = factors({"lm_head": (128, 64)})
    changes = {"target_modules": ["q_proj", "v_proj", "lm_head"]}
    folder = peft_folder(tmp_path / "factors", changes, TENSORS | head)
    assert "is of the output matrix" in refusal(folder)
    assert "otherwise than trained" in refusal(folder)
    assert len(import_adapter(folder, MODEL, leave_out=("lm_head",))[0]) == len(TENSORS)
    whole = {"lm_head.weight": np.zeros((128, 64), np.float32)}
    folder = peft_folder(tmp_path / "whole", {"modules_to_save": ["lm_head"]}, TENSORS | whole)
    assert "modules_to_save has 'lm_head'" in refusal(folder)
    assert len(import_adapter(folder, MODEL, leave_out=("lm_head",))[0]) == len(TENSORS)
    folder = peft_folder(tmp_path / "more", {"modules_to_save": ["lm_head", "norm"]}, TENSORS | whole)
    assert "modules_to_save has 'norm'" in refusal(folder, leave_out=("lm_head",))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{Q}.lora_magnitude_vector": np.zeros(64, np.float32)}, "lora_magnitude_vector (F32[64]) is no factor"),
        ({f"{Q}.lora_B.bias": np.zeros(64, np.float32)}, "lora_B.bias (F32[64]) is no factor"),
        ({f"{Q}.lora_diag": np.zeros((4, 4), np.float32)}, "is no factor"),
        ({"model.embed_tokens.lora_embedding_A": np.zeros((4, 128), np.float32)}, "is no factor"),
        ({f"{Q}.lora_A.other.weight": np.zeros((4, 64), np.float32)}, f"two tensors for lora_A of {Q}"),
        (factors({"model.layers.0.input_layernorm": (64, 64)}), "is no adapted weight of this model"),
        (factors({Q.replace("model.", "model.language_model.", 1): (64, 64)}), "or is there twice"),
        (factors({"model.layers.5.self_attn.q_proj": (96, 64)}), "MTP layers"),
    ],
)
def test_tensors_that_are_not_plain_lora_are_refused_by_name(tmp_path, tensors, message):
    assert message in refusal(peft_folder(tmp_path / "adapter", {"target_modules": "all-linear"}, TENSORS | tensors))


def test_a_folder_without_factors_and_a_folder_of_folders_are_refused(tmp_path):
    vision = factors({"vision_model.x": (4, 4)})
    folder = peft_folder(tmp_path / "default", {}, vision)
    assert "has no factors of LoRA" in refusal(folder, leave_out=("vision",))
    assert "folders in it that have: default" in refusal(tmp_path)


def test_gate_and_up_alone_lie_where_peft_has_them(tmp_path):
    """PEFT wraps the module of all experts once for one parameter, so that ….base_layer is missing from the name."""
    lora = lora_config(targets=(), experts="per_expert")
    adapter = {name: value for name, value in trained(MODEL, lora).items() if ".down." not in name}
    folder = export_adapter(tmp_path / "adapter", MODEL, adapter, lora, form="transformers")
    about = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    assert {name.rpartition(".")[2] for name in about["target_parameters"]} == {"gate_up_proj"}
    assert all(".mlp.experts.lora_" in name for name in load_file(folder / WEIGHTS))
    found, settings = import_adapter(folder, MODEL)
    assert settings == lora
    assert found.keys() == adapter.keys()
    assert all(np.array_equal(found[name], adapter[name]) for name in adapter)
    about["target_parameters"] = ["experts.down_proj"]
    (folder / CONFIG).write_text(json.dumps(about), encoding="utf-8")
    assert "do not fit experts" in refusal(folder)
    about["target_parameters"] = ["experts.gate_up_proj", "experts.down_proj"]
    (folder / CONFIG).write_text(json.dumps(about | {"target_parameters": []}), encoding="utf-8")
    assert "do not fit experts" in refusal(folder)


def test_stacked_experts_are_named_by_target_parameters(tmp_path):
    lora = lora_config(targets=(), experts="per_expert")
    folder = export_adapter(tmp_path / "adapter", MODEL, trained(MODEL, lora), lora)
    about = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    about["target_parameters"] = [name for name in about["target_parameters"] if ".3." not in name]
    (folder / CONFIG).write_text(json.dumps(about), encoding="utf-8")
    assert "target_parameters does not name model.layers.3.moe.down_proj.weight" in refusal(folder)


def test_what_is_imported_can_be_trained_further(tmp_path):
    """Ranks by pattern and few layers: the same sum, in the shapes that a run trains."""
    ranks = {stem: 2 if "v_proj" in stem else 4 for stem in STEMS}
    tensors = factors({stem: SHAPES[stem] for stem in STEMS}, ranks=ranks)
    changes = {"rank_pattern": {"v_proj": 2}, "layers_to_transform": [0, 1]}
    folder = peft_folder(tmp_path / "adapter", changes, tensors)
    adapter, lora = import_adapter(folder, MODEL)
    whole = filled(MODEL, lora, adapter, jax.random.key(0))
    assert {name: leaf.shape for name, leaf in whole.items()} == {
        name: leaf.shape for name, leaf in shapes(MODEL, lora).items()
    }
    zero = {module.spec.path: jnp.zeros(module.spec.shape) for module in modules(MODEL)}
    few, many = (merge(zero, factors_by_name, lora) for factors_by_name in (adapter, whole))
    for path in zero:
        np.testing.assert_array_equal(few[path], many[path])
    fresh = [path for path in adapted_paths(whole) if f"{path}.a" not in adapter]
    assert len(fresh) == 6
    assert all(np.asarray(whole[f"{path}.a"]).all() and not np.asarray(whole[f"{path}.b"]).any() for path in fresh)
    with pytest.raises(ConfigError, match="which its settings do not name"):
        filled(MODEL, LoraConfig(rank=4, targets=("q",), experts=None), adapter, jax.random.key(0))
    with pytest.raises(ConfigError, match="by its settings"):
        filled(MODEL, dataclasses.replace(lora, rank=2), adapter, jax.random.key(0))


# Any change of the configuration


def scale_in_peft(about: dict[str, Any], name: str) -> float | None:
    """alpha / r as PEFT 0.21 computes it (tuners/lora/model.py, utils/other.py); None: it loads nothing there."""

    def of(table: str, default: Any) -> Any:
        keys = about.get(table) or {}
        return next((value for key, value in keys.items() if re.match(rf"(.*\.)?({key})$", name)), default)

    targets, excluded = about.get("target_modules"), about.get("exclude_modules") or []
    for names, wanted in ((targets, True), (excluded, False)):
        if isinstance(names, str):
            named = names == "all-linear" or bool(re.fullmatch(names, name))
        else:
            named = names is None or any(name == each or name.endswith(f".{each}") for each in names)
        if named != wanted:
            return None
    rank, alpha = of("rank_pattern", about["r"]), of("alpha_pattern", about["lora_alpha"])
    return alpha / (math.sqrt(rank) if about.get("use_rslora") else rank) if rank == 4 else None


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 40)
    | st.floats()
    | st.sampled_from(["", "q_proj", "none", "pissa", "x"]),
    lambda value: st.lists(value, max_size=3) | st.dictionaries(st.sampled_from(["q_proj", "v.*", "x"]), value),
    max_leaves=4,
)
LIKELY = st.sampled_from(
    [True, False, None, 4, 16, 0.5, [], {}, ["q_proj", "v_proj"], {"q_proj": 4}, {".*": 12}, "all-linear"]
)
NAMES = st.sampled_from([*KEYS, "use_tomorrow", "tomorrow_config"])


@settings(max_examples=200)
@given(changes=st.dictionaries(NAMES, JSON | LIKELY, min_size=1, max_size=3))
def test_any_change_is_refused_by_its_key_or_has_the_scale_of_peft(tmp_path_factory, changes):
    folder = peft_folder(tmp_path_factory.getbasetemp() / "changed", changes, TENSORS)
    try:
        found, message = scales(folder), ""
    except CheckpointError as error:
        found, message = {}, str(error)
    if message:
        assert any(key in message for key in changes), message
        return
    assert found == pytest.approx({stem: scale_in_peft(WRITTEN | changes, stem) for stem in STEMS})


# Doors


def test_every_door_refuses_the_same(capsys, tmp_path):
    write_folder(tmp_path / "base", small_hub_config(), random_tensors(small_hub_config()))
    base, source, out = (str(tmp_path / name) for name in ("base", "adapter", "out"))
    peft_folder(Path(source), {"init_lora_weights": "pissa"}, TENSORS)
    for command in (
        ["import-adapter", source, out, "--model", base],
        ["export-adapter", source, out, "--model", base],
        ["merge", base, source, out],
    ):
        assert main(command) == 1
        assert f"{CONFIG}: init_lora_weights is 'pissa'" in capsys.readouterr().err
        assert not Path(out).exists()
    with pytest.raises(CheckpointError, match="init_lora_weights is 'pissa'"):
        read_leaves(Path(source), MODEL)


def test_commands_leave_out_parts_and_say_so(capsys, tmp_path):
    write_folder(tmp_path / "base", small_hub_config(), random_tensors(small_hub_config()))
    base = str(tmp_path / "base")
    peft_folder(tmp_path / "adapter", {"target_modules": "all-linear"}, TENSORS | factors({"vision_model.x": (4, 4)}))
    source = str(tmp_path / "adapter")
    for name, command in (
        ("run", ["import-adapter", source, str(tmp_path / "run"), "--model", base]),
        ("peft", ["export-adapter", source, str(tmp_path / "peft"), "--model", base]),
        ("merged", ["merge", base, source, str(tmp_path / "merged")]),
    ):
        assert main(command) == 1
        assert "--leave-out vision" in capsys.readouterr().err
        assert main([*command, "--leave-out", "vision"]) == 0
        assert "left out 2 tensors of vision" in capsys.readouterr().out
        assert (tmp_path / name).is_dir()
    expected, lora = import_adapter(tmp_path / "adapter", MODEL, leave_out=("vision",))
    zero = {module.spec.path: jnp.zeros(module.spec.shape) for module in modules(MODEL)}
    wanted = merge(zero, expected, lora)
    for found, of in (import_adapter(tmp_path / "peft", MODEL), restore_adapter(tmp_path / "run")[:2]):
        sums = merge(zero, found, of)
        for path in zero:
            np.testing.assert_allclose(sums[path], wanted[path], rtol=1e-6, atol=1e-6)
    again = str(tmp_path / "again")
    assert main(["export-adapter", str(tmp_path / "run"), again, "--model", base, "--leave-out", "vision"]) == 1
    assert "the adapter of a run" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["merge", base, source, again, "--leave-out", "nose"])
    assert "'nose' is unknown, expected some of vision, lm_head" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["run", "run/adapter", "run/leaves/4.safetensors"])
def test_what_a_run_wrote_is_told_from_a_peft_folder(tmp_path, given):
    """Whoever names a run, its adapter or its leaves is told the command that makes a PEFT folder."""
    run = tmp_path / "run"
    for name in ("adapter/_CHECKPOINT_METADATA", "leaves/4.safetensors"):
        (run / name).parent.mkdir(parents=True)
        (run / name).write_text("")
    with pytest.raises(CheckpointError, match=f"has no adapter_config.json; .*export-adapter {run}/adapter FOLDER"):
        import_adapter(tmp_path / given, MODEL)
