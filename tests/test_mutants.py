"""Deliberate mistakes, each of which the golden arrays must catch: what they let through, users would meet.

The specification (§8) measured the change of the final hidden state, whose largest value is about 4, on a model of the
same shape and other random weights. Our figures stand beside its own and are of the same order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.make import CASES, load
from golden.ours import Arrays, build, difference, params_of_hub

import stepjax.model.attention
import stepjax.model.layers
import stepjax.ops.attention
import stepjax.ops.expert_dense
import stepjax.ops.expert_sorted
from stepjax.config import LayerSpec, ModelConfig
from stepjax.model.attention import Attention
from stepjax.model.cache import Chunk
from stepjax.model.layers import Embed, RMSNorm
from stepjax.model.moe import MoE, Router
from stepjax.model.step3p5 import Block, MtpLayer, Step3p5
from stepjax.ops.attention import KeyValues
from stepjax.ops.swiglu import swiglu

CAUGHT = 1e-3  # the weakest mutant changes sixty times as much
TOLERANCE = 2e-4  # of the unmutated model, as in test_golden.py
CASE = CASES[0]

Change = Callable[[pytest.MonkeyPatch, ModelConfig], "ModelConfig | None"]


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return load(CASE)[0]


@pytest.fixture(scope="module")
def params() -> Arrays:
    return params_of_hub(ModelConfig.from_hf(CASE.hub), CASE.tensors())


# Not jitted: the steps compile once for all mutants, where forty whole programs would take a minute.
def backbone(config: ModelConfig, params: Arrays, golden: Arrays) -> Arrays:
    model, ids = build(config, params), jnp.asarray(golden["ids"])
    return {"normed": model.norm(model.forward(ids, Chunk.whole(*ids.shape)).hidden_BTD)}


def drafts(config: ModelConfig, params: Arrays, golden: Arrays) -> Arrays:
    """MTP logits from the oracle's own hidden states."""
    model, ids = build(config, params), jnp.asarray(golden["ids"])
    states = model.mtp_hidden(ids, jnp.asarray(golden["hidden"]), Chunk.whole(*ids.shape))
    return {f"mtp_{k}": model.mtp[k - 1].logits(each)[:, :-k] for k, each in enumerate(states, start=1)}


def each_layer(config: ModelConfig, change: Callable[[LayerSpec], dict]) -> ModelConfig:
    """The configuration with some fields of every layer replaced."""

    def changed(layers: tuple[LayerSpec, ...]) -> tuple[LayerSpec, ...]:
        return tuple(dataclasses.replace(layer, **change(layer)) for layer in layers)

    return dataclasses.replace(config, layers=changed(config.layers), mtp_layers=changed(config.mtp_layers))


def rope(config: ModelConfig, change: Callable[[LayerSpec], dict]) -> ModelConfig:
    return each_layer(config, lambda layer: {"rope": dataclasses.replace(layer.rope, **change(layer))})


# Configuration: what a loader may resolve wrongly.


def window_7(patch, config):
    return config.with_window(7)


def window_9(patch, config):
    return config.with_window(9)


def llama3_on_slide(patch, config):
    return rope(config, lambda layer: {"scaling": config.layers[0].rope.scaling})


def llama3_nowhere(patch, config):
    return rope(config, lambda layer: {"scaling": None})


def whole_rotary(patch, config):
    return rope(config, lambda layer: {"width": layer.head_dim})


def one_theta(patch, config):
    return rope(config, lambda layer: {"theta": 1e4})


def no_routed_clamp(patch, config):
    return each_layer(config, lambda layer: {"limit": None})


def no_shared_clamp(patch, config):
    return each_layer(config, lambda layer: {"limit_shared": None})


def shared_clamp_earlier(patch, config):
    return each_layer(config, lambda layer: {"limit_shared": 0.8 if layer.index in (7, 8) else None})


def shared_falls_back(patch, config):
    return each_layer(config, lambda layer: {"limit_shared": layer.limit_shared or layer.limit})


# Arithmetic.


def clamp_before_silu(patch, config):
    def early(gate, up, limit):
        if limit is None:
            return swiglu(gate, up, None)
        return swiglu(jnp.minimum(gate, limit), jnp.clip(up, -limit, limit), None)

    for module in (stepjax.model.layers, stepjax.ops.expert_dense, stepjax.ops.expert_sorted):
        patch.setattr(module, "swiglu", early)


def scaled_shared(patch, config):
    original = MoE.__call__

    def call(self, x, real, recorded):
        out, ids = original(self, x, real, recorded)
        return out + (self.router.scale - 1) * self.shared(x), ids

    patch.setattr(MoE, "__call__", call)


def router(
    *, activation=jax.nn.sigmoid, selected: Any = jnp.add, weighed: Any = lambda p, b: p, normalised=True
) -> Change:
    """A router that selects by, and takes its weights from, other functions of scores and bias."""

    def change(patch, config):
        def call(self, x):
            weight, bias = self.weight.get_value(), self.bias.get_value()[None, :]
            scores = activation(jnp.einsum("td,ed->te", x, weight, precision="highest"))
            _, ids = jax.lax.top_k(selected(scores, bias), self.top_k)
            chosen = jnp.take_along_axis(weighed(scores, bias), ids, axis=-1)
            return ids, self.scale * chosen / (jnp.sum(chosen, axis=-1, keepdims=True) if normalised else 1)

        patch.setattr(Router, "__call__", call)

    return change


def attention(
    *,
    norm_first: bool = True,
    gate: Callable | None = jax.nn.sigmoid,
    gate_input: str = "normed",
    per_head: bool = False,
    scale: float = 1.0,
) -> Change:
    """The attention layer, written out again with one step misplaced."""

    def change(patch, config):
        stream = {}
        original = Block.__call__

        def block(self, x, chunk, cache, recorded=None):
            stream["raw"] = x
            return original(self, x, chunk, cache, recorded)

        def call(self, x, chunk, cache):
            spec, at = self.spec, chunk.position_BT

            def turned(y, norm):
                y = norm(y) if norm_first else y
                y = stepjax.model.layers.rotate(y, at, spec.rope)
                return y if norm_first else norm(y)

            q = turned(self._heads(self.q_proj(x), "heads"), self.q_norm)
            k = turned(self._heads(self.k_proj(x), "kv_heads"), self.k_norm)
            v = self._heads(self.v_proj(x), "kv_heads")
            if per_head:  # query head a reads KV head a mod K
                k, v = (jnp.tile(y, (1, 1, spec.num_heads // spec.num_kv_heads, 1)) for y in (k, v))
            keys = KeyValues(k, v, at, None, offset=0)
            out = stepjax.ops.attention.attention(scale * q, at, [keys], window=spec.window)
            if gate is not None:
                out *= gate(self.g_proj(stream["raw"] if gate_input == "raw" else x))[..., None]
            return self.o_proj(out.reshape(*x.shape[:2], -1)), cache

        patch.setattr(Block, "__call__", block)
        patch.setattr(Attention, "__call__", call)

    return change


def interleaved(patch, config):
    original = stepjax.model.attention.turned

    def turned(x, cos, sin):
        half = cos.shape[-1]
        pairs, rest = jnp.split(x, [2 * half], axis=-1)
        halves = jnp.concatenate([pairs[..., 0::2], pairs[..., 1::2], rest], axis=-1)
        a, b, rest = jnp.split(original(halves, cos, sin), [half, 2 * half], axis=-1)
        return jnp.concatenate([jnp.stack([a, b], axis=-1).reshape(*x.shape[:-1], -1), rest], axis=-1)

    patch.setattr(stepjax.model.attention, "turned", turned)


def gain_without_one(patch, config):
    def call(self, x):
        gain = self.weight.get_value()
        scale = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return x * scale * gain.reshape((1,) * (x.ndim - 1) + (-1,))

    patch.setattr(RMSNorm, "__call__", call)


def no_head_norm(patch, config):
    original = RMSNorm.__call__
    patch.setattr(RMSNorm, "__call__", lambda self, x: x if x.ndim == 4 else original(self, x))


def scaled_embedding(patch, config):
    original = Embed.__call__
    patch.setattr(Embed, "__call__", lambda self, ids: config.hidden_size**0.5 * original(self, ids))


# Drafting. The mutants of the block itself are those above.


def hidden_half_first(patch, config):
    def call(self, embedding, hidden, chunk, cache):
        both = jnp.concatenate([self.hidden_norm(hidden), self.embed_norm(embedding)], axis=-1)
        hidden, cache, _ = self.block(self.merge(both), chunk, cache)
        return hidden, cache

    patch.setattr(MtpLayer, "__call__", call)


def chain(*, first: bool = False, between: bool = False, shift: Callable[[int], int] = lambda k: k) -> Change:
    """The chain of depths with norms before its first or its later links, or other shifts of the tokens."""

    def change(patch, config):
        def mtp_hidden(self, ids, hidden, chunk):
            states, fed = [], self.norm(hidden) if first else hidden
            for k, layer in enumerate(self.mtp, start=1):
                state, _ = layer(self.embed(jnp.roll(ids, -shift(k), axis=1)), fed, chunk, None)
                states.append(state)
                fed = layer.norm(state) if between else state
            return states

        patch.setattr(Step3p5, "mtp_hidden", mtp_hidden)

    return change


def full_attention_block(patch, config):
    layers = tuple(dataclasses.replace(layer, window=None) for layer in config.mtp_layers)
    return dataclasses.replace(config, mtp_layers=layers)


def heads(*sources: str) -> Change:
    """Output matrices of the depths taken from elsewhere."""

    def change(patch, config):
        original = Step3p5.mtp_hidden

        def mtp_hidden(self, *args):
            weights = dict(zip(("lm_head", "0", "1", "2"), (self.lm_head, *(m.head for m in self.mtp)), strict=True))
            weights = {name: head.weight.get_value() for name, head in weights.items()}
            for layer, source in zip(self.mtp, sources, strict=True):
                layer.head.weight.set_value(weights[source])
            return original(self, *args)

        patch.setattr(Step3p5, "mtp_hidden", mtp_hidden)

    return change


NONE = float("nan")  # the specification has no figure

# Change of the final hidden state: the specification's (§8), ours.
BACKBONE: dict[str, tuple[Change, float, float]] = {
    "window of 7 keys": (window_7, 3, 3.5),
    "window of 9 keys": (window_9, 3, 3.3),
    "gate clamped before silu": (clamp_before_silu, 0.057, 0.085),
    "no shared clamp": (no_shared_clamp, 0.80, 0.84),
    "shared clamp one layer earlier too": (shared_clamp_earlier, 0.71, 1.0),
    "shared limit falls back to the routed one": (shared_falls_back, 0.78, 1.1),
    "no routed clamp": (no_routed_clamp, 1.9, 2.0),
    "router scale on the shared expert": (scaled_shared, 4.7, 4.0),
    "weights from biased scores": (router(weighed=jnp.add), 1.8, 2.1),
    "selection without bias": (router(selected=lambda p, b: p), 3.7, 3.8),
    "llama3 scaling in sliding layers": (llama3_on_slide, 2.6, 3.0),
    "llama3 scaling nowhere": (llama3_nowhere, 5.1, 5.6),
    "rotary over the whole head": (whole_rotary, 4.5, 5.1),
    "one theta for all layers": (one_theta, 2.7, 4.3),
    "interleaved rotary": (interleaved, 4.6, 6.1),
    "rotary before the head norm": (attention(norm_first=False), 3.5, 4.1),
    "gain w for 1 + w": (gain_without_one, 4.2, 4.0),
    "gate from the un-normalised stream": (attention(gate_input="raw"), 4.8, 5.6),
    "no head-wise gate": (attention(gate=None), 5.6, 4.2),
    "gate without sigmoid": (attention(gate=lambda g: g), NONE, 5.8),
    "scores not scaled by the head width": (attention(scale=4.0), NONE, 5.3),
    "query heads dealt to KV heads in turn": (attention(per_head=True), NONE, 6.3),
    "no norm of heads": (no_head_norm, NONE, 5.1),
    "softmax router": (router(activation=jax.nn.softmax), NONE, 4.1),
    "weights not normalised": (router(normalised=False), NONE, 3.3),
    "embedding scaled": (scaled_embedding, NONE, 6.2),
}

# Change of the logits of any depth, fed the oracle's hidden states.
DRAFTING: dict[str, tuple[Change, float]] = {
    "hidden half first": (hidden_half_first, 9.3),
    "post-norm hidden from the backbone": (chain(first=True), 1.8),
    "post-norm hidden between depths": (chain(between=True), 3.0),
    "tokens shifted once for all depths": (chain(shift=lambda k: 1), 9.1),
    "tokens not shifted": (chain(shift=lambda k: k - 1), 8.5),
    "full-attention block": (full_attention_block, 5.6),
    "lm_head for drafts": (heads("lm_head", "lm_head", "lm_head"), 8.7),
    "one head for all depths": (heads("0", "0", "0"), 10.4),
    "heads in reverse": (heads("2", "1", "0"), 10.4),
}

# Restatements above without a mistake: a mutant that changes more than it says would be no test.
CONTROLS: dict[str, tuple[Change, Callable[..., Arrays]]] = {
    "attention": (attention(), backbone),
    "router": (router(), backbone),
    "chain": (chain(), drafts),
    "heads": (heads("0", "1", "2"), drafts),
}


def change_of(
    change: Change, patch: pytest.MonkeyPatch, compute: Callable[..., Arrays], params: Arrays, golden: Arrays
) -> float:
    config = ModelConfig.from_hf(CASE.hub)
    found = compute(change(patch, config) or config, params, golden)
    return difference(found, golden, " ".join(found))


def some(table: dict[str, Any]) -> list[Any]:
    """Every thirty-second mutant; the others go with --slow."""
    return [pytest.param(name, marks=() if at % 32 == 0 else pytest.mark.slow) for at, name in enumerate(table)]


@pytest.mark.parametrize("name", some(BACKBONE))
def test_backbone_mutant_is_caught(name, monkeypatch, params, golden):
    change, _, noted = BACKBONE[name]
    found = change_of(change, monkeypatch, backbone, params, golden)
    assert found > CAUGHT
    assert noted / 2 < found < noted * 2


@pytest.mark.parametrize("name", some(DRAFTING))
def test_drafting_mutant_is_caught(name, monkeypatch, params, golden):
    change, noted = DRAFTING[name]
    found = change_of(change, monkeypatch, drafts, params, golden)
    assert found > CAUGHT
    assert noted / 2 < found < noted * 2


@pytest.mark.parametrize("name", some(CONTROLS))
def test_restatement_without_mistake_passes(name, monkeypatch, params, golden):
    change, compute = CONTROLS[name]
    assert change_of(change, monkeypatch, compute, params, golden) < TOLERANCE
