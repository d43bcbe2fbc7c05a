"""Offline speed of the engine on a list of requests: throughput, latencies, and where the time went."""

from __future__ import annotations

import dataclasses
import resource
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from stepjax.checkpoint.hf_config import to_hf
from stepjax.infer.engine.engine import Engine
from stepjax.infer.engine.stats import FinishedStep
from stepjax.infer.sampling.params import SamplingParams
from stepjax.weights.adapted import plain
from stepjax.weights.inventory import kv_bytes_per_token, kv_window_bytes
from stepjax.weights.plain import PLAIN
from stepjax.weights.quantised import format_of

if TYPE_CHECKING:
    from stepjax.infer.session import Session


class Request(NamedTuple):
    """A prompt, its parameters and its time of arrival."""

    prompt: Sequence[int]
    params: SamplingParams
    arrival_s: float = 0.0  # after the start


class Spread(NamedTuple):
    """Statistics of one quantity over all requests."""

    mean: float
    median: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if not values:
            return cls(0.0, 0.0, 0.0)
        return cls(float(np.mean(values)), float(np.median(values)), float(np.percentile(values, 99)))


class StepTimes(NamedTuple):
    """Times of the steps that ran the same program. Steps that waited for the host count in ``held_up`` only."""

    step: str  # decode or prefill
    rows: int  # sequences that the program runs, idle slots and padding included
    tokens: int  # of each
    drafts: int
    positions: float  # cached, of each sequence that had work, on average
    count: int
    median_ms: float
    p90_ms: float
    held_up: int


@dataclass(frozen=True)
class BenchReport:
    """What `bench` measured. Compiling happens before the start and is in none of the times."""

    requests: int
    seconds: float
    prompt_tokens: int
    output_tokens: int
    output_tokens_per_s: float
    total_tokens_per_s: float
    time_to_first_token_s: Spread
    time_per_output_token_s: Spread  # after the first
    steps: int
    prefill_steps: int
    tokens_per_decode_step: float  # of one sequence: 1 without drafts
    acceptance: list[float]  # by depth: of the drafts that were reached
    cached_prompt_tokens: int  # that the prefix cache spared
    preemptions: int
    host_ms_per_step: float  # planning, launching, committing
    idle_share: float  # share of steps that were launched after the device had become idle
    cache_bytes: int  # keys and values, on one device
    cache_over_formula: float  # 1: only what tokens and windows need is allocated
    peak_bytes: int  # of the device, or of the process on a CPU
    step_times: list[StepTimes]  # what `stepjax plan --calibrate` reads
    errors: int = 0

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        fields = {name: value._asdict() if isinstance(value, Spread) else value for name, value in vars(self).items()}
        return fields | {"step_times": [times._asdict() for times in self.step_times]}


@dataclass
class _Times:
    """Seconds after the start, and tokens, of one answer."""

    arrival: float
    first: float = 0.0
    last: float = 0.0
    tokens: int = 0
    failed: bool = False


def bench(engine: Engine, requests: Sequence[Request]) -> BenchReport:
    """Run the requests until all have ended; each is added when it arrives."""
    engine.warm()
    stats, prefix = engine.stats, engine.scheduler.admission.prefix.stats
    waiting = sorted(requests, key=lambda request: request.arrival_s)
    times: dict[str, _Times] = {}
    step_log = engine.on_step = _StepLog(engine.executor.row_buckets)
    began = time.perf_counter()
    while waiting or engine.has_work:
        now = time.perf_counter() - began
        while waiting and waiting[0].arrival_s <= now:
            request = waiting.pop(0)
            for id in engine.add(request.prompt, request.params):
                times[id] = _Times(request.arrival_s)
        if not engine.has_work:
            time.sleep(max(0.0, waiting[0].arrival_s - now))
            continue
        updates = engine.step()
        now = time.perf_counter() - began
        for update in updates:
            _note(times[update.id], len(update.tokens), update.finish_reason == "error", now)
    seconds = time.perf_counter() - began
    engine.on_step = None
    done = [answer for answer in times.values() if answer.tokens]
    output = sum(answer.tokens for answer in done)
    prompt = sum(len(request.prompt) * request.params.n for request in requests)
    later = [(answer.last - answer.first) / (answer.tokens - 1) for answer in done if answer.tokens > 1]
    return BenchReport(
        requests=len(times),
        seconds=seconds,
        prompt_tokens=prompt,
        output_tokens=output,
        output_tokens_per_s=output / seconds,
        total_tokens_per_s=(output + prompt) / seconds,
        time_to_first_token_s=Spread.of([answer.first - answer.arrival for answer in done]),
        time_per_output_token_s=Spread.of(later),
        steps=stats.num_steps,
        prefill_steps=stats.num_prefill_steps,
        tokens_per_decode_step=stats.decode_tokens / max(stats.decode_rows, 1),
        acceptance=[a / d for a, d in zip(stats.accepted, stats.drafted, strict=True) if d],
        cached_prompt_tokens=prefix.hit_tokens,
        preemptions=engine.scheduler.admission.num_preemptions,
        host_ms_per_step=1e3 * stats.host_s / max(stats.num_steps, 1),
        idle_share=stats.num_idle / max(stats.num_steps, 1),
        cache_bytes=engine.executor.cache_bytes,
        cache_over_formula=cache_over_formula(engine),
        peak_bytes=peak_bytes(),
        step_times=step_log.times(),
        errors=sum(answer.failed for answer in times.values()),
    )


def _note(times: _Times, tokens: int, failed: bool, now: float) -> None:
    times.first = times.first or (now if tokens else 0.0)
    times.tokens += tokens
    times.last, times.failed = now, failed


class _StepLog:
    """Collects the times of steps, by the program that ran them."""

    def __init__(self, row_buckets: Sequence[int]):
        self._row_buckets = row_buckets
        self._seconds: defaultdict[tuple[str, int, int, int], list[float]] = defaultdict(list)
        self._positions: defaultdict[tuple[str, int, int, int], list[float]] = defaultdict(list)
        self._held_up: Counter[tuple[str, int, int, int]] = Counter()

    def __call__(self, step: FinishedStep) -> None:
        plan, rows = step.order.plan, step.order.num_slots
        if plan.kind == "prefill":
            least = step.order.num_rows or len(plan.rows)
            rows = next(bucket for bucket in self._row_buckets if bucket >= least)
        key = plan.kind, rows, plan.width, plan.drafts
        self._held_up[key] += step.held_up
        if not step.held_up:
            self._seconds[key].append(step.seconds)
            self._positions[key].append(sum(row.start for row in plan.rows) / len(plan.rows))

    def times(self) -> list[StepTimes]:
        """One entry a program, the most frequent first."""
        all_times = []
        for key in sorted(self._held_up, key=lambda key: -len(self._seconds[key])):
            ms, positions = 1e3 * np.array(self._seconds[key] or [0.0]), self._positions[key] or [0.0]
            spread = float(np.median(ms)), float(np.percentile(ms, 90))
            count = len(self._seconds[key])
            all_times.append(StepTimes(*key, float(np.mean(positions)), count, *spread, self._held_up[key]))
        return all_times


def cache_over_formula(engine: Engine) -> float:
    """Allocated bytes of keys and values over those that the tokens and windows need (all devices)."""
    model, size = engine.executor.runner.model.config, engine.executor.size
    element = jax.tree.leaves(engine.executor.state.cache)[0].dtype.itemsize
    mtp = engine.executor.runner.drafts > 0
    needed = kv_bytes_per_token(model, element_bytes=element) * (size.num_pages - 1) * size.page_size
    needed *= size.num_shards
    needed += kv_window_bytes(model, element_bytes=element, mtp=mtp) * size.all_slots
    return sum(leaf.nbytes for leaf in jax.tree.leaves(engine.executor.state.cache)) / needed


def held(session: Session, engine: Engine) -> dict[str, Any]:
    """What the engine runs, as JSON values: enough to count what its steps read, compute and exchange."""
    layout, size = session.model.layout, engine.executor.size
    config = session.config if session.model.mtp else dataclasses.replace(session.config, mtp_layers=())
    return {
        "config": to_hf(config),
        **layout.describe(),
        "experts": _precision(session),
        "dtype": jnp.dtype(session.dtype).name,
        "dense_fp8": config.dense_fp8,
        "cache_fp8": config.cache_fp8,
        "context": size.pages_per_sequence * size.page_size,
        "page_size": size.page_size,
    }


def _precision(session: Session) -> str:
    """The planner's name for the format of the routed experts."""
    weight = next((plain(w) for path, w in session.params.items() if ".experts." in path), None)
    return PLAIN.name if weight is None else format_of(weight).name


def peak_bytes() -> int:
    """The most memory in use so far: of the first device, or of this process where the device is the CPU."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def random_requests(
    count: int,
    *,
    vocab: int,
    prompt_tokens: tuple[int, int],
    params: SamplingParams,
    shared_tokens: int = 0,
    rate: float | None = None,
    seed: int = 0,
) -> list[Request]:
    """Prompts of random ids.

    Args:
      prompt_tokens: smallest and largest length of a prompt, drawn uniformly.
      shared_tokens: number of tokens that all prompts begin with.
      rate: arrivals per second (a Poisson process); None: all arrive at once.
    """
    rng = np.random.default_rng(seed)
    shared = rng.integers(3, vocab, shared_tokens).tolist()
    gaps = rng.exponential(1 / rate, count) if rate else np.zeros(count)
    requests = []
    for i, arrival in enumerate(np.cumsum(gaps)):
        length = int(rng.integers(prompt_tokens[0], prompt_tokens[1] + 1))
        rest = rng.integers(3, vocab, max(0, length - shared_tokens)).tolist()
        prompt = [*shared, *rest][:length]
        requests.append(Request(prompt, params.replace(seed=(params.seed + i) % 2**32), float(arrival)))
    return requests
