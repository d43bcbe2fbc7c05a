"""A step on a mesh that is not there: exact bytes, the collectives of the design, and refusals with their reason."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tiny import small_config

from stepjax.cli import main
from stepjax.gpu_target import compiling_for
from stepjax.infer.sampling.params import NUM_ENDS
from stepjax.model.cache import MAX_DRAFTS
from stepjax.ops.pallas_hopper import hopper_cores
from stepjax.sharding import devices
from stepjax.sharding.compiled.hlo import Collective
from stepjax.sharding.compiled.step_study import Launches, Places, StepStudy, by_place, copies, held_bytes
from stepjax.sharding.mesh import MeshSpec
from stepjax.sharding.mesh_layout import MeshLayout
from stepjax.sharding.planner.device_bytes import bytes_by_part, parameters, placed
from stepjax.sharding.rules import ShardingRules
from stepjax.train.planning.workload import Workload, step_of, study_model
from stepjax.weights.formats import FORMATS

ROOT = Path(__file__).resolve().parent.parent
MOST_KERNELS = 1000  # of a decode step of the release
LINES_WITHOUT_KERNELS = 65_104  # of HLO, of one sequence's (docs/numbers.md, Layers as a loop)
CONFIG = dataclasses.replace(small_config(), max_positions=2048)  # five layers, MoE from the second on
SHORT = dataclasses.replace(CONFIG, layers=CONFIG.layers[:2])
D, V, E, F, H = 64, 128, 8, 32, 16  # of both


@cache
def studied(mesh: str, workload: Workload, strategy: str = "expert_tensor", on: devices.Target = "cpu") -> StepStudy:
    config = SHORT if workload.step == "train" else CONFIG
    return study_model(config, workload, MeshSpec.parse(mesh), strategy=strategy, target=on)


def launched(study: StepStudy, *, inside: str = "") -> dict[tuple[str, str], int]:
    """Launches by kind and axes of the layer ``inside``, else of what lies in none."""
    (places,) = (each for each in study.places if (inside in each.names if inside else not each.names))
    return {(each.kind, ",".join(each.axes)): each.num_launches for each in places.launches}


# Decode

DECODE = Workload("decode", batch=4, context=256)
GROUP = "expert,tensor"  # query heads (4 and 6) go round tensor=2 alone


@pytest.mark.parametrize("on", ["cpu", pytest.param("h100", marks=pytest.mark.aot)])
def test_a_decode_step_costs_two_reductions_a_layer(on):
    study = studied("expert=4,tensor=2", DECODE, on=on)
    (layers, outside) = study.places
    assert layers.names == tuple(f"layer_{i}" for i in range(5))
    assert launched(study, inside="layer_0") == {("all-reduce", "tensor"): 1, ("all-reduce", GROUP): 1}
    assert launched(study) == {("all-reduce", GROUP): 1, ("all-gather", GROUP): 1}  # embedding, logits
    assert not outside.names
    (logits,) = (each for each in study.report.collectives if each.kind == "all-gather")
    assert logits.payload_bytes == 4 * V * 4  # of all sequences, float32: not the matrix


@pytest.mark.aot
def test_a_single_token_does_not_gather_the_embedding():
    """The GPU's compiler makes a slice of a gather of one row, and would bring the whole matrix to every device."""
    one_layer = dataclasses.replace(CONFIG, layers=CONFIG.layers[:1])
    study = study_model(one_layer, dataclasses.replace(DECODE, batch=1), MeshSpec(expert=4, tensor=2), target="h100")
    assert launched(study) == {("all-reduce", GROUP): 1, ("all-gather", GROUP): 1}
    assert max(each.payload_bytes for each in study.report.collectives) == V * 4  # the logits


@pytest.mark.slow
def test_a_draft_costs_four_reductions():
    """Embedding, merge, attention and MLP of each depth; two small gathers for the argmax, which no layer owns."""
    study = studied("expert=4,tensor=2", dataclasses.replace(DECODE, drafts=2))
    assert launched(study, inside="layer_4") == {("all-reduce", "tensor"): 1, ("all-reduce", GROUP): 1}
    assert launched(study, inside="mtp_1") == {("all-reduce", "tensor"): 1, ("all-reduce", GROUP): 3}
    assert launched(study, inside="mtp_2") == launched(study, inside="mtp_1")
    assert launched(study) == {("all-reduce", GROUP): 1, ("all-gather", GROUP): 1 + 2 * 2}


@pytest.mark.slow
def test_replicas_of_an_engine_exchange_nothing():
    """Each holds all pages. Over context the maximum and the sums of each full-attention layer."""
    study = studied("data=2,context=2,tensor=2", DECODE, "tensor")
    assert not [each for each in study.report.collectives if "data" in each.axes]
    assert study.notes[-1] == "4 sequences are not split over data=2: 2 devices each hold a copy"
    assert launched(study, inside="layer_0") == {("all-reduce", "tensor"): 2, ("all-reduce", "context"): 2}
    assert launched(study, inside="layer_1") == {("all-reduce", "tensor"): 2}
    assert launched(study)["all-gather", "tensor"] == 1


def test_parameters_and_arguments_are_the_arithmetic():
    """Experts over 8, heads over 2, everything else that is wide over 8; the rest is whole."""
    study = studied("expert=4,tensor=2", DECODE)
    attention = sum(D * (2 * n * H + n) // 2 + 2 * D * 2 * H // 2 + 2 * H + 2 * D for n in (4, 6, 6, 6, 4))
    assert study.parameters == {
        "embedding": V * D // 8,
        "head": V * D // 8,
        "final_norm": D,
        "attention": attention,
        "dense": 3 * D * 96 // 8,
        "router": 4 * (E * D + E),
        "experts": 4 * 3 * E * D * F // 8,
        "shared": 4 * 3 * D * 48 // 8,
    }
    assert study.parameter_bytes == 2 * sum(study.parameters.values()) + 2 * 4 * E  # biases are float32
    pages, ring, kv_heads = 4 * (256 // 64) + 1, 8 + 4, 2 // 2  # one page for what is padding
    assert study.cache_bytes == (2 * pages * 64 + 3 * 4 * ring) * 2 * kv_heads * H * 2
    # Length, newest token, activity, table of pages; sampling, and the rules: numbers, ends, flags, masks, by token.
    rules = 3 * 4 + 4 * NUM_ENDS + 4 + 3 + 4 * (1 + MAX_DRAFTS) * V // 32 + V * (4 + 1 + 4)
    of_slot = 4 + 4 + 1 + 4 * 256 // 64 + 5 * 4 + rules
    assert study.report.argument_bytes == study.parameter_bytes + study.cache_bytes + 4 * of_slot
    assert study.report.alias_bytes >= study.cache_bytes


@pytest.mark.slow
def test_blocks_of_8_bits_are_counted_with_their_scales():
    blocks = dataclasses.replace(CONFIG, fp8_block=(16, 16))
    workload = dataclasses.replace(DECODE, experts=FORMATS["fp8"])
    study = study_model(blocks, workload, MeshSpec(expert=4, tensor=2))
    wide = studied("expert=4,tensor=2", DECODE)
    experts = wide.parameters["experts"]
    assert study.parameters == wide.parameters
    assert wide.parameter_bytes - study.parameter_bytes == experts * 2 - (experts + experts // 256 * 4)
    beside = study.report.argument_bytes - study.parameter_bytes
    assert beside == wide.report.argument_bytes - wide.parameter_bytes


# Prefill


@pytest.mark.slow
@pytest.mark.parametrize("on", ["cpu", pytest.param("h100", marks=pytest.mark.aot)])
def test_a_long_chunk_is_gathered_and_scattered(on):
    """The stream lies split by tokens: each part of a layer gathers it and reduces into it; ids and weights go along.

    The CPU turns no sum into a reduce-scatter. The GPU gathers what is small at once, and names no layer for a
    reduce-scatter that it made of a sum.
    """
    study = studied("tensor=2", Workload("prefill", batch=1, context=1024, chunk=1024), "tensor", on)
    layer = launched(study, inside="layer_1")
    if on == "cpu":
        assert layer == {("all-gather", "tensor"): 4, ("reduce-scatter", "tensor"): 1, ("all-reduce", "tensor"): 1}
    else:
        assert layer == {("all-gather", "tensor"): 2, ("reduce-scatter", "tensor"): 1}
        assert launched(study)["reduce-scatter", "tensor"] == 5 + 1  # attentions, dense MLP


@pytest.mark.slow
def test_a_short_chunk_is_reduced():
    study = studied("expert=4,tensor=2", Workload("prefill", batch=4, context=256, chunk=64))
    assert launched(study, inside="layer_2") == {("all-reduce", "tensor"): 1, ("all-reduce", GROUP): 1}
    assert study.cache_bytes == studied("expert=4,tensor=2", DECODE).cache_bytes


# Training

TRAIN = Workload("train", batch=8, context=64)


@pytest.mark.slow
def test_a_training_step_holds_its_moments_where_its_parameters_lie():
    study = studied("data=4,tensor=2", TRAIN, "fsdp")
    biases = 4 * E
    trained = study.parameter_bytes - biases
    assert study.parameter_bytes == 4 * sum(study.parameters.values())  # float32
    assert study.optimizer_bytes == 2 * trained + 2 * 4  # two moments, two counts
    rows = 4 * (8 // 4) * 64 * 4
    assert study.report.argument_bytes == study.parameter_bytes + study.optimizer_bytes + rows + 4
    assert study.parameters["experts"] == 3 * E * D * F // 8
    assert study.parameters["embedding"] == V * D // 8


def test_a_training_step_gathers_matrices_over_replicas():
    """Each once, and ids of tokens. Only the embedding, of which few rows are used, moves hidden states instead."""
    study = studied("data=4,tensor=2", TRAIN, "fsdp")
    gathers = [each for each in study.report.collectives if (each.kind, each.axes) == ("all-gather", ("data",))]
    matrices = 2 * 5 + 3 + (3 + 3 + 1) + 1  # attentions, dense MLP, experts, shared expert, router, head
    assert 0 <= sum(each.num_launches for each in gathers) - matrices <= 2
    assert max(each.payload_bytes for each in gathers) == E * F // 2 * D * 4 < 8 * 64 * D * 4
    scopes = [each.scope for each in study.report.collectives if each.kind == "all-to-all"]
    assert all("_take" in scope for scope in scopes)


# Launches and bytes read of GPUs that are not there


@pytest.mark.aot
@pytest.mark.parametrize("experts", ["int4", "fp8"])
def test_a_decode_step_of_the_engine_is_counted(experts, capsys):
    """Layers of the release, which hold experts in 4 and in 8 bits."""
    flag = ["--quantize", "int4"] if experts == "int4" else ["--keep-fp8"]
    sizes = ["--batch", "1", "--context", "256", "--speculate", "1"]
    command = ["study", "--model", "step-3.5-flash", "--layers", "4", "--mesh", "data=1", *sizes, *flag]
    assert main([*command, "--target", "h200", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    compiled = found["compiled"]
    assert (found["layers"], found["target"], compiled["device_kind"]) == (4, "h200", "NVIDIA H200 141GB HBM3e")
    counts = "kernels graphs kernels_outside_graphs loops conditionals host_syncs widened_bytes bytes_read".split()
    assert all(isinstance(compiled[name], int) for name in counts)
    (of_experts,) = (each["kernels"] for each in compiled["layers"] if "layer_3" in each["names"])
    assert 4 * 10 < compiled["kernels"] + 41 * of_experts <= MOST_KERNELS  # of all 45 layers
    assert compiled["kernels_outside_graphs"] < compiled["kernels"]
    assert (compiled["loops"], compiled["host_syncs"], compiled["widened_bytes"]) == (0, 0, 0)
    names = [name for layers in compiled["layers"] for name in layers["names"]]
    assert names == ["layer_0", "layer_1", "layer_2", "layer_3", "mtp_1"]
    assert sum(max(1, len(each["names"])) * each["kernels"] for each in compiled["layers"]) == compiled["kernels"]
    routed = 2 * 8 * 3 * 4096 * 1280 * (0.5 + 2 / 64 if experts == "int4" else 1 + 4 / 128**2)
    (moe,) = (each["bytes_read"] for each in compiled["layers"] if "layer_3" in each["names"])
    others = 2 * (109_445_120 + 288 * 4096 + 3 * 4096 * 1280)  # attention, router, shared expert
    assert moe == pytest.approx(others + routed, rel=0.05)


def studied_apart(*options: str) -> dict[str, Any]:
    """With the flags that the command sets in a process that has not used jax."""
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    options = ("--model", "step-3.5-flash", "--context", "256", *options, "--target", "h200", "--json")
    command = [sys.executable, "-m", "stepjax", "study", *options]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True, text=True)
    return json.loads(ran.stdout)


@pytest.mark.aot
def test_a_decode_step_on_a_mesh_is_one_graph():
    """Exchanges are in the graph too."""
    found = studied_apart("--layers", "4", "--mesh", "expert=4", "--batch", "2", "--keep-fp8")
    assert len(found["xla_flags"]) == 2
    counts = [found["compiled"][name] for name in ("graphs", "kernels_outside_graphs", "loops", "host_syncs")]
    assert counts == [1, 0, 0, 0]


@pytest.mark.slow
@pytest.mark.aot
@pytest.mark.parametrize(
    ("mesh", "batch", "form"),
    [
        ("data=1", 1, "--quantize int4"),
        ("data=1", 1, "--quantize int4 --speculate 3"),
        ("data=1", 8, "--quantize int4"),
        ("data=1", 32, "--quantize int4"),
        ("expert=4", 32, "--keep-fp8"),
        ("expert=2,tensor=2", 32, "--keep-fp8"),
    ],
)
def test_a_decode_step_of_all_layers_is_one_graph_of_few_kernels(mesh, batch, form):
    compiled = studied_apart("--mesh", mesh, "--batch", str(batch), *form.split())["compiled"]
    names = ("graphs", "kernels_outside_graphs", "loops", "host_syncs", "widened_bytes")
    assert [compiled[name] for name in names] == [1, 0, 0, 0, 0]
    assert 45 * 10 < compiled["kernels"] <= MOST_KERNELS
    assert compiled["hlo_lines"] <= 0.3 * LINES_WITHOUT_KERNELS


def test_kernels_are_those_of_the_gpu_that_is_compiled_for():
    """Which this process need not have."""
    with compiling_for(devices.gpu_of("h200")):
        assert hopper_cores() == 132
    with compiling_for(devices.gpu_of("b200")):
        assert hopper_cores() == 0
    assert hopper_cores() == 0


# Places


def one(kind: Any, axes: str, scope: str, launches: int = 1) -> Collective:
    return Collective(kind, tuple(axes.split(",")), 2, ("bf16",), 8, launches, "exact", scope)


def test_collectives_are_counted_by_layer():
    found = [
        one("all-reduce", "tensor", "jit(f)/layer_0/mlp/dot_general", 2),
        one("all-reduce", "tensor", "jit(f)/jvp(layer_1)/dot_general"),
        one("all-reduce", "tensor", "jit(f)/transpose(jvp(layer_1))/dot_general"),
        one("all-gather", "data", "jit(f)/layer_10/gather"),
        one("all-gather", "data", "jit(f)/gather"),
        one("all-gather", "data", ""),
    ]
    assert by_place(found, ["layer_0", "layer_1", "layer_2", "layer_10"]) == (
        Places(("layer_0", "layer_1"), (Launches("all-reduce", ("tensor",), 2),)),
        Places(("layer_2",), ()),
        Places(("layer_10",), (Launches("all-gather", ("data",), 1),)),
        Places((), (Launches("all-gather", ("data",), 2),)),
    )


# The command


def study(*args: object) -> int:
    return main(["study", "--model", "step-tiny", *map(str, args)])


def test_json(capsys):
    assert study("--mesh", "expert=-1,tensor=2", "--devices", 8, "--batch", 3, "--context", 128, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["mesh"] == "expert=4,tensor=2"
    assert (found["devices"], found["batch"], found["tokens"], found["dtype"]) == (8, 3, 1, "bfloat16")
    assert set(found) == {
        *("model layers mesh devices strategy target step batch context tokens speculate".split()),
        *("keep_fp8 quantize dense_fp8 cache_fp8 dtype xla_flags".split()),
        *("parameters parameter_bytes cache_bytes optimizer_bytes held places notes compiled".split()),
    }
    assert sum(found["held"].values()) == found["parameter_bytes"] + found["cache_bytes"]
    assert {"experts", "attention", "cache_rows", "cache_rings"} < set(found["held"])
    assert found["parameters"]["total"] == sum(found["parameters"]["parts"].values())
    assert set(found["places"][0]) == {"names", "launches"}
    assert set(found["places"][0]["launches"][0]) == {"kind", "axes", "num_launches"}
    assert found["compiled"]["argument_bytes"] > found["parameter_bytes"] + found["cache_bytes"]
    assert any("key-value heads" in note for note in found["notes"])


def test_a_device_of_a_wide_mesh_holds_its_experts_and_its_sequences():
    def held(mesh: str, strategy: str) -> dict[str, int]:
        rules = ShardingRules(CONFIG, MeshSpec.parse(mesh), strategy)
        step = step_of(CONFIG, Workload("decode", batch=16, context=256), MeshLayout(rules.mesh.build(), rules))
        return held_bytes(step, CONFIG)

    whole, eighth, hybrid = held("data=1", "tensor"), held("expert=8", "wide"), held("expert=4,tensor=2", "wide")
    page = whole["cache_rows"] // (16 * 4 + 1)  # each shard has one more page, for padding
    whole["cache_rows"] = page * 8 * (2 * 4 + 1)
    for part, size in whole.items():
        shared = part in ("experts", "cache_rows", "cache_rings")
        assert eighth[part] == (size // 8 if shared else size), part
    assert hybrid["experts"] == eighth["experts"]
    assert hybrid["cache_rows"] == page * (4 * 4 + 1) // 2
    assert hybrid["attention"] < 0.6 * eighth["attention"]


def test_a_study_counts_copies_of_experts():
    rules = ShardingRules(CONFIG.with_slots(16), MeshSpec.parse("expert=8"), "wide")
    step = step_of(rules.config, Workload("decode", batch=16, context=256), MeshLayout(rules.mesh.build(), rules))
    held = held_bytes(step, rules.config)
    layers = len(CONFIG.moe_layers)
    assert held["experts"] == layers * 2 * 3 * D * F * 2  # two each, in bfloat16
    assert held["router"] == layers * (E * D * 2 + E * 4 + E * (2 + 16 - E) * 4)
    weights = placed(parameters(rules.config), MeshLayout(rules.mesh.build(), rules))
    assert {part: held[part] for part in ("experts", "router")} == {
        part: size for part, size in bytes_by_part(weights).items() if part in ("experts", "router")
    }


def test_what_a_wide_step_leaves_unsplit_is_noted():
    mesh = MeshSpec.parse("data=2,expert=4")
    layout = MeshLayout(mesh.build(), ShardingRules(CONFIG, mesh, "wide"))
    assert copies(layout, batch=16, context=256) == []
    assert copies(layout, batch=6, context=256) == [
        "6 sequences are not split over expert=4: 4 devices each hold a copy"
    ]
    assert copies(layout, batch=1, context=256) == [
        "1 sequences are not split over data=2,expert=4: 8 devices each hold a copy"
    ]


@pytest.mark.slow
def test_table(capsys):
    assert study("--mesh", "data=2,expert=2", "--batch", 3, "--context", 128, "--devices", 8) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "step-tiny: decode, 3 sequences × 1 token, 128 positions each" in out
    assert "In each of 5 layers: 2 × all-reduce over expert." in out
    assert "Note: 3 sequences are not split over data=2: 2 devices each hold a copy." in out
    assert "Note: the mesh uses 4 of 8 devices." in out


REFUSED = [
    (["--mesh", "expert=8", "--layers", 0], "layers: is 0, expected 1 to 5"),
    (["--mesh", "expert=8", "--layers", 6], "layers: is 6, expected 1 to 5"),
    (["--mesh", "expert=5"], "routed experts (8) cannot be split 5 ways"),
    (["--mesh", "experts=8"], "'experts' is not an axis"),
    ([], "mesh: give --mesh, as --mesh expert=8, or --devices N"),
    (["--mesh", "expert=-1"], "has an axis of size -1; give --devices N"),
    (["--mesh", "expert=8", "--devices", 4], "takes 8 devices, found 4; expert=4 would fit"),
    (["--mesh", "expert=8", "--devices", 0], "devices: 0, expected 1 to"),
    (["--mesh", "data=100000"], "devices: 100000, expected 1 to"),
    (["--mesh", "expert=16", "--strategy", "expert"], "routed experts (8) cannot be split 16 ways"),
    (["--mesh", "expert=8", "--batch", 0], "batch: is 0, expected 1 to"),
    (["--mesh", "expert=8", "--context", 10**9], "context: is 1000000000, expected 1 to"),
    (["--mesh", "expert=8", "--context", 64, "--chunk", 128, "--step", "prefill"], "chunk: is 128, expected 1 to 64"),
    (["--mesh", "expert=8", "--chunk", 0, "--step", "prefill"], "chunk: is 0, expected 1 to"),
    (["--mesh", "expert=8", "--chunk", 16], "chunk: is 16, but only --step prefill has chunks"),
    (["--mesh", "expert=8", "--speculate", 4], "speculate: is 4, expected 0 to 3"),
    (["--mesh", "expert=8", "--speculate", 1, "--step", "train"], "without MTP layers"),
    (["--mesh", "expert=8", "--keep-fp8", "--step", "train"], "keep-fp8: quantised weights have no gradient"),
    (["--mesh", "tensor=2", "--keep-fp8"], "would be cut inside an FP8 block of 128"),
    (["--mesh", "expert=8", "--model", "no/such-model-here"], "no/such-model-here"),
]


@pytest.mark.parametrize(("args", "message"), REFUSED, ids=[str(each[1])[:40] for each in REFUSED])
def test_what_cannot_be_studied_is_refused_with_its_reason(capsys, monkeypatch, args, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert study(*args) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.startswith("stepjax: error: ")


def test_a_missing_plugin_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setattr(devices, "has_cuda_plugin", lambda: False)
    assert study("--mesh", "expert=8", "--target", "h100") == 1
    assert "stepjax[aot]" in capsys.readouterr().err


# The whole model


@pytest.mark.slow
@pytest.mark.long
def test_the_whole_model_on_32_devices():
    """45 layers in a process of its own, which has the virtual devices and the memory to itself."""
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    del environment["JAX_COMPILATION_CACHE_DIR"]  # seconds and memory are those of compiling
    command = "study --model step-3.5-flash --mesh expert=8,tensor=4 --batch 32 --context 4096 --json".split()
    ran = subprocess.run(
        [sys.executable, "-m", "stepjax", *command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        check=True,
        text=True,
    )
    found = json.loads(ran.stdout)
    compiled = found["compiled"]
    assert found["parameters"]["total"] == 6_238_649_408
    pages = 32 * 4096 // 64 + 1
    assert found["cache_bytes"] == 2 * 128 * 2 * (12 * 64 * pages + 32 * 33 * (512 + 4))  # one kv head each
    of_slot = compiled["argument_bytes"] - found["parameter_bytes"] - found["cache_bytes"]
    assert of_slot == 32 * (45 + 3 * 4 + 4 * NUM_ENDS + 4 + 3 + 4 * (1 + MAX_DRAFTS) * 4028 + 128896 * 9)
    layers, outside = found["places"]
    group = ["expert", "tensor"]
    assert len(layers["names"]) == 45
    assert layers["launches"] == [{"kind": "all-reduce", "axes": group, "num_launches": 2}]
    assert outside["launches"] == [
        {"kind": "all-gather", "axes": group, "num_launches": 1},
        {"kind": "all-reduce", "axes": group, "num_launches": 1},
    ]
    assert compiled["host_peak_bytes"] < 2e9
    print(f"lowered in {compiled['lower_s']:.1f} s, compiled in {compiled['compile_s']:.1f} s")
