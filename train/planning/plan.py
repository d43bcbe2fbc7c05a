"""Plans from Python: ranked layouts of a model on a machine, as ``stepjax plan`` prints them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from stepjax.commands.info import read_config
from stepjax.config import ModelConfig
from stepjax.infer.engine.draft_policy import PRIOR
from stepjax.infer.steps.abstract_steps import sequence_bytes
from stepjax.sharding.planner.hardware import Cluster, parse
from stepjax.sharding.planner.options import Goal, Plan, PlanRequest
from stepjax.sharding.planner.search import BATCHES, rank_options
from stepjax.weights.formats import FORMATS, named


def plan(
    model: str | ModelConfig = "step-3.5-flash",
    *,
    hardware: str,
    goal: Goal = "latency",
    batch: int | None = None,
    context: int = 4096,
    tpot_s: float | None = None,
    ttft_s: float | None = None,
    experts: Sequence[str] = tuple(FORMATS),
    dense_fp8: bool = False,
    cache_fp8: bool = False,
    strategies: Sequence[str] | None = None,
) -> Plan:
    """Rank every mesh, strategy, expert precision and number of drafts for a machine. No weights are read.

    Args:
      model: checkpoint folder, hub id, preset or embedded name, or a configuration.
      hardware: such as ``8xH100`` or ``4 nodes of 8xH200``.
      goal: ``latency``, ``throughput``, ``context``, ``lora`` or ``cheapest``.
      batch: sequences of one engine (for ``throughput`` the most); for ``lora`` rows of a training step. Default: 1;
        for ``throughput`` the largest that is tried; for ``lora`` 8 rows per device.
      context: positions of each sequence, prompt and answer.
      tpot_s: the longest time between two tokens of a sequence, in seconds.
      ttft_s: the longest time to the first token, in seconds, after a prompt of ``context`` tokens that is alone.
      experts: names of the expert formats to consider, such as ``bf16``, ``fp8``, ``int8``, ``int4``.
      dense_fp8, cache_fp8: hold the linear maps beside the experts, and keys and values, in FP8 (`stepjax.load`).
      strategies: to consider, of `stepjax.sharding.rules.STRATEGIES`; None: all that the goal allows.

    Returns:
      Options, best first, and refusals with their reasons. Times are bounds from datasheets.

    Raises:
      ConfigError: the hardware or the model is unknown.
      RequestError: an expert format is unknown, or a value is out of range for the model.

    Example:
      >>> import stepjax
      >>> best = stepjax.plan("step-3.5-flash", hardware="8xH100", experts=["bf16"]).options[0]
      >>> str(best.choice.mesh), best.choice.experts.name, best.choice.drafts
      ('tensor=8', 'bf16', 3)
    """
    config = read_config(model) if isinstance(model, str) else model
    dense_fp8, cache_fp8 = dense_fp8 or config.dense_fp8, cache_fp8 or config.cache_fp8
    config = dataclasses.replace(config, dense_fp8=dense_fp8, cache_fp8=cache_fp8)
    cluster = parse(hardware)
    request = request_for(
        config,
        cluster,
        goal,
        batch=batch,
        context=context,
        tpot_s=tpot_s,
        ttft_s=ttft_s,
        experts=named(experts),
        strategies=None if strategies is None else tuple(strategies),
    )
    return rank_options(config, cluster, request)


def request_for(
    config: ModelConfig, cluster: Cluster, goal: Goal, *, batch: int | None, acceptance: float = PRIOR, **settings: Any
) -> PlanRequest:
    """A request to the planner with the engine's assumptions.

    Args:
      batch: None: 1; for ``throughput`` the largest that is tried; for ``lora`` 8 rows per device.
      settings: other fields of `PlanRequest`.
    """
    largest = {"throughput": BATCHES[-1], "lora": 8 * cluster.num_devices}
    return PlanRequest(
        goal=goal,
        batch=largest.get(goal, 1) if batch is None else batch,
        acceptance=acceptance,
        sequence_bytes=lambda drafts: sequence_bytes(config, drafts),
        **settings,
    )
