"""Pictures of a mesh: every device holds what jax would place on it, and what is drawn is that."""

from __future__ import annotations

import dataclasses
import json

import pytest
from tiny import small_config

from stepjax.cli import main
from stepjax.sharding.compiled.step_study import held_bytes
from stepjax.sharding.mesh import MeshSpec
from stepjax.sharding.mesh_layout import MeshLayout
from stepjax.sharding.planner.device_bytes import PAGE, parameters
from stepjax.sharding.planner.picture import Picture
from stepjax.sharding.rules import ShardingRules
from stepjax.train.planning.workload import Workload, picture_of, step_of

CONFIG = dataclasses.replace(
    small_config(), max_positions=2048, mtp_layers=()
)  # five layers, experts from the second on
NUM_KV = CONFIG.layers[0].num_kv_heads
LAYOUTS = [
    "data=1 expert_tensor",
    "expert=8 expert",
    "expert=8 expert_tensor",
    "expert=4,tensor=2 expert_tensor",
    "expert=2,tensor=2 tensor",
    "tensor=2 tensor",
    "data=2,expert=4 expert",
    "context=2,expert=2,tensor=2 expert_tensor",
    "data=4,tensor=2 fsdp",
    "data=2,context=2,expert=2 fsdp",
    "expert=8 wide",
    "expert=4,tensor=2 wide",
    "context=2,expert=2,tensor=2 wide",
    "data=2,expert=4 wide",
    "data=2,expert=4 wide_data",
    "data=4,tensor=2 wide_data",
]


def layout_on(text: str, workload: Workload) -> MeshLayout:
    """A layout over devices that are there."""
    mesh, strategy = text.split()
    rules = ShardingRules(CONFIG, MeshSpec.parse(mesh), strategy)
    layout = MeshLayout(rules.mesh.build(), rules)
    return layout.together() if workload.served else layout


def drawn(text: str, workload: Workload) -> Picture:
    mesh, strategy = text.split()
    return picture_of(CONFIG, workload, MeshSpec.parse(mesh), strategy=strategy)


@pytest.mark.parametrize("step", ["decode", "lora"])
@pytest.mark.parametrize("text", LAYOUTS)
def test_a_device_holds_what_jax_places_on_it(text, step):
    workload = Workload(step, batch=16, context=256)
    layout, picture = layout_on(text, workload), drawn(text, workload)
    placed = {
        "vocabulary": (0, (CONFIG.vocab_size, 8), layout.parameter("vocab", "embed")),
        "experts": (0, (CONFIG.num_experts, 8, 8), layout.parameter("expert", None, "embed")),
        "widths of an expert": (0, (CONFIG.expert_size, 8), layout.parameter("expert_mlp", "embed")),
        "widths": (0, (CONFIG.shared_size, 8), layout.parameter("mlp", "embed")),
        "inputs of matrices": (1, (8, CONFIG.hidden_size), layout.parameter(None, "embed")),
    }
    if step == "decode":
        pages = (8 * 16, PAGE, NUM_KV, 8)
        sharding = layout.sharding(pages, "pages", "rows", "kv_heads", "head")
        placed["positions of a page"] = 1, pages, sharding
        placed["key-value heads"] = 2, pages, sharding
        placed["sequences"] = 0, (16,), layout.sharding((16,), "batch")
    else:
        rows = layout.sharding((16, 256), "batch", "length")
        placed["rows"], placed["positions"] = (0, (16, 256), rows), (1, (16, 256), rows)
    compared = set()
    for name, (dimension, shape, sharding) in placed.items():
        slices = sharding.devices_indices_map(shape)
        for number, device in enumerate(layout.mesh.devices.flat):
            held = picture.held(number)
            if name in held:
                assert held[name] == range(*slices[device][dimension].indices(shape[dimension])), (name, number)
                compared.add(name)
    assert compared >= set(placed) - {"inputs of matrices"}


@pytest.mark.parametrize(
    "text", ["expert=4,tensor=2 expert_tensor", "expert=8 wide", "context=2,expert=2,tensor=2 wide"]
)
@pytest.mark.parametrize("batch", [16, 5])
def test_bytes_are_those_of_the_engines_step(text, batch):
    workload = Workload("decode", batch=batch, context=256)
    held, picture = held_bytes(step_of(CONFIG, workload, layout_on(text, workload)), CONFIG), drawn(text, workload)
    assert picture.cache_bytes == held.pop("cache_rows") + held.pop("cache_rings")
    assert {part: size for part, size in picture.weight_bytes.items() if size} == held


def test_sequences_that_do_not_divide_lie_evenly():
    picture = drawn("expert=8 wide", Workload("decode", batch=13, context=256))
    held = [picture.held(device)["sequences"] for device in range(8)]
    assert [number for numbers in held for number in numbers] == list(range(13))
    assert {len(numbers) for numbers in held} == {1, 2}
    assert not any("sequences" in note for note in picture.notes)


def test_a_shard_without_a_sequence_says_so(capsys):
    assert main(["study", "--model", "step-tiny", "--devices", "4", "--strategy", "wide", "--picture"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "█" in line]
    assert [row[3] for row in rows] == ["none", "none", "none", "0"]


def test_equal_devices_share_a_row(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert (
        main(["study", "--model", "step-tiny", "--mesh", "data=2,expert=4", "--strategy", "expert", "--picture"]) == 0
    )
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines() if "█" in line]
    assert [line[:10] for line in lines] == ["0, 4 all,0", "1, 5 all,1", "2, 6 all,2", "3, 7 all,3"]
    assert lines[1].endswith("··██···· 2–3")


def test_the_drawing_says_what_the_json_has(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    args = ["study", "--model", "step-tiny", "--mesh", "expert=4,tensor=2", "--strategy", "wide", "--batch", "16"]
    assert main([*args, "--picture", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["devices"][3]["place"] == {"data": 0, "context": 0, "expert": 1, "tensor": 1}
    assert record["devices"][3]["holds"]["sequences"] == [4, 7]
    assert record["devices"][3]["holds"]["experts"] == [3, 3]
    assert record["dimensions"]["experts"] == {"size": 8, "axes": ["expert", "tensor"]}
    assert main([*args, "--picture"]) == 0
    out = capsys.readouterr().out
    assert "3       1,1      ··██···· 4–7" in out
    assert "Each of the 8 devices holds" in out
    assert f"{1e-6 * sum(record['weight_bytes'].values()):.2f} MB of weights" in out


def test_a_picture_holds_every_weight_once_where_nothing_is_copied():
    picture = drawn("data=1 expert_tensor", Workload("decode", context=256))
    assert sum(picture.weight_bytes.values()) == sum(kind.num_elements * kind.itemsize for kind in parameters(CONFIG))


@pytest.mark.parametrize("args", [["--check"], ["--target", "h100"]])
def test_what_needs_a_compiler_is_refused_beside_a_picture(capsys, args):
    assert main(["study", "--model", "step-tiny", "--mesh", "expert=4", "--picture", *args]) == 1
    assert f"{args[0]}: is about a compiled step" in capsys.readouterr().err
