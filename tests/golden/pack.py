"""Small weights that other tools quantised: tests/golden/packed.npz. Run it with compressed-tensors 0.20 and torch.

For each case and each of two matrices the file holds the tensors of a module by their role, and ``wide``, what the
tool's own decompressor makes of them in float32. AWQ and GPTQ are packed here as AutoAWQ's and GPTQModel's packers
do it, and ModelOpt's spelling of NVFP4 is made of compressed-tensors'.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams

SHAPES = {"gate": (32, 64), "down": (64, 32)}  # of an expert of the tests' smallest model
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # output that nibble k of a word holds
INT = {"type": "int"}
FLOAT = {"type": "float", "symmetric": True}
GROUP = {"strategy": "group", "group_size": 32}
FP8 = {**FLOAT, "num_bits": 8}
CASES = {
    "int4": ("pack-quantized", {**INT, **GROUP, "num_bits": 4, "symmetric": True}, torch.bfloat16),
    "int4-zeros": ("pack-quantized", {**INT, **GROUP, "num_bits": 4, "symmetric": False}, torch.float32),
    "int4-channel": ("pack-quantized", {**INT, "num_bits": 4, "symmetric": True, "strategy": "channel"}, torch.float16),
    "int8-zeros": ("pack-quantized", {**INT, **GROUP, "num_bits": 8, "symmetric": False}, torch.bfloat16),
    "int3": ("pack-quantized", {**INT, **GROUP, "num_bits": 3, "symmetric": True}, torch.float32),
    "nvfp4": (
        "nvfp4-pack-quantized",
        {**FLOAT, "num_bits": 4, "strategy": "tensor_group", "group_size": 16, "scale_dtype": torch.float8_e4m3fn},
        torch.float32,
    ),
    "mxfp4": ("mxfp4-pack-quantized", {**FLOAT, **GROUP, "num_bits": 4, "scale_dtype": torch.uint8}, torch.float32),
    "fp8-tensor": ("float-quantized", {**FP8, "strategy": "tensor"}, torch.float32),
    "fp8-channel": ("float-quantized", {**FP8, "strategy": "channel"}, torch.bfloat16),
    "fp8-block": ("float-quantized", {**FP8, "strategy": "block", "block_structure": [16, 48]}, torch.float32),
    "int8-plain": ("int-quantized", {**INT, "num_bits": 8, "symmetric": True, "strategy": "channel"}, torch.bfloat16),
}


def compressed(name: str, w: torch.Tensor, given: dict, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Tensors of a module and their values, by compressed-tensors' own functions."""
    args = QuantizationArgs(**given)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    w = w.to(dtype)
    low, high = _extremes(w.float(), args)
    state = {"weight": w}
    whole = None
    if name == "nvfp4-pack-quantized":
        whole = state["weight_global_scale"] = (448.0 * 6.0 / w.float().abs().amax()).reshape(1)
    scale, zero = calculate_qparams(low, high, args, global_scale=whole)
    state["weight_scale"] = scale.to(dtype) if args.scale_dtype is None else scale
    if name in ("pack-quantized", "int-quantized"):
        state["weight_zero_point"] = zero
    tool = BaseCompressor.get_value_from_registry(name)
    stored = tool.compress(state, scheme)
    wide = tool.decompress({key: value.clone() for key, value in stored.items()}, scheme)["weight"]
    return stored | {"wide": wide.float()}


def _extremes(w: torch.Tensor, args: QuantizationArgs) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the largest value of all that share a scale."""
    rows, columns = w.shape
    if args.strategy in ("group", "tensor_group"):
        parts = w.reshape(rows, -1, args.group_size)
        return parts.amin(-1), parts.amax(-1)
    if args.strategy == "channel":
        return w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    if args.strategy == "block":
        down, across = args.block_structure
        padded = torch.nn.functional.pad(w, (0, -columns % across, 0, -rows % down))
        parts = padded.reshape(-(-rows // down), down, -(-columns // across), across)
        return parts.amin((1, 3)), parts.amax((1, 3))
    return w.amin().reshape(1), w.amax().reshape(1)


def words(codes: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """Unsigned codes side by side in int32 along an axis, low bits first."""
    codes = np.moveaxis(codes.astype(np.uint64), axis, -1)
    codes = codes.reshape(*codes.shape[:-1], -1, 32 // bits)
    shifts = np.arange(32 // bits, dtype=np.uint64) * np.uint64(bits)
    packed = np.bitwise_or.reduce(codes << shifts, axis=-1).astype(np.uint32).view(np.int32)
    return np.ascontiguousarray(np.moveaxis(packed, -1, axis))


def rounded(w: np.ndarray, group_of: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Codes [in, out], zero points and float16 scales [groups, out], and the weight they stand for [out, in]."""
    largest, groups = 2**bits - 1, group_of.max() + 1
    parts = [w.T[group_of == g] for g in range(groups)]
    low, high = (np.stack([op(part, axis=0) for part in parts]) for op in (np.min, np.max))
    scale = np.maximum((high - low) / largest, 1e-6).astype(np.float16)
    wide_scale = scale.astype(np.float32)
    zero = np.clip(np.rint(-low / wide_scale), 0, largest)
    codes = np.clip(np.rint(w.T / wide_scale[group_of]) + zero[group_of], 0, largest)
    return codes, zero, scale, ((codes - zero[group_of]) * wide_scale[group_of]).T.astype(np.float32)


def gptq(w: np.ndarray, bits: int, group: int, *, v1: bool = True, shuffled: bool = False) -> dict[str, np.ndarray]:
    columns = w.shape[1]
    group_of = np.arange(columns) // group
    if shuffled:
        group_of = np.random.default_rng(0).permutation(group_of)
    codes, zero, scale, wide = rounded(w, group_of, bits)
    qzeros = words(zero, bits, 1)
    if v1:  # one less, subtracted from whole words
        qzeros = (qzeros.view(np.uint32) - np.uint32(0x11111111 if bits == 4 else 0x01010101)).view(np.int32)
    names = {"qweight": words(codes, bits, 0), "qzeros": qzeros, "scales": scale, "g_idx": group_of.astype(np.int32)}
    return names | {"wide": wide}


def awq(w: np.ndarray, group: int) -> dict[str, np.ndarray]:
    codes, zero, scale, wide = rounded(w, np.arange(w.shape[1]) // group, 4)
    order = np.arange(w.shape[0]).reshape(-1, 8)[:, AWQ_ORDER].reshape(-1)
    return {
        "qweight": words(codes[:, order], 4, 1),
        "qzeros": words(zero[:, order], 4, 1),
        "scales": scale,
        "wide": wide,
    }


def modelopt(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """NVFP4 in ModelOpt's spelling: a factor where compressed-tensors has a divisor."""
    factor = (1 / stored["weight_global_scale"]).reshape(())
    codes, scale = stored["weight_packed"], stored["weight_scale"]
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    values = table[torch.stack([codes & 15, codes >> 4], -1).long()].reshape(codes.shape[0], -1)
    wide = values * (scale.float() * factor).repeat_interleave(16, -1)
    return {"weight": codes, "weight_scale": scale, "weight_scale_2": factor, "input_scale": factor, "wide": wide}


def main() -> None:
    random = torch.Generator().manual_seed(0)
    arrays = {}
    for matrix, shape in SHAPES.items():
        w = 0.2 * torch.randn(shape, generator=random)
        made = {case: compressed(name, w, given, dtype) for case, (name, given, dtype) in CASES.items()}
        made["modelopt-nvfp4"] = modelopt(made["nvfp4"])
        plain = w.numpy()
        made |= {"awq": awq(plain, 16), "gptq": gptq(plain, 4, 16), "gptq-v2": gptq(plain, 4, 16, v1=False)}
        made |= {"gptq8": gptq(plain, 8, 32), "gptq-order": gptq(plain, 4, 16, shuffled=True)}
        arrays[f"source/{matrix}/wide"] = plain
        for case, tensors in made.items():
            for role, value in tensors.items():
                name, array = _stored(value)
                arrays[f"{case}/{matrix}/{role}{name}"] = array
    np.savez_compressed(Path(__file__).parent / "packed.npz", **arrays)


def _stored(value: torch.Tensor | np.ndarray) -> tuple[str, np.ndarray]:
    """An array that numpy knows, and the dtype that its bits have: nothing if it is the array's."""
    if isinstance(value, np.ndarray):
        return "", value
    if value.dtype == torch.bfloat16:
        return "@BF16", value.contiguous().view(torch.int16).numpy().view(np.uint16)
    if value.dtype == torch.float8_e4m3fn:
        return "@F8_E4M3", value.contiguous().view(torch.uint8).numpy()
    return "", value.contiguous().numpy()


if __name__ == "__main__":
    main()
