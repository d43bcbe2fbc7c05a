"""Plans: what is legal and why not, what wins, and that the runtime takes every mesh that is printed."""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tiny import small_config

import stepjax.train.planning.plan
from stepjax.cli import main
from stepjax.config import ModelConfig
from stepjax.errors import RequestError
from stepjax.sharding.exchange import Exchange
from stepjax.sharding.mesh import MeshSpec
from stepjax.sharding.planner.format_sizes import format_sizes
from stepjax.sharding.planner.hardware import DEVICES, parse
from stepjax.sharding.planner.options import Choice, Goal, Option, Plan, PlanRequest, Refusal
from stepjax.sharding.planner.search import BATCHES, by_batch, choices, rank_options, weigh, wide_meshes
from stepjax.sharding.planner.step_time import RoutingDistribution, exchange_time
from stepjax.sharding.rules import WIDE, ShardingRules
from stepjax.train.planning.plot import Dot, front
from stepjax.weights.expert_format import ExpertFormat
from stepjax.weights.formats import FORMATS
from stepjax.weights.plain import PLAIN

FLASH = ModelConfig.preset("step-3.5-flash")


@cache
def planned(hardware: str, goal: Goal, **given: Any) -> Plan:
    return rank_options(FLASH, parse(hardware), PlanRequest(goal, **given))


def refused(hardware: str, text: str, **given: Any) -> str:
    """Why a choice, written as mesh strategy experts [drafts], is refused; "" if it is not."""
    mesh, strategy, quant, *drafts = text.split()
    choice = Choice(MeshSpec.parse(mesh), strategy, FORMATS[quant], int(drafts[0]) if drafts else 0)
    found = weigh(FLASH, parse(hardware), PlanRequest(given.pop("goal", "latency"), **given), choice)
    return found.reason if isinstance(found, Refusal) else ""


# What is legal

FITS = "does not fit"
EXPERTS, HEADS, WIDTH = (
    "routed experts (288) cannot be split",
    "query heads (64 and 96) cannot be split",
    "would be cut",
)
BLOCK, INT4, INT8 = (
    "cut inside an FP8 block of 128",
    "cut inside an int4 group of 64",
    "cut inside an int8 group of 1280",
)
LEGAL = [
    ("8xH100", "expert=8 expert bf16", ""),
    ("8xH100", "expert=8 expert_tensor bf16 3", ""),
    ("8xH100", "tensor=8 tensor bf16", ""),
    ("8xH100", "expert=4,tensor=2 expert_tensor fp8", ""),
    ("8xH100", "context=2,expert=4 expert fp8", ""),
    ("8xH100", "expert=2,tensor=4 expert_tensor int4", ""),
    ("4xH100", "expert=4 expert fp8", ""),
    ("4xH100", "expert=2,tensor=2 expert_tensor fp8 1", ""),
    ("4xH100", "tensor=4 expert fp8", ""),
    ("4xH100", "expert=4 expert bf16", FITS),
    ("4xH100", "tensor=4 tensor bf16", FITS),
    ("4xH100", "expert=2,tensor=2 expert_tensor bf16", FITS),
    ("4xH100", "context=2,expert=2 expert bf16", FITS),
    ("4xH100", "tensor=4 tensor fp8", BLOCK),
    ("4xH100", "tensor=4 expert_tensor fp8", "expected 1 or 2 or 5 or 10 ways"),
    ("8xH100", "tensor=8 tensor fp8", BLOCK),
    ("8xH100", "expert=2,tensor=4 expert_tensor fp8", BLOCK),
    ("8xH100", "expert=4,tensor=2 tensor fp8", BLOCK),
    ("8xH100", "tensor=8 tensor int4", INT4),
    ("8xH100", "expert=8 tensor int4", INT4),
    ("8xH100", "tensor=2 tensor int8", INT8),
    ("8xH100", "expert=4,tensor=2 expert_tensor int8", INT8),
    ("8xH100", "expert=8 expert int8", ""),
    ("8xH100", "expert=5 expert bf16", EXPERTS),
    ("8xH100", "expert=7 expert_tensor bf16", "the nearest that can is 6"),
    ("64xH100", "expert=64 expert_tensor fp8", "the nearest that can is 72"),
    ("64xH100", "expert=32,tensor=2 expert fp8", EXPERTS),
    ("64xH100", "expert=20 expert bf16", EXPERTS),
    ("512xH100", "expert=512 expert fp8", EXPERTS),
    ("8xH100", "tensor=3 expert bf16", HEADS),
    ("8xH100", "tensor=5 tensor bf16", "the nearest that can is 4"),
    ("8xH100", "tensor=6 expert_tensor bf16", HEADS),
    ("8xH100", "tensor=7 tensor int4", HEADS),
    ("64xH100", "tensor=12 expert_tensor bf16", "the nearest that can is 8"),
    ("64xH100", "tensor=24 tensor bf16", HEADS),
    ("64xH100", "tensor=64 tensor bf16", "the nearest that can is 32"),
    ("64xH100", "tensor=48 tensor bf16", HEADS),
    ("64xH100", "expert=3,tensor=6 expert_tensor bf16", HEADS),
    ("8xH100", "expert=16 expert bf16", "takes 16 devices of 8"),
    ("4xH100", "expert=4,tensor=2 expert_tensor fp8", "takes 8 devices of 4"),
    ("1xH200", "data=1 expert_tensor int4", ""),
    ("1xH200", "data=1 expert_tensor fp8", FITS),
    ("1xH200", "data=1 expert_tensor bf16", "398.8 GB of weights"),
    ("1xDGX-Spark", "data=1 expert_tensor int4", FITS),
    ("4xH200", "tensor=4 tensor bf16", ""),
    ("2xB200", "expert=2 expert fp8", ""),
    ("2xB200", "expert=2 expert bf16", FITS),
    ("8xA100-40", "expert=8 expert fp8", ""),
    ("8xA100-40", "expert=8 expert bf16", FITS),
    ("8xA100-80", "expert=8 expert bf16", ""),
    ("8xH100", "expert=8 expert bf16 4", "the model has 3 MTP layers"),
    ("8xH100", "expert=8 experts bf16", "strategy: is 'experts'"),
]


@pytest.mark.parametrize(("hardware", "text", "reason"), LEGAL, ids=[f"{each[0]} {each[1]}" for each in LEGAL])
def test_what_is_refused_has_its_reason(hardware, text, reason):
    found = refused(hardware, text)
    assert (reason in found) if reason else not found, found


def test_the_list_is_long_enough():
    assert len(LEGAL) >= 50


def test_what_takes_too_much_memory_or_time():
    assert FITS in refused("8xH100", "expert=8 expert bf16", batch=64, context=262_144)
    assert not refused("8xH100", "expert=8 expert bf16", batch=1, context=262_144)
    assert "too slow" in refused("8xH100", "expert=8 expert bf16", tpot_s=1e-3)
    # A drafter's caches and tails are held too, and sixteen devices share key-value heads eight ways at most.
    assert FITS in refused("2 nodes of 8xH100", "expert=16 expert bf16", batch=1024, context=4096)
    assert not refused("2 nodes of 8xH100", "expert=8,tensor=2 expert_tensor bf16", batch=512, context=4096)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batch": 0}, "batch: is 0"),
        ({"context": 300_000}, "context: is 300000"),
        ({"chunk": 0}, "chunk: is 0"),
        ({"acceptance": 1.5}, "shares"),
        ({"tpot_s": -1.0}, "tpot"),
        ({"ttft_s": 0.0}, "ttft: is 0.0 ms, expected more than 0"),
        ({"ttft_s": float("nan")}, "ttft"),
        ({"goal": "lora", "ttft_s": 1.0}, "ttft: is a limit of serving"),
        ({"goal": "lora", "tpot_s": 1.0}, "tpot: is a limit of serving"),
    ],
)
def test_a_question_that_makes_no_sense(given, message):
    with pytest.raises(RequestError, match=message):
        planned("8xH100", **{"goal": "latency"} | given)


# What wins


def test_every_mesh_that_wins_is_taken_by_the_runtime():
    """Text and rules, as `load` and `study` read them."""
    found = [
        *planned("8xH100", "latency").options,
        *planned("2 nodes of 8xH100", "lora", batch=32, experts=(PLAIN, FORMATS["int4"])).options,
        *planned("6xH100", "cheapest", experts=(FORMATS["int8"], FORMATS["fp8"])).options,
    ]
    assert len(found) > 100
    for option in found:
        choice = option.choice
        spec = MeshSpec.parse(str(choice.mesh))
        assert spec == choice.mesh
        config = FLASH.with_slots(choice.slots) if choice.slots else FLASH
        ShardingRules(config, spec.resolve(choice.num_devices), choice.strategy, choice.experts)
        assert option.memory.total <= option.memory.usable


def test_options_are_ranked_and_each_is_another():
    found = planned("8xH100", "latency")
    times = [each.tpot_s for each in found.options]
    assert times == sorted(times)
    keys = [(each.choice, each.memory.total) for each in found.options]
    assert len(set(keys)) == len(keys)
    assert {each.choice.num_devices for each in found.options} <= {1, 2, 4, 8}
    assert {each.choice for each in found.options}.isdisjoint({each.choice for each in found.refusals})


def test_four_h100_need_eight_bits():
    found = planned("4xH100", "latency", experts=(PLAIN, FORMATS["fp8"]))
    assert {each.choice.experts.name for each in found.options} == {"fp8"}
    reasons = [
        each.reason for each in found.refusals if each.choice.num_devices == 4 and each.choice.experts.name == "bf16"
    ]
    assert reasons
    assert all(FITS in each for each in reasons)


@pytest.mark.slow
def test_goals_ask_for_different_things():
    quick = planned("8xH100", "latency", experts=(PLAIN,)).options[0]
    many = planned("8xH100", "throughput", experts=(PLAIN,), batch=256, tpot_s=0.03).options[0]
    assert quick.batch == 1 < many.batch
    assert many.tokens_per_s > 10 * quick.tokens_per_s
    assert many.tpot_s <= 0.03
    cheap = planned("8xH100", "cheapest", batch=8).options[0]
    assert cheap.choice.num_devices == 2  # 119 GB with int4 experts
    assert cheap.choice.experts.name == "int4"
    far = planned("1xH200", "context", batch=2, experts=(FORMATS["int4"],)).options[0]
    assert far.context % 64 == 0
    assert 100_000 < far.context < 262_144
    asked = f"data=1 expert_tensor int4 {far.choice.drafts}"
    assert not refused("1xH200", asked, batch=2, context=far.context)
    assert FITS in refused("1xH200", asked, batch=2, context=far.context + 64)


def test_training_holds_factors_moments_and_activations():
    found = planned("8xH100", "lora", batch=16, experts=(PLAIN,))
    best = found.options[0]
    assert best.memory.training > 0
    assert best.tokens_per_s == pytest.approx(best.batch * best.context / best.step.seconds)
    # Six operations per active parameter and token, as far as the devices' peak allows.
    assert best.tokens_per_s / 8 < 989.4e12 / (6 * 10.9e9)
    assert any("cannot be split 8 ways" in each.reason for each in planned("8xH100", "lora", batch=4).refusals)


def test_drafts_are_dear_for_few_and_cheap_for_many():
    def step(batch: int, drafts: int) -> float:
        choice = Choice(MeshSpec(expert=8), "expert_tensor", PLAIN, drafts)
        found = weigh(FLASH, parse("8xH100"), PlanRequest("latency", batch=batch), choice)
        assert isinstance(found, Option)
        return found.step.work_s

    assert step(1, 3) / step(1, 0) > 1.8
    assert step(64, 3) / step(64, 0) < 1.3


def test_hot_experts_cost_time():
    even = weigh(FLASH, parse("8xH100"), PlanRequest("latency", batch=2), Choice(MeshSpec(expert=8), "expert", PLAIN))
    skewed = RoutingDistribution(tuple(50.0 if each < 36 else 1.0 for each in range(288)))
    asked = PlanRequest("latency", batch=2, routing=skewed)
    hot = weigh(FLASH, parse("8xH100"), asked, Choice(MeshSpec(expert=8), "expert", PLAIN))
    assert isinstance(even, Option)
    assert isinstance(hot, Option)
    assert hot.step.parts["experts"] > 1.5 * even.step.parts["experts"]


def test_the_published_point_of_vllm():
    """4 H200, TP4, 16 bit, 2048 in and 1024 out, 10 at a time: 11.91 ms a token. Nothing was fitted to it."""
    request = PlanRequest("latency", batch=10, context=3072, filled=2560 / 3072)
    found = weigh(FLASH, parse("4xH200"), request, Choice(MeshSpec(tensor=4), "tensor", PLAIN))
    assert isinstance(found, Option)
    assert found.tpot_s == pytest.approx(11.91e-3, rel=0.35)


def test_there_are_enough_choices_to_be_worth_the_name():
    assert sum(1 for _ in choices(FLASH, parse("512xH100"), PlanRequest("lora"))) >= 3000
    meshes = {str(each.mesh) for each in choices(FLASH, parse("8xH100"), PlanRequest("latency"))}
    assert len(meshes) == 1 + 3 + 6 + 10
    small = small_config()
    assert rank_options(small, parse("2xH100"), PlanRequest("latency", context=128, experts=(PLAIN,))).options


# Experts


def experts_of(mesh: str, batch: int, experts: ExpertFormat, cluster: str = "4xH100") -> Option:
    request = PlanRequest("latency", batch=batch)
    found = weigh(FLASH, parse(cluster), request, Choice(MeshSpec.parse(mesh), "expert_tensor", experts))
    assert isinstance(found, Option)
    return found


def test_experts_that_are_gathered_are_bound_by_instructions_and_foreign_ones_count():
    """Of bf16 on an H100: 8.9 instructions a weight where its 2 bytes take as long as 20."""
    one, few = (experts_of("expert=8", batch, PLAIN, "8xH100").step for batch in (1, 4))
    weights = 3 * 4096 * 1280 * 42
    assert few.parts["experts"] >= 4 * 8 * weights * 8.9 / DEVICES["H100"].issue  # all assignments, on every rank
    assert one.parts["experts"] < few.parts["experts"]


def test_quantised_experts_are_read_as_they_are_stored():
    """Each that is touched once, and no foreign one: bytes decide, and instructions where bytes are few."""
    fp8, int4 = (experts_of("expert=4", 32, FORMATS[name]).step for name in ("fp8", "int4"))
    held = 3 * 4096 * 1280 * 42 * 288 / 4
    assert fp8.parts["experts"] < held * (1 + 4 / 128**2) / 3.35e12
    assert int4.parts["experts"] > 0.5 * fp8.parts["experts"]
    assert fp8.host_syncs == 0
    assert experts_of("tensor=8", 512, PLAIN, "8xH100").step.host_syncs == 42  # passes over a capacity


# Wide


def test_sequences_are_split_over_devices_where_there_are_many():
    request = PlanRequest("throughput", batch=4096, experts=(PLAIN,), drafts=(0,), strategies=("expert_tensor", *WIDE))
    found = rank_options(FLASH, parse("2 nodes of 8xH100"), request)
    best = found.options[0]
    assert best.choice.strategy in WIDE
    narrow = next(option for option in found.options if option.choice.strategy == "expert_tensor")
    assert best.tokens_per_s > narrow.tokens_per_s
    assert best.batch > narrow.batch


def test_every_shard_of_a_wide_engine_has_sequences():
    meshes = [*wide_meshes(8, most_shards=4)]
    assert {mesh.data * mesh.expert for mesh, _ in meshes} == {2, 4}
    assert {mesh.num_devices for mesh, _ in meshes} == {8}
    assert all((strategy == "wide") == (mesh.data == 1) for mesh, strategy in meshes)
    assert not [*wide_meshes(8, most_shards=1)]


def test_a_strategy_that_is_asked_for_is_the_only_one(capsys):
    small = ["plan", "--model", "step-tiny", "--hardware", "8xH100", "--context", "128", "--experts", "bf16"]
    assert main([*small, "--strategy", "wide", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {option["strategy"] for option in found["options"]} == {"wide"}
    assert found["batch"] == 1
    for args, message in (
        (["--strategy", "broad"], "strategy: 'broad' is not planned for the goal latency, expected some of expert_t"),
        (["--strategy", "wide", "--train"], "strategy: 'wide' is not planned for the goal lora"),
        (["--strategy", "wide", "--hardware", "1xH100"], "strategy: wide split nothing over 1xH100"),
    ):
        assert main([*small, *args]) == 1
        assert message in capsys.readouterr().err


# Hardware


def test_a_small_all_reduce_takes_as_long_as_was_measured():
    cluster, mesh = parse("8xH100"), MeshSpec(tensor=8)
    small, large, larger = (
        exchange_time(Exchange("all-reduce", ("tensor",), size, 1), mesh, cluster) for size in (8192, 32768, 2**20)
    )
    assert 32e-6 < small < large == pytest.approx(34e-6)
    assert larger == pytest.approx(34e-6 + 2 * 7 / 8 * (2**20 - 32768) / 450e9)
    assert exchange_time(Exchange("all-reduce", ("tensor",), 8, 1), mesh, cluster) == pytest.approx(32e-6)
    across = exchange_time(
        Exchange("all-reduce", ("tensor",), 8192, 1), MeshSpec(tensor=16), parse("2 nodes of 8xH100")
    )
    assert across > small


def test_the_command(capsys):
    small = ["plan", "--model", "step-tiny", "--hardware", "2xH100", "--context", "128", "--experts", "bf16,fp8"]
    assert main(small) == 0
    out = capsys.readouterr().out
    assert "datasheet roofline" in out
    assert "--mesh" in out
    assert main([*small, "--json", "--goal", "throughput", "--batch", "8"]) == 0
    found = json.loads(capsys.readouterr().out)
    best = found["options"][0]
    assert MeshSpec.parse(best["mesh"])
    assert found["times"].startswith("datasheet")
    assert best["device_bytes"]["total"] > 0
    assert found["why"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--hardware", "8xH900"], "is not known"),
        (["--hardware", "8xH100", "--experts", "fp4"], "'fp4'"),
        (["--hardware", "8xH100", "--calibrate", "nowhere.json"], "cannot be read"),
        (["--hardware", "8xH100", "--routing", "nowhere.json"], "cannot be read"),
        (["--hardware", "8xH100", "--batch", "0"], "batch: is 0"),
    ],
)
def test_the_command_says_what_is_wrong(capsys, args, message):
    assert main(["plan", "--model", "step-tiny", *args]) == 1
    assert message in capsys.readouterr().err


def test_nothing_that_works_is_an_answer_too(capsys):
    assert main(["plan", "--hardware", "1xH100", "--experts", "bf16"]) == 1
    assert "does not fit" in capsys.readouterr().out


# The picture


def test_the_front_has_no_point_that_another_beats():
    option: Any = None
    places = [(1, 1), (2, 3), (2, 2), (3, 3), (4, 5), (0.5, 0.5)]
    dots = [Dot(time, rate, option) for time, rate in places]
    assert [each[:2] for each in front(dots)] == [(0.5, 0.5), (1, 1), (2, 3), (4, 5)]


def test_a_batch_grows_until_memory_ends():
    choice = Choice(MeshSpec(expert=8), "expert_tensor", PLAIN)
    found = by_batch(FLASH, parse("8xH100"), PlanRequest("latency"), choice)
    assert [each.batch for each in found] == list(BATCHES[: len(found)])
    assert 4 < len(found) < len(BATCHES)
    assert FITS in refused("8xH100", "expert=8 expert_tensor bf16", batch=BATCHES[len(found)])
    assert by_batch(FLASH, parse("8xH100"), PlanRequest("latency"), choice._replace(mesh=MeshSpec(expert=5))) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "asked", ["--goal throughput --batch 8 --tpot-ms 20", "--goal context", "--goal lora --batch 4"]
)
def test_a_picture_is_drawn(capsys, tmp_path: Path, asked):
    pytest.importorskip("matplotlib")
    path = tmp_path / "plan.png"
    small = ["plan", "--model", "step-tiny", "--hardware", "2xH100", "--context", "128", "--experts", "bf16,fp8"]
    assert main([*small, *asked.split(), "--plot", str(path)]) == 0
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(path.read_bytes()[at : at + 4], "big") for at in (16, 20))
    assert (width, height) == (1350, 825)
    capsys.readouterr()
    assert main([*small, "--plot", str(tmp_path / "nowhere" / "plan.png")]) == 1
    assert "cannot be written" in capsys.readouterr().err


def test_a_picture_needs_an_extra(capsys, monkeypatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    small = ["plan", "--model", "step-tiny", "--hardware", "2xH100", "--context", "128", "--experts", "bf16"]
    assert main([*small, "--plot", str(tmp_path / "plan.png")]) == 1
    assert "install stepjax[plots]" in capsys.readouterr().err


def test_a_plan_from_python_is_that_of_the_command(capsys):
    found = stepjax.train.planning.plan.plan("step-3.5-flash", hardware="8xH100", experts=("bf16", "fp8"))
    assert main(["plan", "--hardware", "8xH100", "--experts", "bf16,fp8", "--json"]) == 0
    first = json.loads(capsys.readouterr().out)["options"][0]
    best = found.options[0]
    assert (str(best.choice.mesh), best.choice.experts.name, best.choice.drafts) == (
        first["mesh"],
        first["experts"],
        first["drafts"],
    )
    with pytest.raises(RequestError, match="batch: is 0"):
        stepjax.train.planning.plan.plan(FLASH, hardware="8xH100", batch=0)


def test_every_format_has_its_bytes_and_seconds_to_load():
    """By hand for int4: the release's bytes over the speed of one node's disks, from BF16 where it is made of that."""
    sizes = {size.name: size for size in format_sizes(FLASH, parse("8xH100"), storage=7e9)}
    assert list(sizes)[:7] == ["bf16", "fp8", "int8", "int4 in 64s", "int4 in 32s", "nvfp4", "mxfp4"]
    assert sizes["q4_k in a GGUF file"].num_bytes == sizes["int4 in 32s"].num_bytes == 125_279_034_624
    int4 = sizes["int4 in 64s"]
    assert (int4.num_bytes, int4.device_bytes) == (119_333_608_704, 119_333_608_704 // 8)
    assert int4.load_s == pytest.approx(119_333_608_704 / 7e9)
    assert int4.quantised_load_s == sizes["bf16"].load_s == pytest.approx(398_768_626_944 / 7e9)
    assert sizes["fp8"].quantised_load_s is None
    two = {size.name: size for size in format_sizes(FLASH, parse("2 nodes of 8xH100"), storage=7e9)}
    assert two["bf16"].load_s == pytest.approx(sizes["bf16"].load_s / 2)  # each node reads its half
    small = {size.name for size in format_sizes(small_config(), parse("1xH100"), storage=7e9)}
    assert "q8_0 in a GGUF file" in small
    assert "q4_k in a GGUF file" not in small  # rows of 64 are no multiple of 256
