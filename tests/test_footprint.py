"""What a plan counts against what the runtime places, and what a compiler takes."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from functools import cache
from typing import get_args

import jax
import numpy as np
import pytest
from tiny import random_params, small_config

from stepjax.adapters.lora import ExpertForm, LoraConfig, attach, init, split
from stepjax.config import ModelConfig
from stepjax.errors import MeshError
from stepjax.model.step3p5 import abstract, axes_of
from stepjax.sharding.compiled.step_study import device_bytes
from stepjax.sharding.exchange import Exchange
from stepjax.sharding.expert_order import rank_load
from stepjax.sharding.mesh import MeshSpec
from stepjax.sharding.mesh_layout import MeshLayout
from stepjax.sharding.planner import lora_step as training
from stepjax.sharding.planner.device_bytes import PlacedArrays, bytes_by_part, cached, layout_of, parameters, placed
from stepjax.sharding.planner.exchanges import StepShape, payloads, serving_exchanges
from stepjax.sharding.planner.hardware import DEVICES, parse
from stepjax.sharding.planner.step_time import RoutingDistribution, devices_of_domain, exchange_time, tokens_per_step
from stepjax.sharding.rules import ShardingRules
from stepjax.sharding.sharded_checkpoint import shardings
from stepjax.train.planning.check import check, planned
from stepjax.train.planning.workload import Workload, step_of, study_model
from stepjax.weights.formats import FORMATS
from stepjax.weights.inventory import count_parameters, inventory
from stepjax.weights.plain import PLAIN

FLASH = ModelConfig.preset("step-3.5-flash")
TINY = dataclasses.replace(small_config(), max_positions=2048)
DECODE = Workload("decode", batch=4, context=256)


def total(arrays: Iterable[PlacedArrays]) -> int:
    return sum(each.num_bytes for each in arrays)


# Bytes of the release


@pytest.mark.parametrize("experts", FORMATS.values(), ids=FORMATS)
def test_the_parameters_are_those_of_a_release(experts):
    kinds = parameters(FLASH, experts=experts, depths=3)
    expected = sum(spec.num_bytes for spec in inventory(FLASH, experts=experts))
    assert sum(kind.num_elements * kind.itemsize for kind in kinds) == expected
    assert sum(kind.count for kind in kinds) == len(inventory(FLASH, experts=experts))
    if experts == PLAIN:
        assert (expected, sum(kind.count for kind in kinds)) == (398_768_626_944, 804)
        assert sum(kind.num_elements for kind in kinds) == count_parameters(FLASH).total == 199_384_301_376


def test_a_rank_of_eight_holds_an_eighth_of_the_experts():
    layout = layout_of(FLASH, MeshSpec(expert=8), "expert", PLAIN)
    held = [each for each in placed(parameters(FLASH), layout) if each.kind.part == "experts"]
    assert sum(each.num_elements for each in held) == 23_781_703_680
    assert bytes_by_part(held) == {"experts": 2 * 23_781_703_680}


# Bytes of a device

DRAFTING = dataclasses.replace(DECODE, batch=3, drafts=2)
SHORT = Workload("decode", batch=8, context=256)
PREFILL = Workload("prefill", batch=2, context=256, chunk=64)
TRAIN = Workload("train", batch=8, context=64)
LORA = Workload("lora", batch=8, context=64)


@pytest.mark.parametrize(
    ("mesh", "strategy", "workload"),
    [
        ("data=1", "expert_tensor", DECODE),
        ("expert=8", "expert", DRAFTING),
        ("expert=4,tensor=2", "expert_tensor", DECODE),
        ("tensor=2", "tensor", DRAFTING),
        ("context=2,expert=2,tensor=2", "expert_tensor", DRAFTING),
        ("data=2,expert=4", "expert_tensor", DRAFTING),
        ("data=4,tensor=2", "fsdp", DECODE),
        ("expert=4,tensor=2", "expert_tensor", PREFILL),
        ("context=2,expert=2,tensor=2", "expert", PREFILL),
        ("data=2,expert=4", "expert_tensor", PREFILL),
        ("expert=8", "expert", TRAIN),
        ("context=2,expert=2,tensor=2", "expert_tensor", TRAIN),
        ("data=4,tensor=2", "fsdp", TRAIN),
        ("expert=4,tensor=2", "expert_tensor", LORA),
        ("data=2,context=2,expert=2", "fsdp", LORA),
    ],
)
def test_a_device_holds_what_the_runtime_would_place(mesh, strategy, workload):
    """Against the very arguments of the step that is compiled, on devices that are there."""
    spec = MeshSpec.parse(mesh)
    config = dataclasses.replace(TINY, mtp_layers=TINY.mtp_layers[: workload.drafts])
    layout = MeshLayout(spec.build(), ShardingRules(config, spec, strategy))
    step = step_of(config, workload, layout.together() if workload.served else layout)
    tokens = 4 * (8 // spec.data) * (64 // spec.context)
    if workload.step == "train":
        expected = device_bytes(step.arguments[0]) + 4 * tokens
    elif workload.step == "lora":
        expected = device_bytes(step.arguments)
    else:  # every device has all sequences, and all of their ids
        expected = device_bytes(step.arguments[:2]) + sum(leaf.nbytes for leaf in jax.tree.leaves(step.arguments[2:]))
    assert planned(TINY, workload, spec, strategy).argument_bytes == expected


@cache
def compiled(mesh: str, workload: Workload):
    return study_model(TINY, workload, MeshSpec.parse(mesh)).report


@pytest.mark.parametrize(
    ("mesh", "workload"),
    [
        pytest.param("expert=4,tensor=2", DECODE, marks=pytest.mark.slow),
        ("data=2,context=2,tensor=2", DECODE),
        pytest.param("expert=4,tensor=2", LORA, marks=pytest.mark.slow),
    ],
)
def test_the_compiler_takes_as_many_bytes(mesh, workload):
    found = check(TINY, workload, MeshSpec.parse(mesh), "expert_tensor", compiled(mesh, workload))
    assert found.arguments_hold
    assert found.peak_error is None  # a CPU's temporaries are not compared
    assert found.holds
    wrong = dataclasses.replace(found, argument_bytes=found.argument_bytes + 1)
    assert not wrong.holds


@pytest.mark.aot
@pytest.mark.parametrize(
    ("mesh", "workload"),
    [
        ("expert=4,tensor=2", DECODE),
        ("expert=4,tensor=2", dataclasses.replace(DECODE, batch=1)),
        ("expert=4,tensor=2", dataclasses.replace(DECODE, drafts=2)),
        ("context=2,tensor=2", DECODE),
        ("context=2,tensor=2", dataclasses.replace(DECODE, batch=16, drafts=1)),  # tokens are split, and merged halves
        ("data=2,tensor=2", dataclasses.replace(DECODE, drafts=2)),
        ("tensor=2", Workload("prefill", batch=2, context=1024, chunk=1024)),
        ("context=2,tensor=2", Workload("prefill", batch=1, context=2048, chunk=2048)),
        ("tensor=2", Workload("prefill", batch=2, context=1024, chunk=1024, drafts=1)),
        ("context=2,tensor=2", Workload("prefill", batch=1, context=2048, chunk=2048, drafts=2)),
        ("context=2", Workload("prefill", batch=2, context=256, chunk=64, drafts=1)),
    ],
)
def test_the_gpu_compiler_sends_what_is_planned(mesh, workload):
    """A vocabulary so large that no compiler gathers the embedding matrix rather than its rows."""
    assert_sent_as_planned(mesh, "expert_tensor", workload)


@pytest.mark.aot
@pytest.mark.parametrize(
    ("mesh", "strategy", "workload"),
    [
        ("expert=4", "wide", DECODE),
        ("expert=2,tensor=2", "wide", dataclasses.replace(DECODE, drafts=2)),
        ("data=2,expert=2", "wide_data", DECODE),
        ("expert=4", "wide", Workload("prefill", batch=4, context=1024, chunk=1024)),
        ("data=2,expert=2", "wide_data", Workload("prefill", batch=4, context=1024, chunk=1024)),
    ],
)
def test_the_gpu_compiler_sends_what_is_planned_where_sequences_are_split(mesh, strategy, workload):
    assert_sent_as_planned(mesh, strategy, workload)


def assert_sent_as_planned(mesh: str, strategy: str, workload: Workload) -> None:
    config, spec = dataclasses.replace(TINY, vocab_size=8192), MeshSpec.parse(mesh)
    study = study_model(config, workload, spec, strategy=strategy, target="h100")
    found = check(config, workload, spec, strategy, study.report)
    assert found.arguments_hold
    assert found.payloads == found.planned.payloads
    assert found.asked_payloads == found.planned.asked_payloads


@pytest.mark.aot
def test_attention_multiplies_by_its_weights_where_they_lie():
    """Joined with the gate's few rows, query, key and value maps would be copied in every step: 84 MB a layer."""
    config = dataclasses.replace(FLASH, layers=FLASH.layers[:1], mtp_layers=())
    found = check(
        config, SHORT, MeshSpec(), "expert_tensor", study_model(config, SHORT, MeshSpec(), target="h100").report
    )
    assert found.holds
    assert found.peak_bytes - found.argument_bytes < 40e6


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_whole_numbers_are_studied_as_they_are_planned(name):
    config = dataclasses.replace(TINY, expert_size=64)
    workload = dataclasses.replace(DECODE, experts=FORMATS[name])
    spec = MeshSpec(expert=4)
    layout = MeshLayout(spec.build(), ShardingRules(config, spec, experts=workload.experts))
    step = step_of(dataclasses.replace(config, mtp_layers=()), workload, layout)
    mine = placed(
        parameters(config, experts=workload.experts), layout_of(config, spec, "expert_tensor", workload.experts)
    )
    assert total(mine) == device_bytes(step.params)


def test_caches_are_pages_or_rows():
    layout = layout_of(FLASH, MeshSpec(context=2, expert=4), "expert_tensor", PLAIN)
    rows = cached(FLASH, layout, batch=3, length=4096, depths=0)
    pages = cached(FLASH, layout, batch=3, length=0, depths=0, pages=(3 * 32, 128))
    assert rows.full_bytes == pages.full_bytes == 3 * 4096 * 49152 // 4 // 2
    assert rows.ring_bytes == pages.ring_bytes == 3 * 33 * 516 * 4096 // 4
    assert rows.rows_split
    assert pages.rows_split
    assert rows.num_full == 12


@pytest.mark.parametrize("form", get_args(ExpertForm))
@pytest.mark.parametrize(
    ("mesh", "strategy"),
    [("expert=4,tensor=2", "expert_tensor"), ("data=2,expert=4", "fsdp"), ("context=2,expert=2,tensor=2", "tensor")],
)
def test_an_adapter_takes_what_a_real_one_takes(form, mesh, strategy):
    """Attached to parameters on devices, every factor in the place that training gives it."""
    adapted = LoraConfig(rank=4, experts=form, expert_rank=2)
    spec = MeshSpec.parse(mesh)
    layout = MeshLayout(spec.build(), ShardingRules(TINY, spec, strategy))
    axes = axes_of(abstract(TINY))
    params = {path: jax.device_put(w, layout.parameter(*axes[path])) for path, w in random_params(TINY, 0).items()}
    where = shardings(TINY, adapted, layout)
    adapter = {name: jax.device_put(x, where[name]) for name, x in init(TINY, adapted, jax.random.key(0)).items()}
    _, attached = split(attach(params, adapter, adapted))
    first = jax.devices()[0]
    shards = [shard for x in attached.values() for shard in x.addressable_shards if shard.device == first]
    kinds = training.adapter_factors(TINY, adapted)
    assert sum(kind.num_elements for kind in kinds) == sum(x.size for x in attached.values())
    assert sum(kind.count for kind in kinds) == len(attached)
    mine = placed(kinds, layout_of(TINY, spec, strategy, PLAIN))
    assert total(mine) == sum(shard.data.nbytes for shard in shards)


def test_adapters_of_the_release():
    """Attention q, k, v, o, dense and shared maps at rank 32; experts at 32 / 8, or with a factor in common."""

    def pair(rank: int, *sizes: int) -> int:
        return rank * sum(sizes)

    attention = 0
    for layer in FLASH.layers:
        q, kv = layer.num_heads * 128, layer.num_kv_heads * 128
        attention += pair(32, q, 4096, kv, 4096, kv, 4096, q, 4096)
    plain = attention + 3 * 3 * pair(32, 4096, 11264) + 42 * 3 * pair(32, 4096, 1280)
    each = plain + 42 * 288 * 3 * pair(4, 4096, 1280)
    common = plain + 42 * 3 * (288 * pair(4, 1280) + pair(4, 4096))

    def size(**given) -> int:
        return sum(kind.num_elements for kind in training.adapter_factors(FLASH, LoraConfig(**given)))

    assert (size(), size(experts="shared_outer"), size(experts=None)) == (each, common, plain)


def test_what_cannot_be_split_is_refused_by_the_same_rules():
    with pytest.raises(MeshError, match="cut inside an FP8 block of 128"):
        layout_of(FLASH, MeshSpec(tensor=4), "tensor", FORMATS["fp8"])
    with pytest.raises(MeshError, match="groups of 64"):
        parameters(TINY, experts=FORMATS["int4"])


# StepShape and experts


def test_distinct_experts_by_draws():
    rng = np.random.default_rng(1)
    drawn = [len(np.unique([rng.permutation(288)[:8] for _ in range(16)])) for _ in range(300)]
    assert RoutingDistribution().distinct(FLASH, 16) == pytest.approx(np.mean(drawn), rel=0.01)
    assert RoutingDistribution().distinct(FLASH, 1) == pytest.approx(8)


def test_a_measured_routing_touches_fewer_experts():
    skewed = RoutingDistribution(tuple(1.0 / (1 + each) for each in range(288)))
    chance = skewed.probabilities(FLASH)
    assert chance.sum() == pytest.approx(8)
    assert chance.max() <= 1
    assert skewed.distinct(FLASH, 16) < 0.8 * RoutingDistribution().distinct(FLASH, 16)


@pytest.mark.parametrize("tokens", [1, 8, 4096])
def test_the_fullest_rank_is_that_of_drawn_routings(tokens):
    rng = np.random.default_rng(2)
    fullest = []
    for _ in range(40):
        ids = np.argsort(rng.random((tokens, 288)), axis=1)[:, :8]
        fullest.append(rank_load(np.bincount(ids.ravel(), minlength=288), 8).max())
    found, _ = RoutingDistribution().fullest_rank(FLASH, 8, tokens)
    assert found == pytest.approx(np.mean(fullest), rel=0.1)


def test_drafts_gain_a_geometric_sum():
    assert tokens_per_step(0, 0.5) == 1
    assert tokens_per_step(3, 0.5) == 1 + 0.5 + 0.25 + 0.125


# Links


@pytest.mark.parametrize(
    ("mesh", "axes", "domain", "inside"),
    [
        ("expert=8", ("expert",), 8, 8),
        ("expert=32", ("expert",), 8, 8),
        ("expert=8,tensor=4", ("tensor",), 8, 4),
        ("expert=8,tensor=4", ("expert",), 8, 2),
        ("data=2,expert=8", ("data",), 8, 1),
        ("expert=8,tensor=4", ("expert", "tensor"), 72, 32),
    ],
)
def test_devices_of_a_group_that_share_a_node(mesh, axes, domain, inside):
    assert devices_of_domain(axes, MeshSpec.parse(mesh), domain) == inside


def test_a_ring_across_nodes_takes_the_network():
    one = Exchange("all-gather", ("expert",), 32e9, 1)
    inside = exchange_time(one, MeshSpec(expert=8), parse("8xH100"))
    across = exchange_time(one, MeshSpec(expert=16), parse("2 nodes of 8xH100"))
    device = DEVICES["H100"]
    assert inside == pytest.approx(7 / 8 * 32e9 / 450e9 + device.link_latency)
    assert across == pytest.approx(15 / 16 * 32e9 / 8 / 50e9 + device.network_latency)
    thrown = exchange_time(one._replace(kind="all-to-all"), MeshSpec(expert=16), parse("2 nodes of 8xH100"))
    assert thrown == pytest.approx(32e9 / 2 / 50e9 + device.network_latency)


def test_a_decode_step_sends_two_sums_a_layer():
    layout = layout_of(FLASH, MeshSpec(expert=8, tensor=4), "expert_tensor", PLAIN)
    found = payloads(serving_exchanges(layout, StepShape("decode", 32, 1, 4096), rows_split=False))
    group = ("expert", "tensor")
    assert found == {
        ("all-reduce", group): 91 * 32 * 4096 * 2,
        ("all-gather", group): 32 * 128896 * 4,
    }


def test_a_long_piece_is_exchanged_where_the_runtime_exchanges():
    """The same decision as the layout's, and buffers of the sizes that it makes."""
    layout = layout_of(FLASH, MeshSpec(expert=36, tensor=8), "expert_tensor", PLAIN)
    work = StepShape("prefill", 1, 36 * 8 * 1024, 36 * 8 * 1024)
    kinds = {each.kind for each in serving_exchanges(layout, work, rows_split=False)}
    from stepjax.sharding.expert_group import Group
    from stepjax.sharding.expert_parallel import exchange_pays

    pays = exchange_pays(FLASH, Group.of(layout.rules), 1024)
    assert ("all-to-all" in kinds) == pays
    assert math.isfinite(sum(each.payload_bytes for each in serving_exchanges(layout, work, rows_split=False)))


@pytest.mark.slow
def test_check_is_printed(capsys):
    from stepjax.cli import main

    command = "study --model step-tiny --mesh expert=4,tensor=2 --batch 4 --context 128 --check"
    assert main([*command.split(), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["check"]
    assert found["holds"]
    assert found["arguments"]["planned"] == found["arguments"]["compiled"]
    assert main(command.split()) == 0
    assert "The plan holds." in capsys.readouterr().out
