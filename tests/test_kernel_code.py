"""The code that kernels become on an H200, which is not there: instructions for a weight, loops, copies."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stepjax.ops.stored_rows import tiling_for

pytestmark = pytest.mark.aot

ROOT = Path(__file__).resolve().parent.parent
CASES = ("int4,1", "fp8,8", "int8,64", "int4,2048")
ACTIVATIONS = 2048 * (8 * 1280 * 2 + 4096 * 4)  # bytes of hidden states and of the result for 2,048 tokens


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    command = [sys.executable, "tests/kernel_code.py", str(tmp_path_factory.mktemp("dump")), *CASES]
    return json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout)


@pytest.mark.parametrize("case", CASES)
def test_no_expert_is_widened_in_memory_and_the_host_waits_for_no_loop(code, case):
    assert code[case]["whiles"] == 0
    assert code[case]["widened"] == []


@pytest.mark.parametrize(("case", "depth"), [("int4,1", 64), ("fp8,8", 128)])
def test_a_decode_kernel_executes_at_most_six_instructions_for_a_weight(code, case, depth):
    """Of gate and up in one turn of the loop, which all threads of a program share."""
    tiling = tiling_for(1)
    unroll = tiling.unroll
    weights = 2 * tiling.columns * depth * unroll / (32 * tiling.warps)
    largest = max(sum(kinds.values()) for kinds in code[case]["loops"])
    assert 1 < largest / weights <= 6


@pytest.mark.parametrize(("case", "activations"), [("int8,64", 0), ("int4,2048", ACTIVATIONS)])
def test_temporaries_stay_small_beside_the_activations(code, case, activations):
    assert code[case]["temp_bytes"] - activations <= 50e6
