"""AutoAWQ's and GPTQ's layouts, packed here word by word from their descriptions, are read as what they stand for.

AutoAWQ: nibble k of word j is output 8 j + (0, 2, 4, 6, 1, 3, 5, 7)[k] (AutoAWQ, awq/modules/linear/gemm.py). GPTQ:
codes run down the inputs; version 1 of its files holds zero points less one, subtracted from the whole word, so that a
zero point of 0 borrows from its neighbour.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packed_folders import base_tensors, folder_of

from stepjax.checkpoint.reader import Checkpoint
from stepjax.errors import CheckpointError, ConfigError

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
MODULE = "model.layers.1.moe.experts.{}.gate_proj"
Roles = dict[str, np.ndarray]


def words(codes: np.ndarray, bits: int, order: Sequence[int] | None = None) -> np.ndarray:
    """Unsigned codes along the last axis in words, one by one."""
    per_word = 32 // bits
    out = np.zeros((*codes.shape[:-1], codes.shape[-1] // per_word), np.uint32)
    for word in range(out.shape[-1]):
        for k, place in enumerate(order or range(per_word)):
            out[..., word] |= codes[..., word * per_word + place].astype(np.uint32) << np.uint32(k * bits)
    return out


def drawn(seed: int, bits: int, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [in, out], zero points [groups, out] and scales, with zero points of 0 and the largest among them."""
    random = np.random.default_rng(seed)
    codes, zeros = (random.integers(0, 1 << bits, (rows, 32), np.uint32) for rows in (64, 64 // group))
    zeros[0, :9] = 0
    zeros[-1, 3:9] = (1 << bits) - 1
    return codes, zeros, random.uniform(0.01, 0.1, zeros.shape).astype(np.float16)


def awq(seed: int, group: int) -> tuple[Roles, np.ndarray]:
    codes, zeros, scale = drawn(seed, 4, group)
    roles = {"qweight": words(codes, 4, AWQ_ORDER), "qzeros": words(zeros, 4, AWQ_ORDER), "scales": scale}
    return roles, value(codes, zeros, scale, np.arange(64) // group)


def gptq(seed: int, group: int, *, bits: int, version: int, ordered: bool) -> tuple[Roles, np.ndarray]:
    codes, zeros, scale = drawn(seed, bits, group)
    order = np.arange(64) // group
    if ordered:
        order = np.random.default_rng(seed + 1).permutation(order)
    stored = words(zeros, bits)
    if version == 1:
        stored = stored - np.uint32(sum(1 << k for k in range(0, 32, bits)))
    roles = {"qweight": words(codes.T, bits).T, "qzeros": stored, "scales": scale, "g_idx": order.astype(np.int32)}
    return roles, value(codes, zeros, scale, order)


def value(codes: np.ndarray, zeros: np.ndarray, scale: np.ndarray, order: np.ndarray) -> np.ndarray:
    """``W[o, i] = (u[i, o] − zero[g[i], o]) · scale[g[i], o]`` in float32."""
    return ((codes.astype(np.float32) - zeros[order].astype(np.float32)) * scale.astype(np.float32)[order]).T


def written(folder: Path, experts: list[Roles], settings: dict[str, Any]) -> Path:
    """A folder whose layer 1 has these gate matrices, one an expert."""
    _, tensors = base_tensors()
    tensors = {name: array for name, array in tensors.items() if name != "model.layers.1.moe.gate_proj.weight"}
    for expert, roles in enumerate(experts):
        for role, array in roles.items():
            stored = array.view(np.int32) if array.dtype == np.uint32 else array
            tensors[f"{MODULE.format(expert)}.{role}"] = np.ascontiguousarray(stored)
    return folder_of(folder, "awq", tensors, quantization_config=settings)


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "awq": (lambda seed: awq(seed, 16), {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"}),
    "awq-rows": (lambda seed: awq(seed, 64), {"quant_method": "awq", "bits": 4, "group_size": -1, "version": "GEMM"}),
} | {
    f"gptq{bits}-v{version}{'-order' * ordered}": (
        lambda seed, bits=bits, version=version, ordered=ordered: gptq(
            seed, 16, bits=bits, version=version, ordered=ordered
        ),
        {
            "quant_method": "gptq",
            "bits": bits,
            "group_size": 16,
            "desc_act": ordered,
            "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
        },
    )
    for bits in (4, 8)
    for version in (1, 2)
    for ordered in (False, True)
}


@pytest.mark.parametrize("case", CASES)
def test_words_are_read_as_what_they_stand_for(tmp_path, case):
    make, settings = CASES[case]
    experts = [make(10 * expert) for expert in range(8)]
    checkpoint = Checkpoint(written(tmp_path, [roles for roles, _ in experts], settings))
    read = checkpoint.read("layers.1.moe.experts.gate", dtype=np.float32)
    np.testing.assert_array_equal(read, np.stack([exact for _, exact in experts]))


def test_the_worked_words_of_the_formats():
    assert words(np.arange(0, 16, 2, dtype=np.uint32)[None], 4, AWQ_ORDER)[0, 0] == 0xEA62C840
    assert words(np.arange(3, 11, dtype=np.uint32)[None], 4, AWQ_ORDER)[0, 0] == 0xA8649753
    assert words(np.array([[0, 3, 6, 9, 12, 15, 2, 5]], np.uint32), 4)[0, 0] == 0x52FC9630
    zeros = np.array([[8] * 7 + [5], [0] * 8], np.uint32)
    assert (words(zeros, 4) - np.uint32(0x11111111)).tolist() == [[0x47777777], [0xEEEEEEEF]]


@pytest.mark.parametrize("method", ["marlin", "gptq_marlin", "awq_marlin"])
def test_a_kernel_s_own_layout_is_refused(tmp_path, method):
    """Marlin's files have a tensor B of tiles and s of scales."""
    roles = {"B": np.zeros((4, 64), np.uint32), "s": np.ones((4, 32), np.float16), "workspace": np.zeros(8, np.uint32)}
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 16}
    with pytest.raises(ConfigError, match=r"config\.json: quantization_config\.quant_method: is '\w+', only 'fp8' and"):
        Checkpoint(written(tmp_path / "a", [roles] * 8, settings | {"quant_method": method}))
    with pytest.raises(
        ConfigError, match=r"config\.json: quantization_config\.is_marlin_format: is true, expected GPTQ"
    ):
        Checkpoint(written(tmp_path / "b", [roles] * 8, settings | {"is_marlin_format": True}))
    with pytest.raises(CheckpointError, match=r"layers\.1\.moe\.gate_proj\.weight is missing"):
        Checkpoint(written(tmp_path / "c", [roles] * 8, settings))
