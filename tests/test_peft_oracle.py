"""What PEFT itself writes, with every initialisation and setting: the logits of PEFT, or refused by the key."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import random_tensors, small_hub_config, write_folder
from hypothesis import given, settings, strategies as st
from peft_folders import WRITTEN, peft_folder
from safetensors.numpy import load_file
from test_adapter_io import ours, reference
from test_peft_config import LIKELY, NAMES, SHAPES, STEMS, TENSORS, scales

from stepjax.adapters.peft import CONFIG, WEIGHTS, export_adapter, import_adapter
from stepjax.adapters.peft_names import PREFIX
from stepjax.config import ModelConfig
from stepjax.errors import CheckpointError

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.peft,
    pytest.mark.filterwarnings("ignore"),  # PEFT warns of half of these settings
]

HUB = small_hub_config()
MODEL = ModelConfig.from_hf(HUB)
IDS = np.random.default_rng(0).integers(0, 128, (2, 24)).astype(np.int32)
TEXT = r"model\.language_model\..*self_attn\.(q|k|v|o)_proj"
TOLERANCE = 1e-4  # of logits in float32; 3e-5 was measured


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("peft") / "base"
    write_folder(folder, HUB, random_tensors(HUB))
    return folder


@functools.cache
def _loaded(base: Path) -> Any:
    return reference(base, HUB)


def bare(base: Path) -> Any:
    """The reference without an adapter, a new one each time."""
    return copy.deepcopy(_loaded(base))


def adapted(base: Path, **changes: Any) -> Any:
    """The reference with a PEFT adapter of which every trained number is moved."""
    import torch
    from peft import LoraConfig, get_peft_model

    wanted = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "target_modules": TEXT} | changes
    torch.manual_seed(0)
    return get_peft_model(bare(base), LoraConfig(**wanted)).eval()


def moved(model: Any) -> Any:
    import torch

    generator = torch.Generator().manual_seed(1)
    for name, leaf in model.named_parameters():
        if any(part in name for part in ("lora_", "modules_to_save", "trainable_tokens")):
            leaf.data += 0.1 * torch.randn(leaf.shape, generator=generator)
    return model


def logits(model: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(input_ids=torch.from_numpy(IDS).long()).logits.float().numpy()


def imported(folder: Path, **options: Any) -> np.ndarray:
    return ours(HUB, *import_adapter(folder, MODEL, **options), IDS)


SAME: dict[str, dict[str, Any]] = {
    "true": {},
    "false": {"init_lora_weights": False},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica"},
    "rslora": {"use_rslora": True},
    "dropout": {"lora_dropout": 0.1, "lora_alpha": 2.5},
    "tying": {"ensure_weight_tying": True},
    "patterns": {
        "rank_pattern": {"q_proj": 6, r"layers\.0\.self_attn\.v_proj": 2},
        "alpha_pattern": {"o_proj": 1.5, ".*layers.1.*(q|k)_proj": 32, "^model.language_model.layers.2.*v_proj": 3},
    },
    "patterns_rslora": {"use_rslora": True, "rank_pattern": {"q_proj|v_proj": 6}, "alpha_pattern": {"v_proj": 3}},
    "exclude": {"target_modules": "all-linear", "exclude_modules": r".*(vision_model|multi_modal_projector).*"},
    "experts": {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    "gate_up": {"target_modules": [], "target_parameters": ["experts.gate_up_proj"]},
    "down": {
        "target_parameters": ["experts.down_proj"],
        "rank_pattern": {"experts.down_proj": 2},
        "alpha_pattern": {r".*\.down_proj": 7, "experts": 100},
    },
}


@pytest.mark.parametrize("case", SAME)
def test_plain_lora_gives_the_logits_of_peft(base, tmp_path, case):
    from peft import PeftModel

    model = moved(adapted(base, **SAME[case]))
    model.save_pretrained(tmp_path / "adapter")
    found, expected = imported(tmp_path / "adapter"), logits(model)
    assert np.abs(expected - logits(bare(base))).max() > 0.1
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)
    adapter, lora = import_adapter(tmp_path / "adapter", MODEL)
    export_adapter(tmp_path / "again", MODEL, adapter, lora, form="transformers")
    again = PeftModel.from_pretrained(bare(base), str(tmp_path / "again")).eval()
    np.testing.assert_allclose(logits(again), expected, atol=TOLERANCE)


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
    ],
)
def test_without_the_vision_half_text_gets_the_same_logits(base, tmp_path, changes):
    model = moved(adapted(base, **changes))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="is of the vision half"):
        imported(tmp_path / "adapter")
    np.testing.assert_allclose(imported(tmp_path / "adapter", leave_out=("vision",)), logits(model), atol=TOLERANCE)


@pytest.mark.parametrize("changes", [{"target_modules": ["o_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_without_the_output_matrix_the_rest_is_the_same(base, tmp_path, changes):
    """PEFT's model with the output matrix of the base gives the logits of what is left."""
    import torch

    model = moved(adapted(base, **changes))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="lm_head"):
        imported(tmp_path / "adapter")
    found = imported(tmp_path / "adapter", leave_out=("lm_head", "vision"))
    assert np.abs(found - logits(model)).max() > 0.1
    for name, leaf in model.named_parameters():
        if "lm_head" in name and "lora_B" in name:
            leaf.data.zero_()
        if "lm_head.modules_to_save" in name:
            leaf.data = torch.clone(model.get_parameter("base_model.model.lm_head.original_module.weight"))
    np.testing.assert_allclose(found, logits(model), atol=TOLERANCE)


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("init_lora_weights", {"init_lora_weights": "pissa"}),
        ("init_lora_weights", {"init_lora_weights": "pissa_niter_4"}),
        ("init_lora_weights", {"init_lora_weights": "olora"}),
        ("init_lora_weights", {"init_lora_weights": "eva"}),
        ("init_lora_weights", {"init_lora_weights": "lora_ga", "lora_ga_config": "LoraGAConfig"}),
        ("corda_config", {"corda_config": "CordaConfig"}),
        ("use_dora", {"use_dora": True}),
        ("alora_invocation_tokens", {"alora_invocation_tokens": [3, 4]}),
        ("use_qalora", {"use_qalora": True}),
        ("lora_bias", {"lora_bias": True}),
        ("bias", {"bias": "all"}),
        ("bias", {"bias": "lora_only"}),
        ("modules_to_save", {"modules_to_save": ["norm"]}),
        ("trainable_token_indices", {"trainable_token_indices": [1, 2]}),
        ("velora_config", {"velora_config": "VeloraConfig"}),
        ("kasa_config", {"kasa_config": "KasaConfig"}),
        ("monteclora_config", {"monteclora_config": "MontecloraConfig"}),
        ("use_bdlora", {"use_bdlora": "BdLoraConfig"}),
        ("target_parameters", {"target_modules": [], "target_parameters": ["mlp.gate.weight"]}),  # the router
        ("embed_tokens", {"target_modules": ["o_proj", "embed_tokens"]}),
    ],
)
def test_what_is_not_plain_lora_is_refused_by_its_key(base, tmp_path, key, changes):
    import peft.tuners.lora.config as configs

    made = {
        name: getattr(configs, value)(**({"match_strict": False} if value == "BdLoraConfig" else {}))
        if isinstance(value, str) and value.endswith("Config")
        else value
        for name, value in changes.items()
    }
    moved(adapted(base, **made)).save_pretrained(tmp_path / "adapter")
    for parts in ((), ("vision", "lm_head")):
        with pytest.raises(CheckpointError, match=key):
            import_adapter(tmp_path / "adapter", MODEL, leave_out=parts)


@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_the_advice_for_changed_bases_works(base, tmp_path, name):
    model = adapted(base, init_lora_weights=name)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = name
    expected = logits(moved(model))
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    np.testing.assert_allclose(imported(tmp_path / "plain"), expected, atol=TOLERANCE)


def test_the_advice_for_eva_works(base, tmp_path):
    """EVA leaves the base as it is: once the settings say so, the logits are those of PEFT."""
    from peft import PeftModel

    model = moved(adapted(base, init_lora_weights="eva"))
    model.save_pretrained(tmp_path / "eva")
    again = PeftModel.from_pretrained(bare(base), str(tmp_path / "eva"))
    again.peft_config["default"].init_lora_weights = True
    again.peft_config["default"].eva_config = None
    again.save_pretrained(tmp_path / "plain")
    np.testing.assert_allclose(imported(tmp_path / "plain"), logits(model), atol=TOLERANCE)


def test_our_keys_are_those_of_peft(base, tmp_path):
    adapted(base).save_pretrained(tmp_path / "adapter")
    about = json.loads((tmp_path / "adapter" / CONFIG).read_text(encoding="utf-8"))
    same = ("base_model_name_or_path", "target_modules")
    assert {key: value for key, value in about.items() if key not in same} == {
        key: value for key, value in WRITTEN.items() if key not in same
    }


def small_torch_model() -> Any:
    """Linear layers under the names of the attention of two layers, and an output matrix."""
    from torch import nn
    from transformers import PretrainedConfig

    class Top(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = PretrainedConfig()
            self.model, self.lm_head = nn.Module(), nn.Linear(64, 128, bias=False)
            self.model.layers = nn.ModuleList([nn.Module(), nn.Module()])
            for number, layer in enumerate(self.model.layers):
                layer.self_attn = nn.Module()
                for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                    size_out, size_in = SHAPES[f"model.layers.{number}.self_attn.{name}"]
                    layer.self_attn.add_module(name, nn.Linear(size_in, size_out, bias=False))

        def prepare_inputs_for_generation(self, *arguments: Any, **options: Any) -> Any:
            raise NotImplementedError

    return Top()


def scales_in_peft(folder: Path) -> dict[str, float]:
    """`test_peft_config.scales` by PEFT itself, which is shown to change no weight and to use no variant."""
    import torch
    from peft import PeftModel

    model = small_torch_model()
    before = {name: leaf.detach().clone() for name, leaf in model.named_parameters()}
    modules = dict(PeftModel.from_pretrained(model, str(folder)).named_modules())
    tensors, out = load_file(folder / WEIGHTS), {}
    for stem in STEMS:
        module: Any = modules[f"{PREFIX}{stem}"]
        assert not module.lora_variant
        assert torch.equal(module.get_base_layer().weight, before[f"{stem}.weight"])
        a, b = (tensors[f"{PREFIX}{stem}.lora_{factor}.weight"] for factor in "AB")
        delta = module.get_delta_weight("default").detach().numpy()
        out[stem] = float(np.vdot(delta, b @ a) / np.vdot(b @ a, b @ a))
        np.testing.assert_allclose(delta, out[stem] * (b @ a), rtol=1e-4, atol=1e-4 * max(1.0, abs(out[stem])))
    return out


SELECTIONS = st.sampled_from(
    [["k_proj", "q_proj", "v_proj"], r".*\.(q|v)_proj", ["layers.0.self_attn.q_proj"], ["o_proj"], [0, 1], 0, "layers"]
)
PATTERNS = st.dictionaries(
    st.sampled_from(["q_proj", "v_proj", r"layers\.1\..*", "self_attn.q_proj", "q_proj|v_proj", "^model.*"]),
    st.sampled_from([4, 6, 16]),
)


@settings(max_examples=150)
@given(changes=st.dictionaries(NAMES, LIKELY | SELECTIONS | PATTERNS, min_size=1, max_size=3))
def test_any_change_is_refused_or_has_the_scale_that_peft_gives(tmp_path_factory, changes):
    folder = peft_folder(tmp_path_factory.getbasetemp() / "changed", changes, TENSORS)
    try:
        found = scales(folder)
    except CheckpointError:
        return
    try:
        expected = scales_in_peft(folder)
    except (TypeError, ValueError, AttributeError):  # PEFT does not load the folder
        return
    assert found == pytest.approx(expected, rel=1e-3)
