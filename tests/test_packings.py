"""Weights that other tools quantised are read as those tools read them: tests/golden/pack.py made the files."""

from __future__ import annotations

from functools import cache

import ml_dtypes
import numpy as np
import pytest
from checkpoints import Tensors
from packed_folders import CASES, folder_of, golden, packed, plain_folder

from stepjax.checkpoint.reader import Checkpoint
from stepjax.infer.load import load
from stepjax.weights.quantised import Quantised

WIDENED = {"gptq-order"}  # no form in memory has columns in another order
STACKED = [case for case in CASES if case not in WIDENED]  # nor may a stack of orders be


@cache
def plain(case: str) -> Tensors:
    return packed(case, plain=True)


def expected(case: str, path: str) -> np.ndarray:
    """Float32 values of a stack of experts [E, R, C]."""
    _, layer, _, _, projection = path.split(".")
    return plain(case)[f"model.layers.{layer}.moe.{projection}_proj.weight"]


def tolerance(case: str) -> float:
    """The tool computes in the dtype of its scales, and NVFP4 in bfloat16: half a unit in its last place."""
    scale = next((v for k, v in golden()[case]["gate"].items() if k in ("weight_scale", "scales")), None)
    if case == "nvfp4" or (scale is not None and scale.dtype == ml_dtypes.bfloat16):
        return 2.0**-8
    return 2.0**-11 if case == "int4-channel" else 1e-6


def moe_paths(checkpoint: Checkpoint) -> list[str]:
    return [path for path in checkpoint.paths if ".experts." in path]


@pytest.mark.parametrize(("case", "stacked"), [*((case, False) for case in CASES), *((case, True) for case in STACKED)])
def test_values_are_those_of_the_tool(tmp_path, case, stacked):
    checkpoint = Checkpoint(folder_of(tmp_path, case, packed(case, stacked=stacked)))
    for path in moe_paths(checkpoint)[:3]:
        wide = checkpoint.read(path, dtype=np.float32)
        exact = expected(case, path)
        np.testing.assert_allclose(wide, exact, rtol=tolerance(case), atol=0)
        part = (slice(1, 4), slice(3, 29), slice(5, 27))  # inside what shares a scale
        np.testing.assert_array_equal(checkpoint.read(path, dtype=np.float32, index=part), wide[part])


@pytest.mark.parametrize("case", [case for case in CASES if case not in WIDENED])
def test_what_is_kept_is_what_is_widened(tmp_path, case):
    checkpoint = Checkpoint(folder_of(tmp_path, case))
    path = moe_paths(checkpoint)[0]
    kept = checkpoint.read(path, dtype=np.float32, keep=True)
    assert isinstance(kept, Quantised)
    wide = checkpoint.read(path, dtype=np.float32)
    assert kept.shape == wide.shape
    np.testing.assert_array_equal(np.asarray(kept.dequantize_numpy(np.float32)), wide)
    np.testing.assert_allclose(np.asarray(kept.dequantize(np.float32)), wide, rtol=1e-6, atol=0)
    assert kept.format.value_dtype in ("U8", "I8", "F8_E4M3")


LOADED = ["int4-zeros", "mxfp4", "modelopt-nvfp4", "gptq-order"]


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in LOADED[1:3] else pytest.mark.slow) for case in LOADED]
)
def test_a_model_answers_as_its_dequantised_twin(tmp_path, case):
    """Kept or widened, on one device and on a mesh that cuts inside what shares a scale."""
    ids = list(range(20, 60))
    plain = load(plain_folder(tmp_path / "plain", case), dtype="float32").logits(ids)
    folder = folder_of(tmp_path / "packed", case)
    for mesh in (None, "expert=2,tensor=2"):
        session = load(folder, dtype="float32", mesh=mesh)
        kept = {path for path, value in session.params.items() if isinstance(value, Quantised)}
        assert kept == (set() if case in WIDENED else {path for path in session.params if ".experts." in path})
        np.testing.assert_allclose(session.logits(ids), plain, atol=2e-4)  # sums in another order
