"""The independent reference itself, on models drawn here: where the golden arrays could have been lucky."""

import json
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import random_tensors, tiny_hub_config
from golden.make import CASES, FULL, SLIDE, Case, Oracle
from golden.ours import difference, outputs, params_of_hub

from stepjax.checkpoint.writer import save
from stepjax.config import ModelConfig
from stepjax.model.cache import Chunk, empty_cache
from stepjax.model.step3p5 import abstract, bind

pytestmark = pytest.mark.oracle

TOLERANCE = 2e-4  # as of the golden arrays
MTP = "mtp_1 mtp_2 mtp_3"


def drawn(seed: int) -> Case:
    """A model of random sizes. Layer 1 is sliding, dense and unclamped: the oracle takes its MTP block from there."""
    random = np.random.default_rng(seed)

    def pick(*values):
        return values[random.integers(len(values))]

    num_layers = int(random.integers(4, 7))
    kinds = [pick(FULL, SLIDE), SLIDE, FULL] + [pick(FULL, SLIDE) for _ in range(num_layers - 3)] + [SLIDE] * 3
    theta, factor = {FULL: pick(1e4, 5e6), SLIDE: pick(1e2, 1e4)}, {FULL: pick(0.25, 0.5), SLIDE: pick(0.5, 1.0)}
    sparse = [i for i in range(num_layers) if i != 1 and random.random() < 0.6] or [num_layers - 1]
    kv_heads, head_dim, num_experts = pick(1, 2, 3), pick(8, 16, 24, 32), pick(4, 9, 16)

    def limits():
        return [0.0 if i == 1 or random.random() < 0.5 else round(random.uniform(0.2, 2), 2) for i in range(num_layers)]

    overrides = {
        "hidden_size": pick(24, 40, 64, 72),
        "intermediate_size": pick(24, 56, 96),
        "num_hidden_layers": num_layers,
        "layer_types": kinds,
        "vocab_size": pick(50, 128, 200),
        "num_attention_heads": kv_heads * pick(1, 2, 5),
        "num_attention_groups": kv_heads,
        "head_dim": head_dim,
        "attention_other_setting": {"attention_type": SLIDE, "num_attention_heads": kv_heads * pick(1, 3, 4)},
        "rope_theta": [theta[kind] for kind in kinds],
        "partial_rotary_factors": [factor[kind] for kind in kinds],
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": pick(1.5, 2.0, 8.0),
            "original_max_position_embeddings": pick(16, 64, 1024),
            "low_freq_factor": pick(0.5, 1.0),
            "high_freq_factor": pick(4.0, 32.0),
        },
        "sliding_window": int(random.integers(1, 14)),
        "moe_layers_enum": ",".join(map(str, sparse)),
        "moe_num_experts": num_experts,
        "moe_top_k": int(random.integers(1, num_experts // 2 + 1)),
        "moe_intermediate_size": pick(8, 24, 40),
        "share_expert_dim": pick(16, 32, 40),
        "moe_router_scaling_factor": pick(1.0, 2.5, 3.0),
        "rms_norm_eps": pick(1e-6, 1e-5, 1e-2),
        "swiglu_limits": limits(),
        "swiglu_limits_shared": limits(),
    }
    shape = (pick(1, 2, 3), int(random.integers(20, 60)))
    overrides["attention_other_setting"] |= {"num_attention_groups": kv_heads, "head_dim": head_dim}
    return Case(f"drawn-{seed}", seed=seed, overrides=overrides, batches=(shape,) * 20)


@pytest.mark.parametrize("seed", range(5))
def test_model_of_random_sizes_equals_reference(seed):
    case = drawn(seed)
    config, tensors = ModelConfig.from_hf(case.hub), case.tensors()
    oracle, skeleton = Oracle(case.hub, tensors), abstract(config, dtype=jnp.float32)
    # Tokens whose router no rounding can toss over: 2e-5 is twenty times the difference of two float32 programs.
    ids, expected = next((ids, out) for ids in case.ids() if (out := oracle.run(ids))["margin"] > 2e-5)
    found = jax.jit(lambda params: outputs(bind(skeleton, params), jnp.asarray(ids)))(params_of_hub(config, tensors))
    np.testing.assert_array_equal(found["experts"], expected["experts"])
    assert difference(found, expected, f"normed logits {MTP}") < TOLERANCE


def test_bfloat16_is_as_exact_as_the_references():
    """Both round activations to bfloat16, at places of their own: ours may not lose more against float32."""
    case = CASES[0]
    config, tensors, ids = ModelConfig.from_hf(case.hub), case.tensors(), case.ids()[1]
    exact, rounded = (Oracle(case.hub, tensors, dtype=dtype).run(ids) for dtype in ("float64", "bfloat16"))
    skeleton = abstract(config)
    ours = jax.jit(lambda params: outputs(bind(skeleton, params), jnp.asarray(ids)))(
        params_of_hub(config, tensors, jnp.bfloat16)
    )

    def lost(found, name):
        """Relative, of the median token: one whose router was tossed over is another token."""
        error = np.asarray(found[name], np.float32) - exact[name]
        return np.median(np.sqrt((error**2).mean(-1) / (exact[name] ** 2).mean(-1)))

    for name in f"logits {MTP}".split():
        assert lost(ours, name) < 1.5 * lost(rounded, name), name


def wrapped(folder, hub):
    """The folder as transformers' class with a vision half takes it (spec §9.2), that half as small as it goes."""
    vision = {"width": 16, "layers": 1, "heads": 2, "image_size": 28, "patch_size": 14, "max_position_embeddings": 4}
    config = {"model_type": "step3p7", "architectures": ["Step3p7ForConditionalGeneration"], "vision_config": vision}
    (folder / "config.json").write_text(json.dumps(config | {"text_config": hub}), encoding="utf-8")
    return folder


def test_exported_folder_loads_in_transformers_and_continues_alike(tmp_path):
    """Every text weight arrives, none is unknown, and greedy decoding with either cache gives the same tokens."""
    import torch
    from transformers import Step3p7ForConditionalGeneration

    hub = tiny_hub_config()
    config, tensors = ModelConfig.from_hf(hub), random_tensors(hub, seed=4)
    params = params_of_hub(config, tensors, jnp.bfloat16)
    folder = save(tmp_path / "ours", config, params)
    hub = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    loaded: Any = Step3p7ForConditionalGeneration.from_pretrained(
        wrapped(shutil.copytree(folder, tmp_path / "theirs"), hub),
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
    )
    reference, loading = loaded
    vision = ("model.vision_model.", "model.multi_modal_projector.")
    assert [name for name in loading["missing_keys"] if not name.startswith(vision)] == []
    assert not loading["unexpected_keys"]
    assert not loading["mismatched_keys"]
    assert not loading["error_msgs"]

    prompt, length = np.random.default_rng(0).integers(3, 128, (1, 12)), 40
    with torch.no_grad():
        expected = reference.generate(
            torch.from_numpy(prompt), max_new_tokens=length - 12, do_sample=False, eos_token_id=None, use_mtp=False
        )
    skeleton, params = abstract(config, dtype=jnp.float32), params_of_hub(config, tensors)

    @jax.jit
    def step(params, cache, ids, start):
        model, one = bind(skeleton, params), jnp.ones(1, jnp.int32)
        hidden, cache, _ = model.forward(ids, Chunk.at(start, one, 1), cache)
        return jnp.argmax(model.logits(hidden)[0, 0]), cache

    found, cache = prompt[0].tolist(), empty_cache(config, batch=1, length=length, dtype=jnp.float32)
    for at in range(length - 1):
        token, cache = step(params, cache, jnp.array([found[at : at + 1]]), jnp.array([at]))
        found += [int(token)] if at + 1 == len(found) else []
    assert found == expected[0].tolist()
