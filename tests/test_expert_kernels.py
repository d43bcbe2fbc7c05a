"""The kernel for experts as they are stored, run by Pallas's interpreter on a CPU, against the slow reference."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stepjax.errors import RequestError
from stepjax.gpu_target import HOPPER, Gpu, compiling_for, kernel_choice
from stepjax.ops.expert_dense import ExpertWeights
from stepjax.ops.expert_stored import stored
from stepjax.ops.experts import routed_experts
from stepjax.ops.stored_matrix import reader_of
from stepjax.weights.adapted import Adapted
from stepjax.weights.expert_format import ExpertFormat
from stepjax.weights.fp4 import MxFp4, NvFp4
from stepjax.weights.fp8 import Fp8Blocks
from stepjax.weights.int_groups import IntGroups
from stepjax.weights.plain import PLAIN
from stepjax.weights.quantised import Quantised, quantise
from stepjax.weights.stacked import LayerWeight

E, D, F = 6, 128, 64
FORMATS = {
    "bf16": PLAIN,
    "int8": IntGroups(8, None),
    "int4": IntGroups(4, 64),
    "int4 in 32s": IntGroups(4, 32),
    "fp8": Fp8Blocks(),
    "fp8 in blocks": Fp8Blocks((32, 64)),
}


def held(random: np.random.Generator, format: ExpertFormat, *shape: int) -> Any:
    w = (0.1 * random.standard_normal(shape)).astype(np.float32)
    return jax.tree.map(jnp.asarray, quantise(w, format)) if format.quantised else jnp.asarray(w, jnp.bfloat16)


def experts(format: ExpertFormat, *, seed: int = 0) -> ExpertWeights:
    random = np.random.default_rng(seed)
    return ExpertWeights(*(held(random, format, *shape) for shape in ((E, F, D), (E, F, D), (E, D, F))))


def adapted(weights: ExpertWeights, *, rank: int, slots: int = 1, shared: bool = False) -> ExpertWeights:
    """``shared``: one A of gate and up for all experts, and one B of down, as PEFT's layers have them."""
    random = np.random.default_rng(7)

    def factor(*shape: int) -> jax.Array:
        return jnp.asarray(0.2 * random.standard_normal(shape), jnp.float32)

    def beside(w: Any, *, a: bool = False, b: bool = False) -> Adapted:
        _, size_out, size_in = w.shape
        ranks = rank * slots
        return Adapted(
            w,
            factor(*(() if a else (E,)), ranks, size_in),
            factor(*(() if b else (E,)), size_out, ranks),
            0.5,
            slots,
        )

    gate, up, down = weights
    return ExpertWeights(beside(gate, a=shared), beside(up, a=shared), beside(down, b=shared))


def drawn(tokens: int, kind: str = "drawn", *, top_k: int = 2) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tokens, their experts and weights. Some assignments are padding or another device's; expert 2 gets none."""
    random = np.random.default_rng(tokens)
    odds = random.gumbel(size=(tokens, E))
    odds[:, 2] = -np.inf
    ids = np.argsort(-odds, axis=1)[:, :top_k]
    ids[random.random(ids.shape) < 0.1] = E
    if kind == "one expert":
        ids[:, 0], ids[:, 1] = 3, E
    elif kind == "none":
        ids[:] = E + 5
    x = jnp.asarray(random.standard_normal((tokens, D)), jnp.bfloat16)
    return x, jnp.asarray(ids, jnp.int32), jnp.asarray(random.random(ids.shape), jnp.float32)


def kernel(x: Any, ids: Any, combine: Any, weights: Any, slot: Any = None, *, limit: float | None = 0.5) -> jax.Array:
    def run(x: Any, ids: Any, combine: Any, weights: Any, slot: Any) -> jax.Array:
        return stored(x, ids, combine, weights, slot, limit=limit, load=ids.size, gpu=None, interpret=True)

    return jax.jit(run)(x, ids, combine, weights, slot)


def reference(x: Any, ids: Any, combine: Any, weights: Any, slot: Any = None, limit: float | None = 0.5) -> jax.Array:
    return routed_experts(x, ids, combine, weights, limit=limit, form="reference", slot_T=slot)


def close(found: jax.Array, expected: jax.Array) -> None:
    """The hidden state is rounded to bfloat16 between the products."""
    scale = max(float(np.abs(np.asarray(expected, np.float32)).max()), 1e-6)
    np.testing.assert_allclose(
        np.asarray(found, np.float32) / scale, np.asarray(expected, np.float32) / scale, atol=1.5e-2
    )


RARE_ADAPTERS = [(4, True), (300, False)]
TOKENS = [1, 4, 16, 33, 300]
RARE = [(name, tokens) for name in FORMATS for tokens in TOKENS if name != "int4" and tokens != 33]


@pytest.mark.parametrize(
    ("name", "tokens"),
    [("int4", tokens) for tokens in TOKENS]
    + [(name, 33) for name in FORMATS if name != "int4"]
    + [pytest.param(*case, marks=pytest.mark.slow) for case in RARE],
)
def test_every_precision_agrees_with_the_reference(name, tokens):
    weights, given = experts(FORMATS[name]), drawn(tokens)
    close(kernel(*given, weights), reference(*given, weights))


@pytest.mark.parametrize("tokens", [16, 300])
def test_ids_may_name_experts_of_other_devices(tokens):
    """These are the second third of all; few ids are read as they are, many are sorted."""
    x, ids, combine = drawn(tokens)
    weights, first = experts(FORMATS["int4"]), jnp.int32(E)
    ids = ids.at[::3].add(E).at[1::3].add(2 * E)

    def run(x: Any, ids: Any, combine: Any, weights: Any, first: Any) -> jax.Array:
        limits = {"limit": 0.5, "load": ids.size // 3, "gpu": None, "interpret": True}
        return stored(x, ids, combine, weights, None, first=first.reshape(1), **limits)

    found = jax.jit(run)(x, ids, combine, weights, first)
    close(found, routed_experts(x, ids, combine, weights, limit=0.5, form="reference", first=first))
    close(found, reference(x, jnp.where((ids >= E) & (ids < 2 * E), ids - E, E), combine, weights))


@pytest.mark.parametrize("kind", ["one expert", "none"])
@pytest.mark.parametrize("tokens", [16, 300])
def test_skewed_and_empty_routings_agree_with_the_reference(kind, tokens):
    weights, given = experts(FORMATS["int4"]), drawn(tokens, kind)
    found = kernel(*given, weights, limit=None)
    assert (kind == "none") == (not np.asarray(found).any())
    close(found, reference(*given, weights, limit=None))


@pytest.mark.parametrize(
    ("tokens", "shared"), [(4, False), (300, True), *(pytest.param(*c, marks=pytest.mark.slow) for c in RARE_ADAPTERS)]
)
def test_adapters_of_three_slots_agree_with_the_reference(tokens, shared):
    weights = adapted(experts(FORMATS["int4"]), rank=4, slots=3, shared=shared)
    slot = jnp.asarray(np.arange(tokens) % 4 - 1, jnp.int32)  # −1: none
    given = drawn(tokens)
    close(kernel(*given, weights, slot), reference(*given, weights, slot))
    plain = experts(FORMATS["int4"])
    assert np.abs(np.asarray(kernel(*given, weights, slot) - kernel(*given, plain))).max() > 0.05


def test_a_bad_token_spoils_no_other():
    x, ids, combine = drawn(16)
    weights = experts(FORMATS["fp8"])
    expected = kernel(x, ids, combine, weights)
    found = np.asarray(kernel(x.at[3].set(jnp.nan), ids, combine, weights))
    others = np.arange(16) != 3
    np.testing.assert_array_equal(found[others], np.asarray(expected)[others])


def test_products_that_are_added_up_in_slices_give_the_same(monkeypatch):
    weights, given = experts(FORMATS["int4"]), drawn(33)
    whole = kernel(*given, weights)
    monkeypatch.setattr("stepjax.ops.expert_stored.SLICE_BYTES", 33 * 2 * 64 * 4)
    np.testing.assert_allclose(kernel(*given, weights), whole, atol=1e-6)


def test_zero_points_are_taken_from_the_values_of_their_group():
    random = np.random.default_rng(3)
    asymmetric = dataclasses.replace(FORMATS["int4"], zeros=True)

    def beside(w: Any) -> Quantised:
        zero = jnp.asarray(random.integers(-2, 3, w.scale.shape), jnp.int8)
        return Quantised(w.q, w.scale, asymmetric, zero)

    weights, given = ExpertWeights(*map(beside, experts(FORMATS["int4"]))), drawn(16)
    close(kernel(*given, weights), reference(*given, weights))

    def loss(run: Any, x: Any) -> jax.Array:
        return jnp.sum(jnp.sin(run(x, *given[1:], weights, limit=None)))

    close_gradient(*(jax.grad(functools.partial(loss, run))(given[0]) for run in (kernel, reference)))


@pytest.mark.parametrize(
    "format", [NvFp4(), MxFp4(), IntGroups(8, 32), IntGroups(8, None, zeros=True), IntGroups(4, 16), IntGroups(4, None)]
)
def test_formats_that_no_kernel_reads_keep_their_forms(format):
    assert reader_of(format, (E, F, D), capability=HOPPER) is None


def test_a_layer_of_a_stack_is_read_in_its_stack():
    layers = [experts(FORMATS["int4"], seed=seed) for seed in range(3)]
    stacks = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    given = drawn(16)
    weights = ExpertWeights(*(LayerWeight(stack, jnp.int32(2)) for stack in stacks))
    np.testing.assert_array_equal(kernel(*given, weights), kernel(*given, layers[2]))


@pytest.mark.parametrize(
    ("name", "tokens", "shared"),
    [
        ("int4", 280, False),
        *(pytest.param(name, 280, False, marks=pytest.mark.slow) for name in ("bf16", "fp8", "int8")),
        *(pytest.param(name, 5, True, marks=pytest.mark.slow) for name in ("bf16", "int4", "fp8", "int8")),
    ],
)
def test_gradients_agree_with_those_of_the_reference(name, tokens, shared):
    """280 tokens are sorted, 5 are not."""
    weights: Any = adapted(experts(FORMATS[name]), rank=4, shared=shared)
    x, ids, combine = drawn(tokens)
    factors = tuple((w.a, w.b) for w in weights)

    def loss(run: Any, x: Any, combine: Any, factors: Any) -> jax.Array:
        beside = ExpertWeights(*(Adapted(w.base, a, b, w.scale) for w, (a, b) in zip(weights, factors, strict=True)))
        return jnp.sum(jnp.sin(run(x, ids, combine, beside, limit=None)))  # beside a clamp, rounding chooses the side

    found = jax.grad(lambda *a: loss(kernel, *a), (0, 1, 2))(x, combine, factors)
    expected = jax.grad(lambda *a: loss(reference, *a), (0, 1, 2))(x, combine, factors)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.abs(np.asarray(b, np.float32)).max() > 0
        close_gradient(a, b)


def test_gradients_of_plain_weights_agree_with_those_of_the_reference():
    weights = experts(PLAIN)
    x, ids, combine = drawn(40)
    found = jax.grad(lambda w: jnp.sum(jnp.sin(kernel(x, ids, combine, w))))(weights)
    expected = jax.grad(lambda w: jnp.sum(jnp.sin(reference(x, ids, combine, w))))(weights)
    for a, b in zip(found, expected, strict=True):
        close_gradient(a, b)


def close_gradient(found: jax.Array, expected: jax.Array) -> None:
    """By the size of the whole: cotangents are rounded to bfloat16 on the way, each to 2⁻⁹ of itself."""
    a, b = np.asarray(found, np.float32), np.asarray(expected, np.float32)
    assert np.linalg.norm(a - b) < 2e-2 * np.linalg.norm(b)


@pytest.mark.parametrize(
    ("choice", "name", "taken"),
    [
        ("on", "int4", True),
        ("on", "bf16", False),
        ("all", "bf16", True),
        ("measured", "int4", False),
        ("off", "int4", False),
    ],
)
def test_the_environment_chooses_the_kernels(monkeypatch, choice, name, taken):
    """Of a GPU that is compiled for; nothing is compiled here."""
    monkeypatch.setenv("STEPJAX_KERNELS", choice)
    weights, given = experts(FORMATS[name]), drawn(4)
    with compiling_for(Gpu((8, 0), 108)):
        traced = jax.make_jaxpr(functools.partial(routed_experts, limit=None))(*given, weights)
    assert ("pallas_call" in str(traced)) == taken


def test_an_unknown_choice_of_kernels_is_refused(monkeypatch):
    monkeypatch.setenv("STEPJAX_KERNELS", "fast")
    with pytest.raises(RequestError, match="STEPJAX_KERNELS: is 'fast', expected one of on, measured, all, off"):
        kernel_choice()
