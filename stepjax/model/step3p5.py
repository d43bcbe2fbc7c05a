"""Step 3.5 in the order data flows: a block, a prediction head (MTP layer), and the model that runs them.

At the end of the file: making a model, and the flat table of its parameters that everything else works on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from stepjax.config import LayerSpec, ModelConfig
from stepjax.model.attention import Attention
from stepjax.model.cache import Cache, CacheView, Chunk
from stepjax.model.gradient_order import has_adapters, with_layer_gradients
from stepjax.model.layer_loop import run_looped, stacked_blocks
from stepjax.model.layers import Embed, Linear, RMSNorm, SwiGLU
from stepjax.model.layout import Layout, SingleDevice
from stepjax.model.moe import MoE
from stepjax.model.period import period_of

KEPT_LAYERS = 8  # whose activations fine-tuning keeps; of a deeper model each layer runs again in the backward pass
Params = Mapping[str, Any]  # dotted path → array (or block-scaled array)


class Hidden(NamedTuple):
    """The result of a pass over tokens."""

    hidden_BTD: jax.Array  # residual stream after the last layer, before the final norm
    cache: Cache | None
    expert_ids: tuple[jax.Array, ...]  # per MoE layer: int32 [B, T, A], its router's choice


class Block(nnx.Module):
    """``x ← x + attention(norm(x)); x ← x + feed_forward(norm(x))``."""

    def __init__(self, spec: LayerSpec, config: ModelConfig, *, rngs: nnx.Rngs, dtype: DTypeLike, layout: Layout):
        self.layout, self.is_moe = layout, spec.moe
        size, eps = config.hidden_size, config.norm_eps
        scale = (2 * len(config.layers)) ** -0.5  # maps onto the residual stream: a deeper model starts smaller
        self.input_norm = RMSNorm(size, eps=eps, dtype=dtype)
        self.attn = Attention(
            spec, size, eps=eps, rngs=rngs, dtype=dtype, layout=layout, scale=scale, cache_fp8=config.cache_fp8
        )
        self.post_norm = RMSNorm(size, eps=eps, dtype=dtype)
        if spec.moe:
            self.moe = MoE(spec, config, rngs=rngs, dtype=dtype, layout=layout, scale=scale)
        else:
            limit, hidden = spec.limit_shared, config.intermediate_size
            self.mlp = SwiGLU(size, hidden, limit=limit, rngs=rngs, dtype=dtype, scale=scale)

    def __call__(
        self, x_BTD: jax.Array, chunk: Chunk, cache: CacheView | None, recorded_BTA: jax.Array | None = None
    ) -> tuple[jax.Array, CacheView | None, jax.Array | None]:
        """The residual stream after the layer, the layer's cache, and what the router of a MoE layer chose [B, T, A].

        Args:
          recorded_BTA: as for `MoE`; a dense layer has none.
        """
        out, cache = self.attn(self._whole(self.input_norm(x_BTD)), chunk, cache)
        x_BTD = self.layout.constrain(x_BTD + out, "batch", "stream", "embed")
        normed, ids = self.post_norm(x_BTD), None
        if self.is_moe:
            out, ids = self.moe(normed, chunk.position_BT >= 0, recorded_BTA)
        else:
            out = self._whole(self.mlp(self._whole(normed)))  # or the backward pass would gather weights, not tokens
        return self.layout.constrain(x_BTD + out, "batch", "stream", "embed"), cache, ids

    def _whole(self, x_BTD: jax.Array) -> jax.Array:
        """From where the stream lies to where its tokens meet weights."""
        return self.layout.constrain(x_BTD, "batch", "length", "embed")


class MtpLayer(nnx.Module):
    """One depth: merge the two inputs, run a dense sliding-window block, read the result with its own head."""

    def __init__(self, spec: LayerSpec, config: ModelConfig, *, rngs: nnx.Rngs, dtype: DTypeLike, layout: Layout):
        self.layout = layout
        size, eps = config.hidden_size, config.norm_eps
        self.embed_norm = RMSNorm(size, eps=eps, dtype=dtype)
        self.hidden_norm = RMSNorm(size, eps=eps, dtype=dtype)
        self.merge = Linear(2 * size, size, axes=("embed", "embed_in"), rngs=rngs, dtype=dtype)
        self.block = Block(spec, config, rngs=rngs, dtype=dtype, layout=layout)
        self.norm = RMSNorm(size, eps=eps, dtype=dtype)
        self.head = Linear(size, config.vocab_size, axes=("vocab", "embed"), rngs=rngs, dtype=dtype, scale=0.5)

    def __call__(
        self, embedding_BTD: jax.Array, hidden_BTD: jax.Array, chunk: Chunk, cache: CacheView | None
    ) -> tuple[jax.Array, CacheView | None]:
        """The depth's pre-norm hidden state [B, T, D]; the embedding half comes first."""
        both = jnp.concatenate([self.embed_norm(embedding_BTD), self.hidden_norm(hidden_BTD)], axis=-1)
        both = self.layout.constrain(both, "batch", "length", None)  # or norms and inputs would split like `merge`
        # Then split like it after all: where tokens are split too, a partitioner may gather the matrix instead.
        merged = self.merge(self.layout.constrain(both, "batch", "length", "embed_in"))
        hidden, cache, _ = self.block(merged, chunk, cache)
        return hidden, cache

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """Logits of the token after the one fed, float32 [B, T, V]."""
        return self.layout.constrain(self.head.wide(self.norm(hidden_BTD)), "batch", "length", "vocab")


class Step3p5(nnx.Module):
    """The whole model. `forward` runs the backbone; `logits` and the MTP methods read its result.

    Example:
      >>> import stepjax
      >>> from stepjax.model.cache import Chunk
      >>> from stepjax.model.step3p5 import bind
      >>> session = stepjax.load("step-tiny", dtype="float32")
      >>> model = bind(session.model, session.params)
      >>> import jax.numpy as jnp
      >>> hidden = model.forward(jnp.array([[0, 3, 5, 300]]), Chunk.whole(1, 4)).hidden_BTD
      >>> model.logits(hidden).shape == (1, 4, session.config.vocab_size)
      True
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.bfloat16,
        layout: Layout | None = None,
        mtp: bool = True,
        looped: bool = False,
    ):
        """
        Args:
          looped: hold the repeated layers as stacks and run them in a loop (`stepjax.model.layer_loop`).
        """
        layout = layout or SingleDevice()
        self.config, self.layout = config, layout
        self.period = period_of(config) if looped else None
        size, vocab = config.hidden_size, config.vocab_size
        self.embed = Embed(vocab, size, rngs=rngs, dtype=dtype)
        blocks = [Block(spec, config, rngs=rngs, dtype=dtype, layout=layout) for spec in config.layers]
        self.looped = nnx.List(stacked_blocks(blocks, self.period) if self.period else [])
        within = self.period.layers if self.period else range(0)
        self.layers = nnx.List([None if i in within else block for i, block in enumerate(blocks)])
        self.norm = RMSNorm(size, eps=config.norm_eps, dtype=dtype)
        self.lm_head = Linear(size, vocab, axes=("vocab", "embed"), rngs=rngs, dtype=dtype, scale=0.5)
        specs = config.mtp_layers if mtp else ()
        self.mtp = nnx.List([MtpLayer(spec, config, rngs=rngs, dtype=dtype, layout=layout) for spec in specs])

    def forward(
        self,
        ids_BT: jax.Array,
        chunk: Chunk,
        cache: Cache | None = None,
        *,
        recorded_BTLA: jax.Array | None = None,
        recompute: bool = False,
    ) -> Hidden:
        """Run the backbone over a chunk of tokens, reading and extending the cache if there is one.

        Args:
          recorded_BTLA: for the L MoE layers, experts to run instead of their routers' choice (router replay); the
            weights are still the routers'. An id ≥ E leaves the choice alone. Any integer dtype.
          recompute: for gradients: keep each layer's input alone, and run the layer again in the backward pass.
        """
        x = self.layout.constrain(self.embed(ids_BT), "batch", "stream", "embed")
        caches, views, expert_ids = iter(cache.layers if cache else ()), [], []
        looped = cache.looped if cache else ()
        for i, layer in enumerate(self.layers):
            if self.period and i == self.period.first:
                moe = [] if recorded_BTLA is None else [recorded_BTLA[:, :, len(expert_ids) :]]
                x, looped, ids = run_looped(self.looped, self.period, x, chunk, looped, *moe, recompute=recompute)
                expert_ids += ids
            if layer is None:
                continue
            recorded = None if recorded_BTLA is None or not layer.is_moe else recorded_BTLA[:, :, len(expert_ids)]
            with jax.named_scope(f"layer_{i}"):
                run = layer if cache else _apart(layer)
                run = jax.checkpoint(run) if recompute else run
                x, view, ids = run(x, chunk, next(caches, None), recorded)
            views.append(view)
            expert_ids += [] if ids is None else [ids]
        return Hidden(x, Cache(tuple(views), cache.mtp, looped) if cache else None, tuple(expert_ids))

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """Next-token logits, float32 [B, T, V], from the pre-norm hidden state.

        They are placed here: a partitioner may otherwise gather the matrix instead of the logits.
        """
        return self.layout.constrain(self.lm_head.wide(self.norm(hidden_BTD)), "batch", "length", "vocab")

    def mtp_hidden(self, ids_BT: jax.Array, hidden_BTD: jax.Array, chunk: Chunk) -> list[jax.Array]:
        """Teacher-forced MTP over whole sequences: per depth k a hidden state [B, T, D]; row t was fed token t + k.

        The last k rows of depth k (and of each packed segment) were fed the wrong token; the caller masks them. They
        reach no earlier row: attention is causal.
        """
        states = []
        for k, layer in enumerate(self.mtp, start=1):
            shifted = jnp.roll(ids_BT, -k, axis=1)
            with jax.named_scope(f"mtp_{k}"):
                hidden_BTD, _ = layer(self.embed(shifted), hidden_BTD, chunk, None)
            states.append(hidden_BTD)
        return states


def initialise(
    config: ModelConfig,
    key: jax.Array,
    *,
    dtype: DTypeLike = jnp.float32,
    layout: Layout | None = None,
    mtp: bool = True,
    looped: bool = False,
) -> Step3p5:
    """A freshly drawn model, for training from scratch and for tests."""
    return Step3p5(config, rngs=nnx.Rngs(params=key), dtype=dtype, layout=layout, mtp=mtp, looped=looped)


def abstract(
    config: ModelConfig,
    *,
    dtype: DTypeLike = jnp.bfloat16,
    layout: Layout | None = None,
    mtp: bool = True,
    looped: bool = False,
) -> Step3p5:
    """The model with shapes in place of arrays: nothing is allocated."""
    rngs: Any = _SameKey(jax.random.key(0))
    return nnx.eval_shape(lambda: Step3p5(config, rngs=rngs, dtype=dtype, layout=layout, mtp=mtp, looped=looped))


class _SameKey:
    """Stands in for `nnx.Rngs` where no value is drawn. That one counts its keys in a variable, and to write a variable
    while jax traces takes longer the more has been traced: for 48 layers 5 of 6 s.
    """

    def __init__(self, key: jax.Array):
        self._key = key

    def params(self) -> jax.Array:
        return self._key


def params_of(model: Step3p5) -> dict[str, Any]:
    """Every parameter by its dotted path, as ``layers.7.moe.experts.gate``."""
    return {".".join(map(str, path)): variable.get_value() for path, variable in _variables(model)}


def axes_of(model: Step3p5) -> dict[str, tuple[str, ...]]:
    """The logical axes of every parameter, by its dotted path."""
    return {".".join(map(str, path)): variable.get_metadata("axes") for path, variable in _variables(model)}


def bind(model: Step3p5, params: Params) -> Step3p5:
    """The model (abstract, or another's) with these parameters in place of its own.

    Meant for the inside of a jitted function whose argument is the flat table: flax's own jit walks the module tree at
    every call (tens of milliseconds for this model), a flat dictionary costs a fraction of one.
    """
    graph, state = nnx.split(model)
    flat = [(path, variable.replace(params[".".join(map(str, path))])) for path, variable in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def _apart(layer: Block) -> Callable[..., Any]:
    """The layer; its gradients are computed before those of the layer below (`stepjax.model.gradient_order`)."""
    graph, state = nnx.split(layer)
    if not has_adapters(state):
        return layer

    def run(x_BTD: jax.Array, *rest: Any) -> tuple[jax.Array, CacheView | None, jax.Array | None]:
        x_BTD, held = with_layer_gradients(x_BTD, state)
        return nnx.merge(graph, held)(x_BTD, *rest)

    return run


def _variables(model: Step3p5) -> list[tuple[tuple[Any, ...], nnx.Variable]]:
    return list(nnx.to_flat_state(nnx.state(model)))
