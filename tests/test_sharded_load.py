"""Loading onto meshes: the weights of the single-device loader, read slice by slice and each slice once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import fp8_hub_config, fp8_tensors, random_tensors, small_hub_config, speaking_folder, write_folder

from stepjax.checkpoint.reader import Checkpoint, load_params
from stepjax.errors import RequestError
from stepjax.infer.load import load
from stepjax.infer.session import Session
from stepjax.model.step3p5 import abstract, axes_of
from stepjax.sharding import sharded_load as loading
from stepjax.sharding.mesh import MeshSpec
from stepjax.sharding.mesh_layout import MeshLayout
from stepjax.sharding.rules import ShardingRules
from stepjax.sharding.sharded_load import load_sharded
from stepjax.weights.expert_format import ExpertFormat
from stepjax.weights.plain import PLAIN
from stepjax.weights.quantised import Quantised

MESHES = [
    ("expert=8", "expert"),
    ("expert=4,tensor=2", "expert_tensor"),
    ("data=2,context=2,tensor=2", "tensor"),
    ("data=2,expert=2", "fsdp"),
    ("tensor=2", "tensor"),
]


@pytest.fixture(scope="module")
def bf16(tmp_path_factory) -> Path:
    hub = small_hub_config()
    return write_folder(tmp_path_factory.mktemp("bf16"), hub, random_tensors(hub))


@pytest.fixture(scope="module")
def fp8(tmp_path_factory) -> Path:
    hub = small_hub_config(quantization_config=fp8_hub_config()["quantization_config"])
    return write_folder(tmp_path_factory.mktemp("fp8"), hub, fp8_tensors(random_tensors(hub)))


def placement(checkpoint: Checkpoint, mesh: str, strategy: str, *, experts: ExpertFormat = PLAIN) -> dict[str, Any]:
    spec = MeshSpec.parse(mesh)
    where = MeshLayout(spec.build(), ShardingRules(checkpoint.config, spec, strategy, experts))
    return {path: where.parameter(*axes) for path, axes in axes_of(abstract(checkpoint.config, layout=where)).items()}


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        assert type(found[path]) is type(value)
        for a, b in zip(jax.tree.leaves(found[path]), jax.tree.leaves(value), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=path)


@pytest.mark.parametrize(("mesh", "strategy"), MESHES)
def test_weights_are_those_of_the_single_device_loader(bf16, mesh, strategy):
    checkpoint = Checkpoint(bf16)
    shardings = placement(checkpoint, mesh, strategy)
    found, report = load_sharded(checkpoint, shardings, jnp.bfloat16)
    same(found, load_params(checkpoint, jnp.bfloat16))
    assert all(leaf.sharding == shardings[path] for path, leaf in found.items() if isinstance(leaf, jax.Array))
    assert report.bytes_read == checkpoint.num_bytes  # one process holds all of it, whatever the copies
    leaves = jax.tree.leaves(found)
    assert report.placed_bytes == sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards)


@pytest.mark.parametrize("keep_fp8", [False, True])
@pytest.mark.parametrize("mesh", ["expert=8", "data=2,expert=4"])
def test_fp8_weights_too(fp8, mesh, keep_fp8):
    checkpoint = Checkpoint(fp8)
    experts = checkpoint.experts if keep_fp8 else PLAIN
    shardings = placement(checkpoint, mesh, "expert", experts=experts)
    found, report = load_sharded(checkpoint, shardings, jnp.float32, experts=experts)
    same(found, load_params(checkpoint, jnp.float32, experts=experts))
    gate = found["layers.3.moe.experts.gate"]
    assert isinstance(gate, Quantised) == keep_fp8
    assert {shard.data.shape[0] for leaf in jax.tree.leaves(gate) for shard in leaf.addressable_shards} <= {1, 2}
    assert report.bytes_read == checkpoint.num_bytes


def test_a_slice_that_cuts_blocks_counts_and_widens_the_blocks_that_it_touches(fp8):
    """Down has 32 columns in one block: each half is widened from all of it."""
    checkpoint = Checkpoint(fp8)
    found, report = load_sharded(checkpoint, placement(checkpoint, "tensor=2", "tensor"), jnp.float32)
    same(found, load_params(checkpoint, jnp.float32))
    down = [path for path in checkpoint.paths if path.endswith("experts.down")]
    assert report.bytes_read == checkpoint.num_bytes + sum(map(checkpoint.stored_bytes, down))


def test_copies_share_one_read(bf16, monkeypatch):
    read: list[tuple[str, tuple[slice, ...]]] = []
    real = Checkpoint.read

    def spy(self: Checkpoint, path: str, **options: Any) -> Any:
        read.append((path, options["index"]))
        return real(self, path, **options)

    monkeypatch.setattr(Checkpoint, "read", spy)
    checkpoint = Checkpoint(bf16)
    load_sharded(checkpoint, placement(checkpoint, "data=4,expert=2", "expert"), jnp.bfloat16)
    assert len(read) == len(set(map(str, read)))
    by_path = [path for path, _ in read]
    assert by_path.count("layers.3.moe.experts.gate") == 2
    assert by_path.count("layers.3.moe.router.weight") == 1


def test_progress_ends_at_the_total(bf16, monkeypatch):
    monkeypatch.setattr(loading, "AHEAD", -1)  # nothing is read ahead, and nothing waits for ever
    checkpoint, seen = Checkpoint(bf16), []
    load_sharded(
        checkpoint, placement(checkpoint, "expert=8", "expert"), jnp.bfloat16, progress=lambda *each: seen.append(each)
    )
    assert seen[-1] == (checkpoint.num_bytes, checkpoint.num_bytes)
    assert seen == sorted(seen)


def test_loaded_arrays_do_not_change_with_the_file(tmp_path):
    hub = small_hub_config()
    folder = write_folder(tmp_path / "model", hub, random_tensors(hub), num_shards=1)
    checkpoint = Checkpoint(folder)
    found, _ = load_sharded(checkpoint, placement(checkpoint, "expert=8", "expert"), jnp.bfloat16)
    before = {path: np.array(value) for path, value in found.items()}
    file = folder / "model.safetensors"
    with file.open("r+b") as stream:
        stream.seek(-file.stat().st_size // 2, 2)
        stream.write(b"\1" * (file.stat().st_size // 2))
    same(found, {path: jnp.asarray(value) for path, value in before.items()})


def test_a_failing_read_ends_the_load(bf16, monkeypatch):
    checkpoint = Checkpoint(bf16)
    shardings = placement(checkpoint, "expert=8", "expert")

    def failing(self: Checkpoint, path: str, **options: Any) -> Any:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Checkpoint, "read", failing)
    with pytest.raises(OSError, match="Input/output"):
        load_sharded(checkpoint, shardings, jnp.bfloat16)


@pytest.mark.parametrize("folder", ["bf16", "fp8"])
def test_relabelled_experts_answer_alike(folder, request):
    checkpoint = Checkpoint(request.getfixturevalue(folder))
    experts = checkpoint.experts
    order = {
        layer.index: np.random.default_rng(layer.index).permutation(8).tolist() for layer in checkpoint.config.layers
    }
    shardings = placement(checkpoint, "expert=4", "expert", experts=experts)
    plain, _ = load_sharded(checkpoint, shardings, jnp.float32, experts=experts)
    moved, report = load_sharded(checkpoint, shardings, jnp.float32, experts=experts, expert_order=order)
    assert report.bytes_read == checkpoint.num_bytes
    for part in ("experts.gate", "experts.down", "router.weight", "router.bias"):
        for a, b in zip(*(jax.tree.leaves(each[f"layers.4.moe.{part}"]) for each in (moved, plain)), strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b)[order[4]])
    before, after = (
        Session(checkpoint.config, jax.device_put(params, jax.devices()[0]), dtype=jnp.float32).logits(range(9))
        for params in (plain, moved)
    )
    np.testing.assert_allclose(before, after, atol=1e-4)


def test_an_order_of_experts_needs_a_mesh(tmp_path):
    folder, order = speaking_folder(tmp_path / "model"), {2: [7, 6, 5, 4, 3, 2, 1, 0]}
    with pytest.raises(RequestError, match="together with a mesh"):
        load(folder, expert_order=order)
    plain, moved = (load(folder, dtype="float32", mesh="expert=2", expert_order=each) for each in (None, order))
    np.testing.assert_allclose(plain.logits([1, 2, 3]), moved.logits([1, 2, 3]), atol=1e-4)


@pytest.mark.slow
def test_a_session_on_a_mesh(tmp_path):
    folder = speaking_folder(tmp_path / "model")
    alone, there = load(folder, dtype="float32"), load(folder, dtype="float32", mesh="expert=4,tensor=2")
    assert alone.load_report is None
    assert there.load_report is not None
    assert there.load_report.num_weights == len(there.params)
    for a, b in zip(alone.score(range(40)), there.score(range(40)), strict=True):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-4), a, b)
