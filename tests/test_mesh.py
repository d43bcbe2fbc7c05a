"""Meshes as text, the table of rules, and what is refused: each with its reason, none with a crash."""

from __future__ import annotations

import dataclasses
import re
from functools import cache
from typing import Any

import jax
import pytest
from checkpoints import tiny_hub_config
from jax.sharding import PartitionSpec as P

from stepjax.config import ModelConfig
from stepjax.errors import MeshError
from stepjax.infer.commands.options import STRATEGY_NAMES
from stepjax.model.layout import AXES as LOGICAL
from stepjax.model.step3p5 import abstract, axes_of, params_of
from stepjax.sharding.mesh import AXES, MeshSpec
from stepjax.sharding.rules import DEFAULT, GROUP, STRATEGIES, ShardingRules, whole_mesh
from stepjax.weights.fp8 import Fp8Blocks
from stepjax.weights.plain import PLAIN

FLASH = ModelConfig.preset("step-3.5-flash")
FP8 = dataclasses.replace(FLASH, fp8_block=(128, 128))
TINY = ModelConfig.from_hf(tiny_hub_config())
EIGHT = dataclasses.replace(TINY, num_experts=12)

# Text, devices, strategy, configuration, FP8 kept, what the message must say.
ILLEGAL = [
    ("expert", 8, "expert", FLASH, False, "expert = ''"),
    ("expert=", 8, "expert", FLASH, False, "expected an integer"),
    ("expert=two", 8, "expert", FLASH, False, "expert = 'two'"),
    ("expert=1.5", 8, "expert", FLASH, False, "expected an integer"),
    ("expert=0", 8, "expert", FLASH, False, "expert = 0, expected at least 1"),
    ("expert=-2", 8, "expert", FLASH, False, "expert = -2"),
    ("expert=--1", 8, "expert", FLASH, False, "expected an integer"),
    ("expert=9999999", 8, "expert", FLASH, False, "expected an integer"),
    ("expert=²", 8, "expert", FLASH, False, "expected an integer"),
    ("experts=8", 8, "expert", FLASH, False, f"'experts' is not an axis, expected one of {', '.join(AXES)}"),
    ("model=8", 8, "expert", FLASH, False, "'model' is not an axis"),
    ("8", 8, "expert", FLASH, False, "'8' is not an axis"),
    ("tensor=2;expert=4", 8, "expert", FLASH, False, "expected an integer"),
    ("expert=2,expert=4", 8, "expert", FLASH, False, "expert is given twice"),
    ("tensor=1,tensor=1", 8, "expert", FLASH, False, "tensor is given twice"),
    ("data=-1,expert=-1", 8, "expert", FLASH, False, "leaves two axes open"),
    ("expert=16", 8, "expert", FLASH, False, "takes 16 devices, found 8; expert=8 would fit"),
    ("expert=4,tensor=4", 8, "expert", FLASH, False, "takes 16 devices, found 8; expert=2,tensor=4 would fit"),
    ("expert=3,data=-1", 8, "expert", FLASH, False, "leaves 8 / 3 devices for data"),
    ("tensor=16,data=-1", 8, "expert", FLASH, False, "leaves 8 / 16 devices for data"),
    ("expert=8", 8, "experts", FLASH, False, "strategy: is 'experts', expected one of tensor, expert"),
    ("expert=8", 8, "", FLASH, False, "strategy: is ''"),
    (
        "expert=5",
        5,
        "expert",
        FLASH,
        False,
        "expert=5: routed experts (288) cannot be split 5 ways; the nearest that can is 4",
    ),
    ("expert=7", 7, "expert", FLASH, False, "routed experts (288) cannot be split 7 ways; the nearest that can is 6"),
    (
        "expert=64",
        64,
        "expert_tensor",
        FLASH,
        False,
        "routed experts (288) cannot be split 64 ways; the nearest that can is 72",
    ),
    ("expert=256", 256, "expert_tensor", FLASH, False, "the nearest that can is 288"),
    (
        "expert=40",
        40,
        "expert",
        FLASH,
        False,
        "routed experts (288) cannot be split 40 ways; the nearest that can is 36",
    ),
    ("expert=512", 512, "expert", FLASH, False, "routed experts (288) cannot be split 512 ways"),
    ("expert=11,tensor=2", 22, "expert_tensor", FLASH, False, "routed experts (288) cannot be split 11 ways"),
    ("expert=16,tensor=5", 80, "expert", FLASH, False, "cannot be split"),
    (
        "tensor=3",
        3,
        "tensor",
        FLASH,
        False,
        "query heads (64 and 96) cannot be split 3 ways; the nearest that can is 2",
    ),
    (
        "tensor=5",
        5,
        "tensor",
        FLASH,
        False,
        "query heads (64 and 96) cannot be split 5 ways; the nearest that can is 4",
    ),
    ("tensor=6", 6, "tensor", FLASH, False, "query heads (64 and 96) cannot be split 6 ways"),
    ("tensor=7", 7, "tensor", FLASH, False, "query heads (64 and 96) cannot be split 7 ways"),
    (
        "tensor=12",
        12,
        "expert_tensor",
        FLASH,
        False,
        "query heads (64 and 96) cannot be split 12 ways; the nearest that can is 8",
    ),
    ("tensor=24", 24, "expert_tensor", FLASH, False, "query heads (64 and 96) cannot be split 24 ways"),
    ("tensor=48", 48, "expert_tensor", FLASH, False, "(all that can: 1, 2, 4, 8, 16, 32)"),
    (
        "tensor=64",
        64,
        "expert_tensor",
        FLASH,
        False,
        "query heads (64 and 96) cannot be split 64 ways; the nearest that can is 32",
    ),
    ("tensor=96", 96, "expert_tensor", FLASH, False, "query heads (64 and 96) cannot be split 96 ways"),
    ("expert=9,tensor=3", 27, "expert_tensor", FLASH, False, "tensor=3: query heads"),
    ("tensor=4", 4, "tensor", FP8, True, "cut inside an FP8 block of 128; expected 1 or 2 or 5 or 10 ways"),
    ("tensor=8", 8, "tensor", FP8, True, "the width of a routed expert (1280) would be cut inside an FP8 block"),
    ("tensor=16", 16, "expert_tensor", FP8, True, "expected 1 or 2 or 5 or 10 ways"),
    ("tensor=32", 32, "expert_tensor", FP8, True, "or load the weights widened"),
    ("expert=8,tensor=4", 32, "expert_tensor", FP8, True, "tensor=4: the width of a routed expert"),
    ("expert=2,tensor=2", 4, "tensor", FP8, True, "expert=2,tensor=2: the width of a routed expert"),
    ("data=3", 3, "fsdp", FLASH, False, "data=3: the model's width (4096) cannot be split 3 ways"),
    ("data=48", 48, "fsdp", FLASH, False, "the model's width (4096) cannot be split 48 ways"),
    ("data=64", 64, "fsdp", FP8, True, "the model's width (4096) would be cut inside an FP8 block of 128"),
    ("expert=3", 3, "expert", TINY, False, "routed experts (8) cannot be split 3 ways"),
    ("tensor=4", 4, "tensor", TINY, False, "query heads (4 and 6) cannot be split 4 ways; the nearest that can is 2"),
    ("expert=8", 8, "expert_tensor", EIGHT, False, "routed experts (12) cannot be split 8 ways"),
    (
        "expert=64",
        64,
        "wide",
        FLASH,
        False,
        "144, 288), or hold some of them twice: --expert-slots 320",
    ),
    ("expert=8,tensor=8", 64, "wide", FP8, True, "routed experts (288) cannot be split 64 ways"),
    ("data=8,expert=8", 64, "wide_data", FLASH, False, "data=8,expert=8: routed experts (288) cannot be split 64 ways"),
    ("expert=4,tensor=3", 12, "wide", FLASH, False, "tensor=3: query heads (64 and 96) cannot be split 3 ways"),
    ("expert=8", 8, "wide,fsdp", FLASH, False, "wide is one of its own: it splits sequences over data and expert"),
]


@pytest.mark.parametrize(("text", "devices", "strategy", "config", "fp8", "message"), ILLEGAL)
def test_an_illegal_mesh_is_refused_with_its_reason(text, devices, strategy, config, fp8, message):
    with pytest.raises(MeshError) as refused:
        ShardingRules(config, MeshSpec.parse(text).resolve(devices), strategy, Fp8Blocks() if fp8 else PLAIN)
    assert message in str(refused.value)


@cache
def skeleton(config: ModelConfig) -> tuple[dict[str, Any], dict[str, tuple[str, ...]]]:
    """Shapes and logical axes of every parameter."""
    model = abstract(config)
    return params_of(model), axes_of(model)


LEGAL = [
    ("", 1, "tensor", FLASH, False, 0),
    ("expert=8", 8, "expert", FLASH, False, 0),
    ("expert=8,tensor=4", 32, "expert_tensor", FLASH, False, 1),
    ("expert=32", 32, "expert", FLASH, False, 1),
    ("expert=36", 36, "expert", FLASH, False, 5),
    ("expert=8", 8, "expert", FP8, True, 0),
    ("expert=4,tensor=2", 8, "expert_tensor", FP8, True, 0),
    ("tensor=16", 16, "tensor", FP8, False, 1),
    ("data=4,context=8", 32, "fsdp", FLASH, False, 0),
    ("data=-1,expert=4", 8, "fsdp", FLASH, False, 0),
    ("", 1, "wide", FLASH, False, 0),
    ("expert=72", 72, "wide", FP8, True, 0),  # 72 ways of attention without a copy of a key
    ("expert=4,tensor=8", 32, "wide", FP8, True, 0),  # whole experts over tensor too
    ("data=4,tensor=8", 32, "wide_data", FP8, True, 0),
    ("expert=32,tensor=2", 64, "wide", FP8, True, 0),  # or their widths, where whole ones do not divide
    ("data=8,tensor=8", 64, "wide_data", FLASH, False, 0),
    ("context=2,expert=4,tensor=4", 32, "wide", FLASH, False, 0),
]


@pytest.mark.parametrize(("text", "devices", "strategy", "config", "fp8", "notes"), LEGAL)
def test_a_legal_mesh_says_what_it_copies(text, devices, strategy, config, fp8, notes):
    rules = ShardingRules(config, MeshSpec.parse(text).resolve(devices), strategy, Fp8Blocks() if fp8 else PLAIN)
    assert len(rules.notes) == notes
    assert all("each hold a copy" in note for note in rules.notes)


@pytest.mark.parametrize(("text", "devices", "strategy", "config", "fp8", "notes"), LEGAL)
def test_no_parameter_is_cut_unevenly(text, devices, strategy, config, fp8, notes):
    spec = MeshSpec.parse(text).resolve(devices)
    rules = ShardingRules(config, spec, strategy, Fp8Blocks() if fp8 else PLAIN)
    shapes, all_axes = skeleton(config)
    for name, axes in all_axes.items():
        for size, entry in zip(shapes[name].shape, rules.spec(*axes), strict=True):
            split = rules.size(() if entry is None else (entry,) if isinstance(entry, str) else entry)
            assert size % split == 0, (name, axes)


def test_parameters_of_a_device_are_the_arithmetic():
    """32 devices: routed experts and widths in 32 parts, key-value projections in 8, norms and routers whole."""
    rules = ShardingRules(FLASH, MeshSpec(expert=8, tensor=4), "expert_tensor")
    shapes, all_axes = skeleton(FLASH)
    total = 0
    for name, axes in all_axes.items():
        if name.startswith("mtp."):
            continue
        split = 1
        for entry in rules.spec(*axes):
            split *= rules.size(() if entry is None else (entry,) if isinstance(entry, str) else entry)
        total += shapes[name].size // split
    D, E, F, V, H = 4096, 288, 1280, 128896, 128
    experts = 42 * 3 * E * D * F // 32
    widths = (
        2 * V * D + 42 * 3 * D * F + 3 * 3 * D * 11264 + 12 * D * (2 * 64 * H + 64) + 33 * D * (2 * 96 * H + 96)
    ) // 32
    kv = 45 * 2 * D * 8 * H // 8
    whole = 42 * (E * D + E) + 45 * (2 * D + 2 * H) + D
    assert total == experts + widths + kv + whole == 6_238_649_408


def test_text_goes_round():
    for text in ("data=2,context=2,expert=4,tensor=8", "expert=-1,tensor=2", "data=1"):
        assert str(MeshSpec.parse(text)) == text
    assert MeshSpec.parse(" expert = 4 , tensor=2,") == MeshSpec(expert=4, tensor=2)
    assert MeshSpec.parse("data=-1,expert=4").resolve(8) == MeshSpec(data=2, expert=4)


def test_neighbours_in_tensor_are_neighbours():
    mesh = MeshSpec(data=2, expert=2, tensor=2).build()
    assert mesh.axis_names == AXES
    assert [device.id for device in mesh.devices.flat] == list(range(8))
    assert mesh.devices.squeeze()[1, 0].tolist() == jax.devices()[4:6]  # the axes of size 1 left out
    assert MeshSpec(tensor=2).build().size == 2  # the rest stays idle


def test_an_activation_that_does_not_divide_is_copied():
    rules = ShardingRules(TINY, MeshSpec(data=2, context=2, tensor=2), "tensor")
    assert rules.fit((4, 64, 64), "batch", "length", "embed") == P("data", "context", None)
    assert rules.fit((3, 64, 64), "batch", "length", "embed") == P(None, "context", None)
    assert rules.fit((4, 64, 64), "batch", "stream", "embed") == P("data", ("context", "tensor"), None)
    assert rules.fit((4, 63, 2, 16), "batch", "rows", "kv_heads", "head") == P("data", None, "tensor", None)


def test_wide_splits_sequences_over_the_devices_that_share_the_experts():
    mesh = MeshSpec(data=2, expert=2, tensor=2)
    rules, everywhere = ShardingRules(TINY, mesh, "wide"), ShardingRules(TINY, mesh, "wide_data")
    for each in (rules, everywhere):
        assert (
            each.spec("heads", "embed") == each.spec("mlp", "embed") == each.spec("vocab", "embed") == P("tensor", None)
        )
        assert each.fit((8, 64, 64), "batch", "length", "embed") == P(("data", "expert"), None, None)
        assert each.fit((8, 64, 2, 16), "batch", "rows", "kv_heads", "head") == P(
            ("data", "expert"), None, "tensor", None
        )
        assert each.attention_group == ("tensor",)
    assert rules.spec("expert", "expert_mlp", "embed") == P(("expert", "tensor"), None, None)
    assert everywhere.spec("expert", "expert_mlp", "embed") == P(("data", "expert", "tensor"), None, None)
    assert (rules.group, everywhere.group) == (("expert", "tensor"), ("data", "expert", "tensor"))


def test_the_width_of_wide_experts_is_split_only_where_whole_experts_do_not_divide():
    halves = ShardingRules(EIGHT, MeshSpec(expert=4, tensor=2), "wide")  # 12 experts
    assert halves.spec("expert", "expert_mlp", "embed") == P("expert", "tensor", None)
    assert ShardingRules(EIGHT, MeshSpec(expert=2, tensor=2), "wide").table["expert"] == ("expert", "tensor")


def test_sequences_are_split_as_far_as_they_divide():
    rules = ShardingRules(TINY, MeshSpec(data=2, expert=4), "wide")
    for batch, axes in ((16, ("data", "expert")), (4, "expert"), (12, "expert"), (6, "data"), (9, None), (1, None)):
        assert rules.fit((batch, 7), "batch", "length") == P(axes, None), batch


def test_training_keeps_matrices_apart_and_vectors_whole():
    rules = ShardingRules(TINY, MeshSpec(data=2, expert=2, tensor=2), "fsdp")
    assert rules.spec("expert", "expert_mlp", "embed") == P("expert", "tensor", "data")
    assert rules.gathered("expert", "expert_mlp", "embed") == P("expert", "tensor", None)
    assert rules.spec("embed") == P(None)


def test_the_tables_use_the_two_alphabets():
    for table in STRATEGIES.values():
        assert set(table) <= set(LOGICAL)
        assert {axis for axes in table.values() for axis in axes} <= set(AXES)
    assert set(GROUP) <= set(AXES)


# A strategy alone


@pytest.mark.parametrize(
    ("strategy", "devices", "config", "mesh"),
    [
        ("wide", 8, FLASH, "expert=8"),
        ("wide", 8, TINY, "expert=8"),
        ("wide", 64, FLASH, "expert=32,tensor=2"),
        ("wide", 72, FLASH, "expert=72"),
        ("wide_data", 8, FLASH, "expert=8"),
        ("wide_data", 32, FLASH, "data=4,expert=8"),
        ("wide_data", 64, FLASH, "data=8,expert=4,tensor=2"),
        ("expert", 8, FLASH, "expert=8"),
        ("expert_tensor", 64, FLASH, "expert=32,tensor=2"),
        ("tensor", 8, FLASH, "tensor=8"),
        ("fsdp", 4, FLASH, "data=4"),
    ],
)
def test_a_strategy_alone_takes_a_mesh_over_all_devices(strategy, devices, config, mesh):
    spec = whole_mesh(strategy, devices, config=config)
    assert str(spec) == mesh
    assert spec.num_devices == devices


def test_a_rack_is_one_node():
    assert str(whole_mesh("wide_data", 72, config=FLASH, domain=72)) == "expert=72"


@pytest.mark.parametrize(
    ("strategy", "devices", "message"),
    [
        ("wide", 1, "strategy: wide splits a model over devices, found one; give --mesh, as --mesh expert=8"),
        ("wide", 7, "routed experts (288) cannot be split 7 ways"),
        ("tensor", 12, "cannot be split 12 ways; the nearest that can is 8"),
        ("broad", 8, "strategy: is 'broad', expected one of tensor, expert"),
        ("broad", 1, "strategy: is 'broad', expected one of tensor, expert"),
    ],
)
def test_a_strategy_that_cannot_take_all_devices_says_what_to_give(strategy, devices, message):
    with pytest.raises(MeshError, match=re.escape(message)):
        whole_mesh(strategy, devices, config=FLASH)


def test_commands_offer_every_strategy():
    """They list the names themselves, so that ``--help`` needs no jax."""
    assert set(STRATEGY_NAMES) == set(STRATEGIES)
    assert DEFAULT in STRATEGIES
