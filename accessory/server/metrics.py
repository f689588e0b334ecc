"""What `/metrics` tells Prometheus. The meanings are those of vLLM's metrics of the same names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from accessory.engine.scheduler import Scheduler

# Upper bounds of the histograms, in seconds: from a step of a small model to an answer of thousands of tokens.
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The numbers of one server. Those of the scheduler are read when somebody asks."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        name, registry = "accessory:{}".format, self.registry
        self.first_token = Histogram(
            name("time_to_first_token_seconds"), "From a request to its first token", buckets=SECONDS, registry=registry
        )
        self.between = Histogram(
            name("time_per_output_token_seconds"), "Between two tokens of an answer", buckets=SECONDS, registry=registry
        )
        self.whole = Histogram(
            name("e2e_request_latency_seconds"), "From a request to its end", buckets=SECONDS, registry=registry
        )
        self.ended = Counter(
            name("request_success"), "Requests that ended, by the reason", ["finished_reason"], registry=registry
        )
        self.errors = Counter(name("request_errors"), "Requests refused or failed", ["status"], registry=registry)

    def watch(self, scheduler: Scheduler) -> None:
        """Tell the scheduler's numbers too."""
        self.registry.register(_OfScheduler(scheduler))

    def grew(self, tokens: int, waited: float, *, first: bool) -> None:
        """An answer grew by so many tokens, `waited` seconds after its last one, or after the request."""
        if first:
            self.first_token.observe(waited)
        else:
            for _ in range(tokens):  # those that come at once share the time
                self.between.observe(waited / tokens)

    def finished(self, reason: str, seconds: float) -> None:
        """An answer ended, so long after its request."""
        self.ended.labels(reason).inc()
        self.whole.observe(seconds)


class _OfScheduler:
    """Prometheus calls `collect` when it is asked."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def collect(self) -> Iterator[Any]:
        scheduler = self._scheduler
        pool, counts = scheduler.pool, scheduler.counts
        held = pool.pages - 1 - pool.free
        gauges: dict[str, tuple[str, Callable[[], float]]] = {
            "num_requests_running": ("Requests that are computed", lambda: len(scheduler.running)),
            "num_requests_waiting": ("Requests that wait for their turn", lambda: len(scheduler.waiting)),
            "kv_cache_usage_perc": ("The part of the cache's pages in use, 0 to 1", lambda: held / (pool.pages - 1)),
        }
        for name, (about, value) in gauges.items():
            yield GaugeMetricFamily(f"accessory:{name}", about, value=value())
        for name, about, total in (
            ("prompt_tokens", "Tokens of prompts that began", counts.prompt_tokens),
            ("generation_tokens", "Tokens of answers", counts.drawn_tokens),
            ("prefix_cache_queries", "Tokens of prompts that were looked up in shared pages", counts.prompt_tokens),
            ("prefix_cache_hits", "Tokens of prompts that shared pages had computed", counts.cached_tokens),
            ("num_preemptions", "Times that a request lost its pages and was computed again", counts.put_back),
        ):
            yield CounterMetricFamily(f"accessory:{name}", about, value=total)
