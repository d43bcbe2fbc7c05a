"""Adapters as PEFT folders: layouts against their definition, round trips, and peft itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters import lora_config, trained
from checkpoints import random_tensors, small_hub_config, write_folder
from golden.ours import params_of_hub
from safetensors.numpy import load_file, save_file
from tiny import small_config

from stepjax.adapters.lora import LoraConfig, attach, merge
from stepjax.adapters.peft import CONFIG, WEIGHTS, export_adapter, import_adapter
from stepjax.adapters.peft_keys import FileForm
from stepjax.adapters.peft_names import stacked, unstacked
from stepjax.config import ModelConfig
from stepjax.errors import CheckpointError
from stepjax.model.cache import Chunk
from stepjax.model.step3p5 import abstract, bind

MODEL = small_config()
E, F, D, R = 8, 32, 64, 3


def same(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    return found.keys() == expected.keys() and all(np.array_equal(found[name], expected[name]) for name in found)


# Layouts


def test_stacked_experts_interleave_as_peft_reads_them():
    """PEFT's sum, written out: ΔW[e] = Σ_r B.reshape(out, r, E)[:, r, e] ⊗ A.reshape(E, r, in)[e, r]."""
    random = np.random.default_rng(0)
    a, b = random.standard_normal((E, R, D)), random.standard_normal((E, F, R))
    flat_a, flat_b = stacked(a, b)
    assert (flat_a.shape, flat_b.shape) == ((E * R, D), (F, R * E))
    delta = np.einsum("ore,eri->eoi", flat_b.reshape(F, R, E), flat_a.reshape(E, R, D))
    np.testing.assert_allclose(delta, b @ a)
    back = unstacked(flat_a, flat_b, (E, F, D), where="here", as_linear=None)
    assert all(np.array_equal(one, other) for one, other in zip(back, (a, b), strict=True))


def test_factors_of_an_older_peft_are_told_by_their_shapes():
    """It took [E, out, in] for [E, in, out]: A [E·r, out], B [in, r·E], and ΔW the other way round."""
    random = np.random.default_rng(0)
    a, b = random.standard_normal((E * R, F)), random.standard_normal((D, R * E))
    delta = np.einsum("ire,ero->eoi", b.reshape(D, R, E), a.reshape(E, R, F))
    ours_a, ours_b = unstacked(a, b, (E, F, D), where="here", as_linear=None)
    np.testing.assert_allclose(ours_b @ ours_a, delta)
    with pytest.raises(CheckpointError, match="experts are square"):
        unstacked(a, b[:F], (E, F, F), where="here", as_linear=None)
    unstacked(a, b[:F], (E, F, F), where="here", as_linear=True)
    with pytest.raises(CheckpointError, match="do not fit experts of 32 × 64"):
        unstacked(a[:, :5], b, (E, F, D), where="here", as_linear=None)


@pytest.mark.parametrize("form", ["peft", "experts", "transformers"])
@pytest.mark.parametrize("experts", ["per_expert", "shared_outer", None])
def test_what_was_exported_comes_back_the_same(tmp_path, form, experts):
    lora = lora_config(experts=experts)
    adapter = trained(MODEL, lora)
    folder = export_adapter(tmp_path / "adapter", MODEL, adapter, lora, form=form)
    found, settings = import_adapter(folder, MODEL)
    assert settings == lora
    assert same(found, adapter)


@pytest.mark.parametrize("form", ["peft", "experts"])
def test_the_file_alone_is_enough(tmp_path, form):
    """As from another writer: without our settings, with the same sum of every weight."""
    lora = lora_config(experts="shared_outer")
    adapter = trained(MODEL, lora)
    folder = export_adapter(tmp_path / "adapter", MODEL, adapter, lora, form=form)
    tensors = load_file(folder / WEIGHTS)
    save_file(tensors, folder / WEIGHTS)
    found, settings = import_adapter(folder, MODEL)
    assert (settings.rank, settings.experts, settings.expert_rank) == (6, "per_expert", 3)
    zero = {path: jnp.zeros(shape) for path, shape in weight_shapes(adapter).items()}
    one, other = (merge(zero, each, of) for each, of in ((found, settings), (adapter, lora)))
    for path in zero:
        np.testing.assert_allclose(one[path], other[path], atol=1e-6)


def weight_shapes(adapter: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    out = {}
    for name, b in adapter.items():
        if name.endswith(".b"):
            lead = (MODEL.num_experts,) if ".experts." in name else ()
            out[name[:-2]] = (*lead, b.shape[-2], adapter[f"{name[:-2]}.a"].shape[-1])
    return out


def test_names_are_the_release_s_and_patterns_are_few(tmp_path):
    lora = LoraConfig(rank=4, alpha=8.0)
    adapter = trained(MODEL, lora)
    cases: tuple[tuple[FileForm, str], ...] = (
        ("peft", "base_model.model.model.layers.1.moe.gate_proj.lora_A.weight"),
        ("experts", "base_model.model.model.layers.1.moe.experts.7.gate_proj.lora_A.weight"),
        ("transformers", "base_model.model.model.language_model.layers.1.mlp.experts.base_layer.lora_A.weight"),
    )
    for form, expected in cases:
        folder = export_adapter(tmp_path / form, MODEL, adapter, lora, form=form)
        tensors, about = load_file(folder / WEIGHTS), json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        assert expected in tensors
        assert all(value.dtype == np.float32 for value in tensors.values())
        assert about["r"] == about["lora_alpha"] == 4
        assert about["rank_pattern"] == about["alpha_pattern"]
        assert 1 <= len(about["rank_pattern"]) <= 4
    shared = "base_model.model.model.layers.1.share_expert.gate_proj.lora_B.weight"
    np.testing.assert_array_equal(
        load_file(tmp_path / "peft" / WEIGHTS)[shared], 2 * adapter["layers.1.moe.shared.gate_proj.weight.b"]
    )


def test_scales_of_other_writers_go_into_b(tmp_path):
    lora = LoraConfig(rank=4, alpha=4.0, targets=("q", "o"), experts=None)
    adapter = trained(MODEL, lora)
    folder = export_adapter(tmp_path / "adapter", MODEL, adapter, lora)
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS)
    about = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    about |= {"lora_alpha": 8, "alpha_pattern": {"layers.0.self_attn.o_proj": 2}, "use_rslora": True}
    (folder / CONFIG).write_text(json.dumps(about), encoding="utf-8")
    found, settings = import_adapter(folder, MODEL)
    assert settings.scale(4) == 1
    q, o = "layers.0.attn.q_proj.weight.b", "layers.0.attn.o_proj.weight.b"
    np.testing.assert_allclose(found[q], 4 * adapter[q], rtol=1e-6)
    np.testing.assert_allclose(found[o], adapter[o], rtol=1e-6)


def test_bad_folders_are_refused(tmp_path):
    lora = LoraConfig(rank=4, targets=("q",), experts=None)
    folder = export_adapter(tmp_path / "adapter", MODEL, trained(MODEL, lora), lora)
    about, tensors = json.loads((folder / CONFIG).read_text(encoding="utf-8")), load_file(folder / WEIGHTS)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"

    def refused(message: str, *, settings: dict[str, Any] | None = None, weights: dict[str, Any] | None = None) -> None:
        (folder / CONFIG).write_text(json.dumps(about | (settings or {})), encoding="utf-8")
        save_file(tensors | (weights or {}), folder / WEIGHTS)
        with pytest.raises(CheckpointError, match=message):
            import_adapter(folder, MODEL)

    refused("use_dora is True", settings={"use_dora": True})
    refused("peft_type is 'LOHA'", settings={"peft_type": "LOHA"})
    refused("says rank 8", settings={"r": 8})
    refused("lora_alpha is None", settings={"lora_alpha": None})
    refused("not finite", weights={key: np.full((4, 64), np.nan, np.float32)})
    refused("no factor of LoRA", weights={"base_model.model.model.norm.weight": np.zeros(64, np.float32)})
    refused("A of the factors A and B only", weights={key.replace("q_proj", "k_proj"): np.zeros((4, 64), np.float32)})
    router = {
        key.replace("self_attn.q_proj", "moe.gate").replace("lora_A", f"lora_{x}"): np.zeros((4, 4), np.float32)
        for x in "AB"
    }
    refused("no adapted weight of this model", weights=router)
    refused("adapter's factors are", weights={key: np.zeros((4, 60), np.float32)})
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="pickled adapters"):
        import_adapter(folder, MODEL)
    with pytest.raises(CheckpointError, match="not an adapter to overwrite"):
        export_adapter(folder, MODEL, trained(MODEL, lora), lora)


# peft itself


def ours(hub: dict[str, Any], adapter: dict[str, Any], lora: LoraConfig, ids: np.ndarray) -> np.ndarray:
    config = ModelConfig.from_hf(hub)
    params = {n: v for n, v in params_of_hub(config, random_tensors(hub)).items() if not n.startswith("mtp.")}

    @jax.jit
    def run(params: dict[str, Any]) -> jax.Array:
        model = bind(abstract(config, dtype=jnp.float32, mtp=False), params)
        return model.logits(model.forward(jnp.asarray(ids), Chunk.whole(*ids.shape)).hidden_BTD)

    return np.asarray(run(attach(params, adapter, lora)))


def reference(folder: Path, hub: dict[str, Any]) -> Any:
    """transformers' class with the text weights of a folder, its vision half as small as it goes."""
    import torch
    from transformers import Step3p7ForConditionalGeneration

    vision = {"width": 16, "layers": 1, "heads": 2, "image_size": 28, "patch_size": 14, "max_position_embeddings": 4}
    config = {"model_type": "step3p7", "architectures": ["Step3p7ForConditionalGeneration"], "vision_config": vision}
    (folder / "config.json").write_text(json.dumps(config | {"text_config": hub}), encoding="utf-8")
    return Step3p7ForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def released(model: Any) -> Any:
    """The same arithmetic under the release's module names: three stacked parameters beside a shared expert."""
    import torch
    from torch import nn
    from transformers import PretrainedConfig

    class MoELinear(nn.Module):
        def __init__(self, weight: Any):
            super().__init__()
            self.weight = nn.Parameter(weight.detach().clone())

        def forward(self, x: Any, expert: int) -> Any:
            return torch.nn.functional.linear(x, self.weight[expert])

    class Stub(nn.Module):
        """Runs what lies beside it in its layer."""

        def __init__(self, layer: Any, block: Any):
            super().__init__()
            self.layer, self.scale = [layer], block.routed_scaling_factor
            self.limit, self.act = block.experts.limit, block.experts.act_fn

        def forward(self, x: Any) -> Any:
            layer, rows = self.layer[0], x.reshape(-1, x.shape[-1])
            _, share, ids = layer.moe.gate(rows)
            out = layer.share_expert(rows)
            for expert in range(E):
                token, place = (ids == expert).nonzero(as_tuple=True)
                gate = self.act(layer.moe.gate_proj(rows[token], expert)).clamp(max=self.limit)
                hidden = gate * layer.moe.up_proj(rows[token], expert).clamp(-self.limit, self.limit)
                own = layer.moe.down_proj(hidden, expert) * share[token, place, None]
                out = out.index_add(0, token, self.scale * own)
            return out.reshape(x.shape)

    class Released(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = PretrainedConfig()
            self.model, self.lm_head = model.model.language_model, model.lm_head
            for layer in self.model.layers:
                if (block := layer.mlp) and hasattr(block, "experts"):
                    gate, up = block.experts.gate_up_proj.chunk(2, dim=1)
                    layer.moe = nn.Module()
                    layer.moe.gate, layer.share_expert = block.gate, block.shared_experts
                    layer.moe.gate_proj, layer.moe.up_proj = MoELinear(gate), MoELinear(up)
                    layer.moe.down_proj = MoELinear(block.experts.down_proj)
                    layer.mlp = Stub(layer, block)

        def forward(self, input_ids: Any, **_: Any) -> Any:
            return self.lm_head(self.model(input_ids=input_ids).last_hidden_state)

        def prepare_inputs_for_generation(self, *arguments: Any, **options: Any) -> Any:
            raise NotImplementedError

    return Released()


# peft names patterns of parameters as unused, for it looks among modules only; the logits say that it does use them.
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.oracle
@pytest.mark.peft
@pytest.mark.parametrize("form", ["peft", "transformers"])
@pytest.mark.parametrize("experts", ["per_expert", "shared_outer"])
def test_peft_itself_gives_the_same_logits(tmp_path, form, experts):
    """Onto transformers' class, and onto the same weights under the release's names."""
    import torch
    from peft import PeftModel

    hub = small_hub_config()
    config = ModelConfig.from_hf(hub)
    lora = lora_config(experts=experts)
    adapter = trained(config, lora)
    folder = export_adapter(tmp_path / "adapter", config, adapter, lora, form=form)
    write_folder(tmp_path / "base", hub, random_tensors(hub))
    model = reference(tmp_path / "base", hub)
    ids = np.random.default_rng(0).integers(0, 128, (2, 24)).astype(np.int32)
    base = released(model) if form == "peft" else model
    adapted = PeftModel.from_pretrained(base, str(folder)).eval()
    loaded = sum("lora_" in name for name, _ in adapted.named_parameters())
    assert loaded == len(load_file(folder / WEIGHTS))
    with torch.no_grad():
        found = adapted(input_ids=torch.from_numpy(ids).long())
    found = found if form == "peft" else found.logits
    expected = ours(hub, adapter, lora, ids)
    assert np.abs(expected - ours(hub, trained(config, lora, size=0.0), lora, ids)).max() > 0.1
    np.testing.assert_allclose(found.float().numpy(), expected, atol=2e-4)
