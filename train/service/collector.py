"""Figures of the training service for Prometheus, beside those of the server."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from stepjax.infer.serve.metrics import PREFIX
from stepjax.train.service.context import ServiceCounts


class ServiceCollector(Collector):
    """Reads what the service has counted, when it is asked."""

    def __init__(self, counts: ServiceCounts, gauges: Callable[[], Mapping[str, int]]):
        """
        Args:
          gauges: returns the numbers of ``sessions``, ``models``, ``adapters`` and ``requests_open``.
        """
        self._counts, self._gauges = counts, gauges

    def collect(self) -> Iterator[Metric]:
        counts, now = self._counts, self._gauges()
        gauges = {
            "train_sessions": ("Sessions that were heard of lately", now["sessions"]),
            "train_models": ("Models in memory", now["models"]),
            "train_adapters": ("Saved weights that are loaded for sampling", now["adapters"]),
            "train_requests_open": ("Requests without a result", now["requests_open"]),
            "train_loss": ("Loss a token of the last forward_backward call", counts.loss),
        }
        counters = {
            "train_tokens": ("Tokens of forward_backward calls", counts.tokens),
            "train_steps": ("Steps of optimisers", counts.steps),
            "train_samples": ("Answers to sample requests", counts.samples),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"{PREFIX}:{name}", text, value=value)
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(f"{PREFIX}:{name}", text, value=value)
