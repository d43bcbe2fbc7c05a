"""Reading checkpoint folders: every tensor, in every layout that is accepted, equals what was written."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import (
    BF16,
    FP8,
    fp8_hub_config,
    fp8_tensors,
    random_tensors,
    renamed,
    tiny_hub_config,
    without_mtp,
    write_folder,
)

from stepjax.checkpoint.reader import Checkpoint, load_params
from stepjax.config import ModelConfig
from stepjax.errors import CheckpointError
from stepjax.weights.fp8 import Fp8Blocks
from stepjax.weights.inventory import inventory
from stepjax.weights.plain import PLAIN
from stepjax.weights.quantised import Quantised, dequantize

HUB = tiny_hub_config()
TENSORS = random_tensors(HUB)
NAMES = {spec.path: spec.hub_name for spec in inventory(ModelConfig.from_hf(HUB))}
EXPERTS = "layers.5.moe.experts.up"


def expected(path, tensors=None):
    return (tensors or TENSORS)[NAMES[path]]


def widened(q, scale, block):
    """Dequantised by indexing, one scale per element."""
    rows, columns = (np.arange(size) // each for size, each in zip(q.shape[-2:], block, strict=True))
    return q.astype(np.float32) * scale[..., rows[:, None], columns[None, :]]


@pytest.mark.parametrize(("num_shards", "index"), [(1, False), (3, True), (3, False)], ids=["single", "index", "loose"])
def test_every_tensor_equals_what_was_written(tmp_path, num_shards, index):
    checkpoint = Checkpoint(write_folder(tmp_path, HUB, TENSORS, num_shards=num_shards, index=index))
    assert set(checkpoint.paths) == set(NAMES)
    assert (checkpoint.has_mtp, checkpoint.experts, checkpoint.notes) == (True, PLAIN, ())
    assert checkpoint.config == ModelConfig.from_hf(HUB)
    assert checkpoint.num_bytes == sum(value.nbytes for value in TENSORS.values())
    for path in checkpoint.paths:
        found = checkpoint.read(path, dtype=BF16)
        assert isinstance(found, np.ndarray)
        assert found.dtype == (np.float32 if path.endswith("router.bias") else BF16)
        assert found.shape == checkpoint.shape(path)
        assert found.tobytes() == expected(path).tobytes(), path


def test_a_weight_in_its_own_dtype_is_a_view_and_read_only(tmp_path):
    checkpoint = Checkpoint(write_folder(tmp_path, HUB, TENSORS))
    found = checkpoint.read("embed.weight", dtype=BF16)
    assert isinstance(found, np.ndarray)
    assert not found.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        found[0] = 0


def test_part_of_a_weight(tmp_path):
    checkpoint = Checkpoint(write_folder(tmp_path, HUB, TENSORS))
    index = (slice(2, 5), slice(None), slice(-20, None))
    assert np.array_equal(checkpoint.read(EXPERTS, dtype=BF16, index=index), expected(EXPERTS)[index])


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16], ids=str)
def test_floats_of_any_width_are_accepted(tmp_path, dtype):
    """As is the router's bias, which stays float32 in memory."""
    stored = {name: value.astype(dtype) for name, value in TENSORS.items()}
    checkpoint = Checkpoint(write_folder(tmp_path, HUB, stored))
    for path in ("norm.weight", "layers.5.moe.router.bias", EXPERTS):
        wanted = np.float32 if path.endswith("bias") else BF16
        found = checkpoint.read(path, dtype=BF16)
        assert found.dtype == wanted
        assert np.array_equal(found, expected(path, stored).astype(wanted))


@pytest.mark.parametrize("block", [(16, 32), (24, 20), (128, 128)], ids=str)
def test_fp8_is_widened_or_kept(tmp_path, block):
    hub, tensors = fp8_hub_config(block), fp8_tensors(TENSORS, block)
    checkpoint = Checkpoint(write_folder(tmp_path, hub, tensors))
    assert (checkpoint.experts, checkpoint.config.fp8_block) == (Fp8Blocks(block), block)
    for path in checkpoint.paths:
        assert checkpoint.format(path).quantised == (".experts." in path)
        if not checkpoint.format(path).quantised:
            assert checkpoint.read(path, dtype=np.float32).tobytes() == expected(path).astype(np.float32).tobytes()
            continue
        q, scale = expected(path, tensors), tensors[f"{NAMES[path]}_scale_inv"]
        kept = checkpoint.read_kept(path, dtype=BF16)
        assert isinstance(kept, Quantised)
        assert (kept.q.dtype, kept.q.tobytes(), kept.format) == (FP8, q.tobytes(), Fp8Blocks(block))
        assert kept.scale.tobytes() == scale.tobytes()
        assert np.array_equal(checkpoint.read(path, dtype=np.float32), widened(q, scale, block))
        assert np.array_equal(checkpoint.read(path, dtype=BF16), widened(q, scale, block).astype(BF16))


def test_part_of_an_fp8_weight(tmp_path):
    block = (24, 20)
    tensors = fp8_tensors(TENSORS, block)
    checkpoint = Checkpoint(write_folder(tmp_path, fp8_hub_config(block), tensors))
    whole = checkpoint.read(EXPERTS, dtype=np.float32)
    assert isinstance(whole, np.ndarray)
    random = np.random.default_rng(0)
    for _ in range(50):
        index = tuple(slice(*sorted(random.choice(size + 1, 2, replace=False).tolist())) for size in whole.shape)
        assert np.array_equal(checkpoint.read(EXPERTS, dtype=np.float32, index=index), whole[index])
    kept = checkpoint.read_kept(EXPERTS, dtype=BF16, index=(slice(1, 3), slice(24, None), slice(20, 60)))
    assert isinstance(kept, Quantised)
    assert kept.q.tobytes() == expected(EXPERTS, tensors)[1:3, 24:, 20:60].tobytes()
    assert kept.scale.tobytes() == tensors[f"{NAMES[EXPERTS]}_scale_inv"][1:3, 1:, 1:3].tobytes()


def test_the_tensors_decide_what_is_fp8(tmp_path):
    """One layer's experts are BF16, and an attention projection is FP8: neither is what the release does."""
    tensors = fp8_tensors(TENSORS)
    for name in [name for name in tensors if name.startswith("model.layers.4.moe.")]:
        del tensors[name]
    tensors |= {name: value for name, value in TENSORS.items() if name.startswith("model.layers.4.moe.")}
    name = "model.layers.1.self_attn.q_proj.weight"
    part = fp8_tensors({name.replace("self_attn", "moe"): TENSORS[name]})
    tensors |= renamed(part, [(".moe.", ".self_attn.")])
    checkpoint = Checkpoint(write_folder(tmp_path, fp8_hub_config(), tensors))
    assert [checkpoint.format(f"layers.{i}.moe.experts.gate").quantised for i in (3, 4, 5)] == [True, False, True]
    assert checkpoint.format("layers.1.attn.q_proj.weight").quantised
    found = checkpoint.read("layers.1.attn.q_proj.weight", dtype=np.float32)
    assert np.array_equal(found, widened(tensors[name], tensors[f"{name}_scale_inv"], (16, 32)))


def test_blocks_of_128_need_no_quantization_config(tmp_path):
    checkpoint = Checkpoint(write_folder(tmp_path, HUB, fp8_tensors(TENSORS, (128, 128))))
    assert checkpoint.config.fp8_block == (128, 128)
    assert "quantization_config" in checkpoint.notes[0]


def test_a_quantization_config_without_fp8_tensors_is_noted(tmp_path):
    checkpoint = Checkpoint(write_folder(tmp_path, fp8_hub_config(), TENSORS))
    assert (checkpoint.experts, checkpoint.config.fp8_block) == (PLAIN, None)
    assert "no weight has FP8 scales" in checkpoint.notes[0]


def test_without_mtp_tensors_the_model_loads_without_mtp_and_says_so(tmp_path):
    checkpoint = Checkpoint(write_folder(tmp_path, HUB, without_mtp(TENSORS, HUB)))
    assert not checkpoint.has_mtp
    assert "none of its 51 MTP tensors" in checkpoint.notes[0]
    assert set(checkpoint.paths) == {path for path in NAMES if not path.startswith("mtp.")}


def fused(tensors):
    """transformers' names, gate and up concatenated on the out axis."""
    out = {}
    for name, value in tensors.items():
        if ".moe.gate_proj.weight" in name:
            up = tensors[name.replace("gate_proj", "up_proj")]
            new = name.replace(".moe.gate_proj.weight", ".mlp.experts.gate_up_proj")
            out[new] = np.concatenate([value, up], axis=1)
        elif ".moe.up_proj.weight" not in name:
            out[name] = value
    changes = [
        (".moe.gate.weight", ".mlp.gate.weight"),
        (".moe.router_bias", ".mlp.gate.e_score_correction_bias"),
        (".moe.down_proj.weight", ".mlp.experts.down_proj"),
        (".share_expert.", ".mlp.shared_experts."),
        ("model.", "model.language_model."),
    ]
    return renamed(out, changes)


def split(tensors):
    """One tensor per expert, scales too."""
    out = {}
    for name, value in tensors.items():
        if ".moe." in name and "_proj.weight" in name:
            for expert, part in enumerate(value):
                out[name.replace(".moe.", f".moe.experts.{expert}.")] = part
        else:
            out[name] = value
    return out


@pytest.mark.parametrize("spell", [fused, split])
def test_other_tools_spellings_load_as_the_release(tmp_path, spell):
    checkpoint = Checkpoint(write_folder(tmp_path, HUB, spell(TENSORS)))
    assert checkpoint.num_bytes == sum(value.nbytes for value in TENSORS.values())
    index = (slice(1, 7), slice(3, 30), slice(5, None))
    for path in checkpoint.paths:
        assert checkpoint.read(path, dtype=BF16).tobytes() == expected(path).tobytes(), path
    assert np.array_equal(checkpoint.read(EXPERTS, dtype=BF16, index=index), expected(EXPERTS)[index])


def fused_fp8(tensors):
    out = fused({name: value for name, value in tensors.items() if not name.endswith("_scale_inv")})
    scales = fused({name.removesuffix("_scale_inv"): value for name, value in tensors.items() if "_scale_inv" in name})
    return out | {f"{name}_scale_inv": value for name, value in scales.items()}


@pytest.mark.parametrize("spell", [fused_fp8, split])
def test_other_tools_fp8_spellings_load_as_the_release(tmp_path, spell):
    tensors = fp8_tensors(TENSORS)
    checkpoint = Checkpoint(write_folder(tmp_path, fp8_hub_config(), spell(tensors)))
    for path in (EXPERTS, EXPERTS.replace("up", "gate"), EXPERTS.replace("up", "down")):
        found = checkpoint.read_kept(path, dtype=BF16)
        assert isinstance(found, Quantised)
        assert found.q.tobytes() == expected(path, tensors).tobytes()
        assert found.scale.tobytes() == tensors[f"{NAMES[path]}_scale_inv"].tobytes()


@pytest.mark.parametrize("keep_fp8", [False, True])
def test_load_params_gives_jax_arrays_of_the_dtype(tmp_path, keep_fp8):
    checkpoint = Checkpoint(write_folder(tmp_path, fp8_hub_config(), fp8_tensors(TENSORS)))
    calls = []
    experts = checkpoint.experts if keep_fp8 else None
    params = load_params(
        checkpoint, jnp.float32, experts=experts, progress=lambda done, total: calls.append((done, total))
    )
    assert list(params) == list(checkpoint.paths)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))
    assert params["layers.3.moe.router.bias"].dtype == jnp.float32
    assert isinstance(params[EXPERTS], Quantised) == keep_fp8
    for path, value in params.items():
        wide = dequantize(value, jnp.float32)
        assert np.array_equal(wide, checkpoint.read(path, dtype=np.float32)), path
    assert calls[-1] == (checkpoint.num_bytes, checkpoint.num_bytes)
    assert calls == sorted(calls)


def test_loaded_arrays_do_not_change_with_the_file(tmp_path):
    """XLA:CPU adopts aligned host memory; here the data begin at a multiple of 64 bytes, so it would."""
    folder = write_folder(tmp_path, HUB, TENSORS, num_shards=1)
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length] + b" " * (-(8 + length) % 64)
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    params = load_params(Checkpoint(folder), jnp.bfloat16)
    with path.open("r+b") as file:
        file.seek(8 + len(header))
        file.write(bytes(len(content) - 8 - length))
    for path, value in params.items():
        assert np.asarray(value).tobytes() == expected(path).tobytes()


def test_a_file_that_shrinks_after_opening_is_an_error_and_no_crash(tmp_path):
    folder = write_folder(tmp_path, HUB, TENSORS, num_shards=1)
    checkpoint = Checkpoint(folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(CheckpointError, match="changed its size"):
        checkpoint.read("embed.weight", dtype=BF16)


def test_an_unknown_path_is_named(tmp_path):
    checkpoint = Checkpoint(write_folder(tmp_path, HUB, TENSORS))
    with pytest.raises(CheckpointError, match=r"no weight layers\.99"):
        checkpoint.read("layers.99.input_norm.weight", dtype=BF16)


def test_links_of_the_hub_s_cache_are_followed(tmp_path):
    """snapshots/<revision>/file → ../../blobs/<hash>."""
    real = write_folder(tmp_path / "real", HUB, TENSORS)
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123abcd"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, file in enumerate(sorted(real.iterdir())):
        file.rename(blobs / str(i))
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    assert Checkpoint(snapshot).read("norm.weight", dtype=BF16).tobytes() == expected("norm.weight").tobytes()


def test_odd_but_harmless_files_are_left_alone(tmp_path):
    folder = write_folder(tmp_path, HUB, TENSORS)
    (folder / "other.safetensors").write_bytes(b"not read")
    (folder / "training_args.bin").write_bytes(b"not read")
    (folder / "modeling_step3p5.py").write_text("raise SystemExit('imported')")
    assert "other.safetensors" in Checkpoint(folder).notes[0]


def test_opening_imports_neither_jax_nor_remote_code(tmp_path):
    """R38: remote code is data. And a broken folder is refused before jax has even started."""
    folder = write_folder(tmp_path, HUB | {"auto_map": {"AutoModel": "modeling_step3p5.Model"}}, TENSORS)
    (folder / "modeling_step3p5.py").write_text("raise SystemExit('imported')")
    script = (
        "import sys; sys.addaudithook(lambda event, args: event in ('exec', 'open')"
        " and 'modeling_step3p5' in str(args[0]) and sys.exit('touched remote code'));"
        "from stepjax.checkpoint.reader import Checkpoint;"
        "Checkpoint(sys.argv[1]).read('norm.weight', dtype='float32');"
        "assert not {'jax', 'torch', 'flax', 'modeling_step3p5'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script, str(folder)], check=True, timeout=60)
