"""Load per expert and rank, and orders of experts that even it out."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from tiny import random_params, small_config

from stepjax.errors import MeshError
from stepjax.model.cache import Chunk
from stepjax.model.layout import SingleDevice
from stepjax.model.step3p5 import abstract, bind
from stepjax.ops.experts import expert_load
from stepjax.sharding.expert_order import (
    balanced_order,
    copy_table,
    imbalance,
    rank_load,
    replicated_order,
    slot_experts,
)


def test_load_counts_assignments_and_no_padding():
    ids = jnp.array([[[0, 3], [3, 1]], [[4, 4], [3, 0]]], jnp.int32)  # id 4 of 4 experts: padding
    assert expert_load(ids, 4).tolist() == [2, 1, 0, 3]
    assert expert_load(ids, 4).dtype == jnp.int32


def test_ranks_hold_runs_of_experts():
    load = np.array([[5, 1, 0, 2], [0, 0, 0, 0]])
    np.testing.assert_array_equal(rank_load(load, 2), [[6, 2], [0, 0]])
    np.testing.assert_array_equal(imbalance(rank_load(load, 2)), [1.5, 1.0])
    with pytest.raises(MeshError, match="4 experts cannot be held by 3 ranks"):
        rank_load(load, 3)


def test_the_heaviest_go_apart():
    order = balanced_order(np.array([9, 8, 1, 0, 3, 3]), 2)
    np.testing.assert_array_equal(order, [0, 3, 5, 1, 2, 4])  # 9 + 0 + 3 and 8 + 1 + 3, where 18 and 6 were stored
    np.testing.assert_array_equal(balanced_order(np.array([4, 1, 2, 3]), 2), np.arange(4))  # even as it is


@given(st.data())
def test_orders_are_permutations_and_never_worse(data):
    num_ranks = data.draw(st.integers(1, 8))
    num_experts = num_ranks * data.draw(st.integers(1, 6))
    loads = st.lists(st.integers(0, 10**6), min_size=num_experts, max_size=num_experts)
    load = np.array(data.draw(st.lists(loads, min_size=1, max_size=3)))
    order = balanced_order(load, num_ranks)
    np.testing.assert_array_equal(np.sort(order, axis=-1), np.broadcast_to(np.arange(num_experts), load.shape))
    np.testing.assert_array_equal(order, balanced_order(load, num_ranks))
    before, after = (rank_load(each, num_ranks) for each in (load, np.take_along_axis(load, order, axis=-1)))
    assert (imbalance(after) <= imbalance(before)).all()


def test_a_skewed_load_becomes_nearly_even():
    """Experts as unequal as a Zipf law makes them, 288 on 8 ranks: over 1.5 of the mean becomes 1.05.

    Every rank holds 36, so the one with the heaviest expert cannot be left alone with it.
    """
    load = np.random.default_rng(0).permuted(np.tile(100_000 / np.arange(1, 289) ** 0.7, (42, 1)).astype(int), axis=1)
    order = balanced_order(load, 8)
    assert imbalance(rank_load(load, 8)).max() > 1.5
    assert imbalance(rank_load(np.take_along_axis(load, order, axis=1), 8)).max() < 1.06


def shares(load: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Load of each slot if copies share their expert's."""
    return load[order] / np.bincount(order)[order]


@given(st.data())
def test_copies_leave_no_expert_out_and_are_never_worse(data):
    num_ranks, num_experts = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 40))
    slots = num_ranks * (-(-num_experts // num_ranks) + data.draw(st.integers(0, 3)))
    load = np.array(data.draw(st.lists(st.integers(0, 10**6), min_size=num_experts, max_size=num_experts)))
    order = replicated_order(load, num_ranks, slots)
    assert (order.size, set(order)) == (slots, set(range(num_experts)))
    np.testing.assert_array_equal(order, replicated_order(load, num_ranks, slots))
    table = copy_table(order, num_experts)
    np.testing.assert_array_equal(slot_experts(table, slots), order)
    np.testing.assert_array_equal(table[:, 0], np.bincount(order))
    assert shares(load, order).max() <= load.max()


def test_an_expert_busier_than_a_rank_is_shared():
    """An eighth of all assignments, 288 experts on 32 ranks: over four times the mean, with one spare slot each 1.1."""
    load = np.full(288, 700)
    load[17] = load.sum() // 7
    plain = balanced_order(load, 32)
    assert imbalance(rank_load(load[plain], 32)) > 4
    order = replicated_order(load, 32, 320)
    assert imbalance(rank_load(shares(load, order), 32)) < 1.1
    with pytest.raises(MeshError, match="300 for 288 experts on 32 ranks, expected a multiple of 32 from 288 on"):
        replicated_order(load, 32, 300)


@pytest.mark.slow
def test_copies_of_experts_give_the_same_bits():
    config = small_config()
    params = {name: value for name, value in random_params(config, 0).items() if not name.startswith("mtp")}
    tokens = jax.random.randint(jax.random.key(1), (2, 24), 0, 128)
    order = np.array([3, 0, 3, 1, 2, 4, 5, 3, 6, 7, 0, 2])
    copied = dict(params)
    for layer in config.moe_layers:
        prefix = f"layers.{layer.index}.moe"
        copied[f"{prefix}.copies"] = jnp.asarray(copy_table(order, config.num_experts))
        copied |= {
            f"{prefix}.experts.{name}": params[f"{prefix}.experts.{name}"][order] for name in ("gate", "up", "down")
        }

    def run(config: Any, params: Any) -> Any:
        skeleton = abstract(config, dtype=jnp.float32, layout=SingleDevice("gathered"), mtp=False)
        out = jax.jit(lambda params: bind(skeleton, params).forward(tokens, Chunk.whole(*tokens.shape)))(params)
        return out.hidden_BTD, jnp.stack(out.expert_ids)

    for a, b in zip(run(replace(config, expert_slots=12), copied), run(config, params), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_reordered_experts_are_the_same_model():
    config = small_config()
    params = {name: value for name, value in random_params(config, 0).items() if not name.startswith("mtp")}
    skeleton = abstract(config, dtype=jnp.float32, layout=SingleDevice("batched"), mtp=False)
    tokens = jax.random.randint(jax.random.key(1), (2, 24), 0, 128)

    @jax.jit
    def run(params):
        model = bind(skeleton, params)
        out = model.forward(tokens, Chunk.whole(*tokens.shape))
        return model.logits(out.hidden_BTD), jnp.stack(out.expert_ids)

    logits, ids = run(params)
    load = np.stack([expert_load(each, config.num_experts) for each in ids])
    order = balanced_order(load, 4)
    layers = [i for i, layer in enumerate(config.layers) if layer.moe]
    moved = dict(params)
    for layer, row in zip(layers, order, strict=True):
        for name in ("experts.gate", "experts.up", "experts.down", "router.weight", "router.bias"):
            moved[f"layers.{layer}.moe.{name}"] = params[f"layers.{layer}.moe.{name}"][row]
    logits_moved, ids_moved = run(moved)
    np.testing.assert_allclose(logits_moved, logits, atol=1e-5)
    named = [row[each] for row, each in zip(order, ids_moved, strict=True)]
    np.testing.assert_array_equal(np.stack(named), ids)
    after = rank_load(np.stack([expert_load(each, config.num_experts) for each in ids_moved]), 4)
    assert imbalance(after).max() < imbalance(rank_load(load, 4)).max()
