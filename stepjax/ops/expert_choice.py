"""Which form of the routed experts a step takes, and how many rows its buffers have: all static.

Which form copies weights and which does not was read from code compiled for an H100. `jax.lax.ragged_dot` does
expert-fold work there and on CPU, so nothing here uses it.

  gathered   T·A rows of weights are read once each: small T, where few experts are touched (not on CPU)
  batched    every expert runs every token, one GEMM batched over experts: T where most experts are touched
  stored     blocks of one expert's rows, a kernel that widens weights in registers: quantised experts on NVIDIA GPUs
  grouped    tokens sorted by expert, blocks of one expert's rows, a kernel for all of them: bf16 on Hopper GPUs
  capacity   tokens sorted by expert, C rows of each expert a pass, as many passes as the fullest expert needs
  blocked    tokens sorted by expert, block after block of one expert's rows: on CPU, where such small products are fast
  in_turn    assignment after assignment, two at a time: for a single token on CPU
"""

from __future__ import annotations

import math
from typing import Literal

Formulation = Literal["gathered", "batched", "stored", "grouped", "capacity", "blocked", "in_turn", "reference"]

WIDENED_COST = 3  # of a quantised expert that products over all experts read, over that of one assignment's gather
BATCHED_TOKENS = 256  # beyond, capacity wins even where its passes read all weights again for a few full experts (H100)
BLOCKED_TOKENS_CPU = 16  # up to here a CPU takes the touched experts one by one
BATCHED_TOKENS_CPU = 32  # beyond, a CPU is busy with the tokens that did not choose an expert
GROUPED_ROWS = 2**16  # at a time: 2.4 GB between the products of the release's widths
WIDENED_BYTES = 256 * 2**20  # of one quantised matrix at a time (H100, int4, 64 tokens: 8.2 ms, with 16 MiB 10.1)
HEADROOM = 1.5  # rows of capacity over the mean load: one pass usually suffices


def choose_form(
    num_tokens: int,
    num_experts: int,
    top_k: int,
    *,
    widened: bool = False,
    kernel: bool = False,
    stored: bool = False,
) -> Formulation:
    """The form for a step of ``num_tokens`` (static) tokens on a GPU; ``kernel``: there is one for these weights;
    ``stored``: and one that reads them as they are stored, which is taken for any number of tokens.

    One layer of 288 experts on an H100 takes 0.0115 ms for each assignment that is gathered, in bf16 and in int4; for
    each expert of products over all of them it takes 0.0117 ms in bf16 and 0.0285 to 0.036 ms in int4, which is
    ``widened`` first. The kernel takes 0.015 ms for each expert that is touched, so that gathering pays up to 16 tokens
    (benchmarks/results/gpu-h100.json).
    """
    assignments = num_tokens * top_k
    if stored:
        return "stored"
    if kernel:
        return "gathered" if 2 * assignments < num_experts else "grouped"
    if assignments < num_experts * (WIDENED_COST if widened else 1):
        return "gathered"
    return "batched" if num_tokens <= BATCHED_TOKENS else "capacity"


def choose_form_cpu(num_tokens: int, num_experts: int, top_k: int) -> Formulation:
    """The same on a CPU."""
    if num_tokens <= BLOCKED_TOKENS_CPU and num_tokens * top_k < num_experts:
        return "in_turn" if num_tokens == 1 else "blocked"
    return "batched" if num_tokens <= BATCHED_TOKENS_CPU else "blocked"


def buffer_rows(mean: float, *, most: int) -> int:
    """Rows of a buffer for a share of the tokens that is ``mean`` rows on average and never more than ``most``."""
    return min(most, max(8, 8 * math.ceil(HEADROOM * mean / 8)))


def block_rows(capacity: int, *, most: int) -> int:
    """Rows of a block, for buffers of ``capacity`` rows: half the mean load, as far as that makes a good product."""
    return min(most, 64, max(16, 16 * math.ceil(capacity / (32 * HEADROOM))))


def tile_size(num_experts: int, values: int, itemsize: int) -> int:
    """Experts whose quantised matrices, of so many values each, are widened together: a divisor of all."""
    most = max(1, WIDENED_BYTES // (values * itemsize))
    return max(n for n in range(1, num_experts + 1) if n <= most and num_experts % n == 0)


def grouped_blocks(assignments: int, load: int, num_experts: int, rows: int) -> int:
    """Blocks of ``rows`` rows that the grouped form holds at a time; ``load`` of the ``assignments`` are expected."""
    most = assignments // rows + min(num_experts, assignments)
    return min(most, math.ceil(HEADROOM * load / rows) + num_experts, GROUPED_ROWS // rows)
