"""Compares the plan of a step with the compiled step: bytes of arguments, peak, collectives."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table

from stepjax.adapters.lora import LoraConfig
from stepjax.config import ModelConfig
from stepjax.infer.sampling.params import MAX_LOGPROBS
from stepjax.infer.steps.abstract_steps import sequence_bytes
from stepjax.sharding.compiled.report import CompileReport, size_text
from stepjax.sharding.dispatch import CHEAPEST, Dispatch
from stepjax.sharding.exchange import Exchange
from stepjax.sharding.mesh import MeshSpec
from stepjax.sharding.mesh_layout import MeshLayout
from stepjax.sharding.planner.device_bytes import PAGE, layout_of, local_shape, paged, parameters, placed
from stepjax.sharding.planner.exchanges import StepShape, payloads, scoring_exchanges, serving_exchanges
from stepjax.sharding.planner.lora_step import adapter_factors, training_bytes, training_shape
from stepjax.sharding.planner.temporaries import serving_temporaries
from stepjax.train.packing.rows import PackedRows
from stepjax.train.planning.workload import Workload

SCORE_BYTES = 4.0 * (1 + 2 * MAX_LOGPROBS)  # of a token: its log-probability, the likeliest tokens and theirs
PEAK_OVER, PEAK_UNDER = 0.15, 0.03  # tolerated error of the planned peak, relative to the compiled one

Payloads = dict[tuple[str, str], float]  # bytes by kind and axes of collectives


@dataclass(frozen=True)
class Planned:
    """Planned bytes of one device. None: not predicted."""

    argument_bytes: int
    temp_bytes: float | None
    payloads: Payloads | None
    asked_payloads: Payloads | None = None  # of branches that run where a request asks for more, if they all run
    output_bytes: int = 0  # that do not reuse an argument's memory; in serving a few bytes per sequence

    @property
    def peak_bytes(self) -> float | None:
        """Arguments, temporaries, and outputs that do not reuse the memory of donated arguments."""
        return None if self.temp_bytes is None else self.argument_bytes + self.output_bytes + self.temp_bytes


@dataclass(frozen=True)
class Check:
    """Planned and compiled numbers of one step."""

    planned: Planned
    argument_bytes: int
    peak_bytes: int
    payloads: Payloads
    asked_payloads: Payloads  # of branches, where more is sent by one than by the other
    of_target: bool  # whether it was compiled for an accelerator; peak and collectives of a CPU differ

    @property
    def arguments_hold(self) -> bool:
        return self.planned.argument_bytes == self.argument_bytes

    @property
    def peak_error(self) -> float | None:
        """Error of the planned peak, relative to the compiled one."""
        if self.planned.peak_bytes is None or not self.of_target:
            return None
        return self.planned.peak_bytes / self.peak_bytes - 1

    @property
    def peak_holds(self) -> bool:
        return self.peak_error is None or -PEAK_UNDER <= self.peak_error <= PEAK_OVER

    @property
    def payloads_hold(self) -> bool:
        if self.planned.payloads is None or not self.of_target:
            return True
        return (self.planned.payloads, self.planned.asked_payloads) == (self.payloads, self.asked_payloads)

    @property
    def holds(self) -> bool:
        return self.arguments_hold and self.peak_holds and self.payloads_hold

    def as_dict(self) -> dict[str, Any]:
        """The comparison for ``--json``."""

        def listed(payloads: Payloads | None) -> Any:
            if payloads is None:
                return None
            return {f"{kind} over {axes}": size for (kind, axes), size in payloads.items()}

        return {
            "arguments": {"planned": self.planned.argument_bytes, "compiled": self.argument_bytes},
            "peak": {"planned": self.planned.peak_bytes, "compiled": self.peak_bytes, "error": self.peak_error},
            "collectives": {"planned": listed(self.planned.payloads), "compiled": listed(self.payloads)},
            "collectives_if_asked": {
                "planned": listed(self.planned.asked_payloads),
                "compiled": listed(self.asked_payloads),
            },
            "of_target": self.of_target,
            "holds": self.holds,
        }

    def shown(self) -> RenderableType:
        """The comparison as a table."""
        table = Table("one device", "planned", "compiled", "", box=box.SIMPLE)
        difference = self.planned.argument_bytes - self.argument_bytes
        verdict = "equal" if not difference else f"{difference:+,} bytes"
        table.add_row("arguments", size_text(self.planned.argument_bytes), size_text(self.argument_bytes), verdict)
        if self.peak_error is not None and self.planned.peak_bytes is not None:
            row = size_text(self.planned.peak_bytes), size_text(self.peak_bytes), f"{self.peak_error:+.1%}"
            table.add_row("peak", *row)
        if self.of_target:
            _add_payloads(table, self.planned.payloads, self.payloads, "")
            _add_payloads(table, self.planned.asked_payloads, self.asked_payloads, ", for scores of prompts")
        note = "" if self.of_target else "Peak and collectives are compared on --target h100, h200 or b200 only."
        return Group(table, f"The plan {'holds' if self.holds else 'does not hold'}.", note)


def _add_payloads(table: Table, planned: Payloads | None, compiled: Payloads, what: str) -> None:
    for key in sorted({*planned, *compiled} if planned is not None else ()):
        assert planned is not None
        plan, size = planned.get(key, 0.0), compiled.get(key, 0.0)
        verdict = "equal" if plan == size else f"{plan - size:+,.0f} bytes"
        table.add_row(f"{key[0]} over {key[1]}{what}", size_text(plan), size_text(size), verdict)


def check(
    config: ModelConfig,
    workload: Workload,
    mesh: MeshSpec,
    strategy: str,
    report: CompileReport,
    *,
    dispatch: Dispatch | None = None,
) -> Check:
    """Compare the plan of a step with the compiler's report of it."""
    return compare(
        planned(config, workload, mesh, strategy, dispatch=dispatch),
        argument_bytes=report.argument_bytes,
        peak_bytes=report.peak_bytes,
        payloads=report.sent(in_branches=False),
        asked_payloads=report.sent(in_branches=True),
        of_target=report.temp_is_of_target,
    )


def compare(
    planned: Planned,
    *,
    argument_bytes: int,
    peak_bytes: int,
    payloads: list[tuple[str, str, float]],
    asked_payloads: list[tuple[str, str, float]],
    of_target: bool,
) -> Check:
    """Compare a plan with compiled numbers.

    Args:
      payloads: kind, axes joined by commas, and bytes of each collective that every step launches.
      asked_payloads: of those in branches, which a step takes where a request asks for what they compute.
    """
    return Check(planned, argument_bytes, peak_bytes, _summed(payloads), _summed(asked_payloads), of_target)


def _summed(payloads: list[tuple[str, str, float]]) -> Payloads:
    sums: defaultdict[tuple[str, str], float] = defaultdict(float)
    for kind, axes, size in payloads:
        sums[kind, axes] += size
    return dict(sums)


def planned(
    config: ModelConfig, workload: Workload, mesh: MeshSpec, strategy: str, *, dispatch: Dispatch | None = None
) -> Planned:
    """The plan of the step that `stepjax.train.planning.workload.study_model` compiles.

    Raises:
      RequestError, MeshError: as `study_model`.
    """
    workload.check(config)
    experts = workload.experts.for_model(config)
    config = dataclasses.replace(config, mtp_layers=config.mtp_layers[: workload.drafts])
    layout = dataclasses.replace(layout_of(config, mesh, strategy, experts), dispatch=dispatch or CHEAPEST)
    dtype = jnp.dtype(workload.resolved_dtype)
    weights = placed(parameters(config, experts=experts, depths=workload.drafts, dtype=dtype.name), layout)
    weight_bytes = sum(weight.num_bytes for weight in weights)
    if workload.step == "train":
        biases = sum(weight.num_bytes for weight in weights if weight.kind.path.endswith("router.bias"))
        moments = 2 * (weight_bytes - biases)
        counts = 4 * (2 + 1)  # of Adam and of the schedule, and the step
        return Planned(weight_bytes + moments + counts + _rows_bytes(layout, workload), None, None)
    if workload.step == "lora":
        return _lora(config, workload, layout, weight_bytes)
    layout = layout.together()  # as an engine's sequences lie
    batch, context = workload.batch, workload.context
    cache = paged(config, layout, batch=batch, context=context, depths=workload.drafts, dtype=dtype.name)
    shape = StepShape(
        "decode" if workload.step == "decode" else "prefill",
        workload.batch,
        workload.tokens,
        workload.context,
        workload.drafts,
        dtype.itemsize,
    )
    (sequences,) = local_shape(layout, (shape.batch,), "batch")
    state = sequences * sequence_bytes(config, workload.drafts, dtype=dtype.name)
    inputs = 4 * sequences * -(-context // PAGE)  # the table of pages
    if workload.step == "decode":
        inputs += sequences  # whether each is active
    else:
        # ids, whole on every device; their number, the next token, the tokens in the cache, the slot; whether to score
        inputs += (4 * shape.count + 4 * 4 + 1) * sequences
    every_step = serving_exchanges(layout, shape, rows_split=cache.rows_split)
    return Planned(
        argument_bytes=weight_bytes + cache.num_bytes + state + inputs,
        temp_bytes=serving_temporaries(layout, shape, cache),
        payloads=_by_name(every_step),
        asked_payloads=_by_name(scoring_exchanges(layout, shape, score_bytes=SCORE_BYTES)),
    )


def _by_name(exchanges: Iterable[Exchange]) -> Payloads:
    return {(kind, ",".join(axes)): size for (kind, axes), size in payloads(exchanges).items()}


def _lora(config: ModelConfig, workload: Workload, layout: MeshLayout, weight_bytes: int) -> Planned:
    """Leaves, their two moments and the gradients are arguments; the gradients are donated."""
    factors = placed(adapter_factors(config, LoraConfig()), layout)
    training = training_bytes(layout, training_shape(workload.batch, workload.context), factors)
    rows, tokens = local_shape(layout, (workload.batch, workload.context), "batch", "length")
    state = training.adapter + training.moments
    counts = 4 * (2 + 1 + 2)  # of Adam and of the schedule, the step, the skipped batches
    inputs = 2 * 4 * rows * tokens + 4  # the sampler's log-probabilities, advantages; the number of tokens
    return Planned(
        argument_bytes=weight_bytes + state + training.gradients + counts + _rows_bytes(layout, workload) + inputs,
        temp_bytes=training.gradients + training.activations,
        payloads=None,
    )


def _rows_bytes(layout: MeshLayout, workload: Workload) -> int:
    rows, tokens = local_shape(layout, (workload.batch, workload.context), "batch", "length")
    return len(PackedRows._fields) * 4 * rows * tokens
