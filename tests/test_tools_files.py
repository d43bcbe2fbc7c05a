"""Checkpoints that llm-compressor and ModelOpt made (tests/golden/make_tools.py) are read as the tools mean them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoints import COMPANIONS, Tensors, write_folder
from golden.make_tools import FILE, IDS, base_tensors, hub_config

from stepjax.checkpoint.reader import Checkpoint
from stepjax.infer.load import load

DTYPES = {"BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn}
WEIGHT = "layers.1.moe.experts.{}"


@cache
def made() -> dict[str, dict[str, np.ndarray]]:
    """Case → name → array."""
    out: dict[str, dict[str, np.ndarray]] = {}
    with np.load(FILE) as file:
        for key in file:
            case, _, name = key.partition("/")
            name, _, bits = name.partition("@")
            out.setdefault(case, {})[name] = file[key].view(DTYPES[bits]) if bits else file[key]
    return out


CASES = sorted(made())


def folder_of_tool(folder: Path, case: str) -> Path:
    arrays = made()[case]
    hub = hub_config() | {"quantization_config": json.loads(str(arrays["settings"]))}
    tensors: Tensors = {name: value for name, value in base_tensors(hub).items() if value.ndim < 3}
    tensors |= {name: value for name, value in arrays.items() if name.startswith("model.")}
    write_folder(folder, hub, tensors)
    for name in COMPANIONS:
        (folder / name).unlink()
    return folder


@pytest.mark.parametrize("case", CASES)
def test_weights_are_near_those_that_were_given(tmp_path, case):
    """Half a step of the form at most, as each tool says of its own rounding; AWQ scales rows of up against down."""
    checkpoint = Checkpoint(folder_of_tool(tmp_path, case))
    base = base_tensors(hub_config())
    for name in ("gate", "up", "down") if case != "awq" else ("gate",):
        exact = base[f"model.layers.1.moe.{name}_proj.weight"].astype(np.float32)
        wide = checkpoint.read(WEIGHT.format(name), dtype=np.float32)
        error = np.sqrt(np.square(wide - exact).mean() / np.square(exact).mean())
        assert 1e-3 < error < 0.2, name
        assert checkpoint.format(WEIGHT.format(name)).quantised


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if case == "awq" else pytest.mark.slow) for case in CASES if "logits" in made()[case]],
)
def test_logits_are_those_of_transformers(tmp_path, case):
    logits = load(folder_of_tool(tmp_path, case), dtype="float32").logits(IDS[0].tolist())
    np.testing.assert_allclose(logits, made()[case]["logits"][0], atol=2e-4)  # float32 sums in another order
