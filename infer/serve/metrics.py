"""Prometheus metrics under vLLM's names with our prefix, so that its dashboards need no more than that change."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from stepjax.infer.engine.sequence import FinishReason

if TYPE_CHECKING:
    from prometheus_client.core import Metric

    from stepjax.infer.engine.engine import Engine, Update

PREFIX = "stepjax"
_FIRST_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_NEXT_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5)
_WHOLE_S = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000)


@dataclass
class AnswerProgress:
    """How far one answer is."""

    began: float  # when the request came
    num_prompt: int
    num_cached: int = 0  # prompt tokens read from the prefix cache
    num_output: int = 0
    first_s: float | None = None  # times of its first and last tokens
    last_s: float | None = None


class ServerMetrics:
    """The metrics of one server. What the engine counts itself is read at each request for the metrics."""

    def __init__(self, engine: Engine, model: str):
        self._registry = CollectorRegistry()
        self._model = model
        self._finished = self._counter("request_success", "Finished requests", "finished_reason")
        for reason in get_args(FinishReason):  # listed from the start, at 0
            self._finished.labels(model, reason)
        self._prompt = self._counter("prompt_tokens", "Prompt tokens of accepted requests")
        self._generated = self._counter("generation_tokens", "Generated tokens")
        self._first = self._histogram("time_to_first_token_seconds", "From request to first token", _FIRST_S)
        self._next = _TokenIntervals(model)
        self._registry.register(self._next)
        self._whole = self._histogram("e2e_request_latency_seconds", "From request to last token", _WHOLE_S)
        self._prompt_sizes = self._histogram("request_prompt_tokens", "Prompt tokens of a request", _TOKENS)
        self._sizes = self._histogram("request_generation_tokens", "Tokens of an answer", _TOKENS)
        self._registry.register(_EngineCollector(engine, model))

    def register(self, collector: Collector) -> None:
        """Expose what another part of the server counts, too."""
        self._registry.register(collector)

    def expose(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self._registry)

    def observe(self, progress: AnswerProgress, update: Update, now: float) -> None:
        """Count what a step added to an answer."""
        if update.tokens:
            since = now - (progress.last_s or progress.began)
            if progress.last_s is None:
                self._first.observe(since)
                self._prompt.inc(progress.num_prompt)
                self._prompt_sizes.observe(progress.num_prompt)
                progress.first_s = now
            else:
                self._next.observe(since / len(update.tokens), len(update.tokens))
            progress.last_s = now
            progress.num_output += len(update.tokens)
            progress.num_cached = update.num_cached
            self._generated.inc(len(update.tokens))

    def end(self, progress: AnswerProgress, reason: FinishReason, now: float) -> None:
        """Count an answer that has ended, whatever ended it."""
        self._finished.labels(self._model, reason).inc()
        self._whole.observe(now - progress.began)
        self._sizes.observe(progress.num_output)

    def _counter(self, name: str, text: str, *labels: str):
        counter = Counter(f"{PREFIX}:{name}", text, ["model_name", *labels], registry=self._registry)
        return counter if labels else counter.labels(self._model)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]):
        histogram = Histogram(f"{PREFIX}:{name}", text, ["model_name"], registry=self._registry, buckets=buckets)
        return histogram.labels(self._model)


class _TokenIntervals(Collector):
    """The histogram of times between the tokens of an answer. One of the library takes several times as long for each
    token of each answer, and runs in the event loop.
    """

    def __init__(self, model: str):
        self._model = model
        self._counts, self._sum_s = [0] * (len(_NEXT_S) + 1), 0.0

    def observe(self, seconds: float, times: int) -> None:
        self._counts[bisect_left(_NEXT_S, seconds)] += times
        self._sum_s += seconds * times

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(
            f"{PREFIX}:inter_token_latency_seconds", "Between the tokens of an answer", labels=["model_name"]
        )
        bounds = [*(str(float(bound)) for bound in _NEXT_S), "+Inf"]
        counts = itertools.accumulate(self._counts)
        family.add_metric([self._model], list(zip(bounds, counts, strict=True)), self._sum_s)
        yield family


class _EngineCollector(Collector):
    def __init__(self, engine: Engine, model: str):
        self._engine, self._model = engine, model

    def collect(self) -> Iterator[Metric]:
        admission, stats = self._engine.scheduler.admission, self._engine.stats
        prefix, host = admission.prefix.stats, admission.prefix.host.stats
        tiers = [shard.prefix.host for shard in admission.shards]
        used = 1 - admission.num_available / admission.num_pages
        on_device = prefix.hit_tokens - prefix.host_hit_tokens
        gauges = {
            "num_requests_running": ("Answers in slots", len(admission.running)),
            "num_requests_waiting": ("Answers that wait for a slot", len(admission.waiting)),
            "kv_cache_usage_perc": ("Share of the cache's pages in use", used),
            "expert_imbalance": (
                "Tokens of the fullest device over the mean, when experts were last moved; 0 if they are not",
                stats.expert_imbalance,
            ),
            "host_cache_usage_perc": (
                "Share of the prefix cache's host memory in use",
                sum(tier.used for tier in tiers) / max(1, sum(tier.capacity for tier in tiers)),
            ),
        }
        counters = {
            "num_preemptions": (
                "Answers that lost their pages and were computed again",
                admission.num_preemptions,
            ),
            "prefix_cache_queries": ("Prompt tokens looked up in the prefix cache", prefix.lookup_tokens),
            "prefix_cache_hits": ("Prompt tokens found on the device", on_device),
            "external_prefix_cache_queries": (
                "Prompt tokens looked up in host memory, since the device did not have them",
                prefix.lookup_tokens - on_device,
            ),
            "external_prefix_cache_hits": ("Prompt tokens found in host memory only", prefix.host_hit_tokens),
            "host_cache_stored_pages": ("Pages copied to host memory", host.stored_pages),
            "host_cache_stored_snapshots": ("Ring snapshots copied to host memory", host.stored_snapshots),
            "host_cache_loaded_pages": ("Pages copied back from host memory", host.loaded_pages),
            "host_cache_loaded_snapshots": ("Ring snapshots copied back from host memory", host.loaded_snapshots),
            "spec_decode_num_draft_tokens": ("Draft tokens that were verified", sum(stats.drafted)),
            "spec_decode_num_accepted_tokens": ("Draft tokens that were accepted", sum(stats.accepted)),
            "engine_steps": ("Steps of the engine", stats.num_steps),
            "expert_slots_written": ("Copies of experts that were moved", stats.expert_slots_written),
        }
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(f"{PREFIX}:{name}", text, labels=["model_name"])
            gauge.add_metric([self._model], value)
            yield gauge
        for name, (text, value) in counters.items():
            counter = CounterMetricFamily(f"{PREFIX}:{name}", text, labels=["model_name"])
            counter.add_metric([self._model], value)
            yield counter
        by_depth = CounterMetricFamily(
            f"{PREFIX}:spec_decode_num_accepted_tokens_per_pos",
            "Draft tokens that were accepted, by depth",
            labels=["model_name", "position"],
        )
        for depth, count in enumerate(stats.accepted):
            by_depth.add_metric([self._model, str(depth)], count)
        yield by_depth
