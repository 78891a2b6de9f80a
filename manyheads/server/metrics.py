"""Prometheus gets vLLM's names and meanings under the prefix `manyheads_`, and what only speculation has.

Beside that stand the few that the endpoint picker of Kubernetes' Gateway API inference extension reads, by vLLM's own
names (its proposal 003, "Model Server Protocol"), so that it routes to us without a setting.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from manyheads.frontend.backend import Backend
from manyheads.request import EngineReady, FinishReason
from manyheads.server.drops import Drops

PREFIX, VLLM_PREFIX = "manyheads_", "vllm:"
_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
_WHOLE = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000)

_OF_EACH: tuple[tuple[type[GaugeMetricFamily | CounterMetricFamily], str, str, str], ...] = (
    (GaugeMetricFamily, "requests_running", "Requests in a replica's running batch", "num_running"),
    (GaugeMetricFamily, "requests_waiting", "Requests that wait to run at a replica", "num_waiting"),
    (CounterMetricFamily, "prompt_tokens", "Prompt tokens that a replica computed", "prompt_tokens"),
    (CounterMetricFamily, "generation_tokens", "Tokens that a replica generated", "generation_tokens"),
    (CounterMetricFamily, "prefix_cache_queries", "Prompt tokens looked up in a replica", "prefix_queries"),
    (CounterMetricFamily, "prefix_cache_hits", "Prompt tokens found in a replica", "prefix_hits"),
)
"""What is told of each of several engines."""


@dataclass
class SequenceTimer:
    """A timer remembers when the tokens of one sequence came (in seconds of `time.perf_counter`)."""

    num_prompt_tokens: int
    arrived: float = field(default_factory=time.perf_counter)
    first: float | None = None
    last: float = 0.0
    num_tokens: int = 0


class TokenGaps(Collector):
    """A histogram of seconds, of which many are alike: what comes with each token of each stream has to be cheap."""

    def __init__(self, name: str, text: str) -> None:
        self._name, self._text = name, text
        self._counts = [0] * (len(_PER_TOKEN) + 1)
        self._sum = 0.0

    def observe(self, seconds: float, count: int) -> None:
        """Count so many tokens that came so long after those before them."""
        self._counts[bisect_left(_PER_TOKEN, seconds)] += count
        self._sum += seconds * count

    def collect(self) -> Iterator[Metric]:
        """Make the metric, at a scrape."""
        bounds = [*(str(float(bound)) for bound in _PER_TOKEN), "+Inf"]
        buckets = list(zip(bounds, accumulate(self._counts), strict=True))
        yield HistogramMetricFamily(self._name, self._text, buckets=buckets, sum_value=self._sum)


class Metrics(Collector):
    """Metrics are what the server counts itself, and the engine's latest statistics, for `/metrics`."""

    def __init__(self, engine: Backend, ready: EngineReady) -> None:
        self.registry = CollectorRegistry()
        self._engine, self._ready = engine, ready
        self.registry.register(self)
        self.drops = Drops(self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(PREFIX + name, text, buckets=buckets, registry=self.registry)

        self._ttft = histogram("time_to_first_token_seconds", "Time to the first token", _FIRST_TOKEN)
        self._itl = TokenGaps(PREFIX + "inter_token_latency_seconds", "Time between tokens of a request")
        self.registry.register(self._itl)
        self._tpot = histogram("request_time_per_output_token_seconds", "Mean time per token after first", _PER_TOKEN)
        self._e2e = histogram("e2e_request_latency_seconds", "Time from arrival to last token", _WHOLE)
        self._prompt = histogram("request_prompt_tokens", "Prompt tokens of a request", _TOKENS)
        self._generation = histogram("request_generation_tokens", "Generated tokens of a request", _TOKENS)
        self._success = Counter(
            PREFIX + "request_success", "Finished sequences by reason", ["finished_reason"], registry=self.registry
        )
        for reason in ("stop", "length", "abort", "error"):
            self._success.labels(reason)
        self.rejected = Counter(
            PREFIX + "requests_rejected", "Requests refused as invalid or by the queue", registry=self.registry
        )

    def tokens(self, timer: SequenceTimer, count: int) -> None:
        """Count tokens that came now."""
        if not count:
            return
        now = time.perf_counter()
        timer.num_tokens += count
        if timer.first is None:
            timer.first = now
            self._ttft.observe(now - timer.arrived)
            count -= 1
            gap = 0.0  # tokens that came with the first one kept nobody waiting
        else:
            gap = (now - timer.last) / count
        self._itl.observe(gap, count)
        timer.last = now

    def finish(self, timer: SequenceTimer, reason: FinishReason) -> None:
        """Count a sequence that has ended."""
        self._success.labels(reason).inc()
        self._e2e.observe(time.perf_counter() - timer.arrived)
        self._prompt.observe(timer.num_prompt_tokens)
        self._generation.observe(timer.num_tokens)
        if timer.first is not None and timer.num_tokens > 1:
            self._tpot.observe((timer.last - timer.first) / (timer.num_tokens - 1))

    def render(self) -> bytes:
        """Write everything in Prometheus' text format."""
        return generate_latest(self.registry)

    def collect(self) -> Iterator[Metric]:
        """Make the metrics of the engine's latest statistics, at a scrape."""
        engine, s = self._engine, self._engine.stats
        used = (s.num_pages - s.num_free_pages) / s.num_pages if s.num_pages else 0.0
        load = (
            ("num_requests_running", "Requests in the running batch", s.num_running),
            ("num_requests_waiting", "Requests that wait to run", s.num_waiting),
            ("kv_cache_usage_perc", "Share of K/V cache pages in use; 1 is all", used),
        )
        for name, text, value in load:
            yield GaugeMetricFamily(VLLM_PREFIX + name, text, value=value)
        cache = {"block_size": str(self._ready.page_size), "num_gpu_blocks": str(self._ready.num_pages)}
        info = GaugeMetricFamily(VLLM_PREFIX + "cache_config_info", "Pages of the K/V cache", labels=list(cache))
        info.add_metric(list(cache.values()), 1)
        yield info
        for name, text, value in (
            *load,
            ("queue_wait_seconds", "Time that a new client's request would wait if it came now", s.queue_wait),
            ("tokens_per_step", "Generated tokens by decoding row and step", s.generation_tokens / max(s.row_steps, 1)),
            ("tree_size", "Nodes per speculating row in the latest step", s.tree_size),
            ("kv_cache_tokens", "Tokens of context that the K/V cache holds", s.memory.kv_cache_tokens),
        ):
            yield GaugeMetricFamily(PREFIX + name, text, value=value)
        for name, text, count in (
            ("prompt_tokens", "Prompt tokens computed", s.prompt_tokens),
            ("generation_tokens", "Tokens generated", s.generation_tokens),
            ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache", s.prefix_queries),
            ("prefix_cache_hits", "Prompt tokens found in the prefix cache", s.prefix_hits),
            ("num_preemptions", "Requests set back for want of pages or for others' shares", s.preemptions),
            ("engine_steps", "Model steps", s.steps),
            ("decoding_row_steps", "Decoding rows, summed over steps", s.row_steps),
            ("compiled_while_serving", "Kernels compiled and graphs captured after the start", s.num_compiled),
            ("engine_restarts", "Engines that replaced one that died or hung", engine.num_restarts),
            ("requests_resumed", "Requests that went on in another engine", engine.num_resumed),
            ("spec_decode_num_draft_tokens", "Tree nodes verified, roots left out", s.drafted_tokens),
            ("spec_decode_num_accepted_tokens", "Tree nodes accepted, roots left out", s.accepted_tokens),
        ):
            yield CounterMetricFamily(PREFIX + name, text, value=count)
        drafted, accepted = s.drafted_by_depth, s.accepted_by_depth
        rates = [a / d if d else 0.0 for d, a in zip(drafted, accepted, strict=False)]
        drafters = {s.drafter: 1} if s.drafter is not None else {}
        memory = {kind: getattr(s.memory, kind) for kind in ("weights", "heads", "kv_cache", "graphs", "rest")}
        for family, name, text, values in (
            (CounterMetricFamily, "spec_decode_drafted_by_depth", "Rows whose tree reached this depth", drafted),
            (CounterMetricFamily, "spec_decode_accepted_by_depth", "Rows that accepted at this depth", accepted),
            (GaugeMetricFamily, "spec_decode_acceptance_rate", "Share of trees accepted to this depth", rates),
            (GaugeMetricFamily, "drafter_info", "What guesses tokens", drafters),
            (GaugeMetricFamily, "memory_bytes", "Memory of the engine's device by what it is taken for", memory),
        ):
            metric = family(PREFIX + name, text, labels=["kind" if isinstance(values, dict) else "depth"])
            for key, value in values.items() if isinstance(values, dict) else enumerate(values, 1):
                metric.add_metric([str(key)], value)
            yield metric
        if by_engine := engine.by_engine:
            for family, name, text, field in _OF_EACH:
                metric = family(f"{PREFIX}engine_{name}", text, labels=["engine"])
                for key, stats in by_engine.items():
                    metric.add_metric([key], getattr(stats, field))
                yield metric
