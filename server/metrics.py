"""Prometheus metrics of one server: its own registry, no process-wide state, names as vLLM's with a `sterna_` prefix.

How the HTTP layer uses it (all on the event loop's thread, none of it waits):

    metrics = Metrics()
    metrics.watch_engine(engine.stats)                   # once loaded; a callable that returns a snapshot at once
    request = metrics.start_request("chat", model_name)  # endpoint from a fixed list, model a served name
    request.on_output(num_tokens, choice)                # for every EngineOutput with tokens
    request.finish("stop", num_prompt_tokens=12)         # once; later calls do nothing
    metrics.count_response("chat", 200)                  # every answered HTTP request, errors too
    body, content_type = metrics.render()                # GET /metrics

Labels are bounded: endpoints, finish reasons and status codes come from the code, `model` only from names that are
being served. Numbers that the engine owns are read from one snapshot when a scrape comes.
"""

import time
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from server.engine.stats import BATCH_SIZE_BUCKETS, EngineStats

Endpoint = Literal["chat", "completions", "tokenize", "detokenize", "models", "health", "metrics", "other"]
RequestOutcome = Literal["stop", "length", "tool_calls", "cancelled", "error"]

# Seconds. From one decode step of a small model on a fast core to a long prompt on a slow one.
_TTFT_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_ITL_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_E2E_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TOKEN_BUCKETS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)


class Metrics:
    """The metric objects of one server. Two of them can live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"sterna_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"sterna_{name}", text, ("model",), buckets=buckets, registry=self.registry)

        self._responses = counter("http_responses", "HTTP requests answered.", "endpoint", "status")
        self._finished = counter("request_success", "Generations ended.", "endpoint", "model", "finished_reason")
        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens of ended requests.", "model")
        self._generation_tokens = counter("generation_tokens", "Tokens generated.", "model")
        self._ttft = histogram("time_to_first_token_seconds", "From request to first token.", _TTFT_BUCKETS)
        self._itl = histogram("inter_token_latency_seconds", "Between two outputs of one choice.", _ITL_BUCKETS)
        self._e2e = histogram("e2e_request_latency_seconds", "From request to last token.", _E2E_BUCKETS)
        self._prompt_sizes = histogram("request_prompt_tokens", "Prompt tokens of a request.", _TOKEN_BUCKETS)
        self._output_sizes = histogram("request_generation_tokens", "Tokens generated for a request.", _TOKEN_BUCKETS)

    def watch_engine(self, engine_stats: Callable[[], EngineStats]) -> None:
        """From now on each scrape reads one snapshot. Never called (a backend elsewhere): no engine metrics."""
        self.registry.register(_EngineCollector(engine_stats))

    def count_response(self, endpoint: Endpoint, status: int) -> None:
        """`status` is the code that was sent; a client that left before any counts as 499."""
        self._responses.labels(endpoint, str(status)).inc()

    def start_request(self, endpoint: Endpoint, model: str, *, now: float | None = None) -> "RequestMetrics":
        """`now`: time.perf_counter() of the request's arrival, if that was earlier."""
        return RequestMetrics(self, endpoint, model, time.perf_counter() if now is None else now)

    def render(self) -> tuple[bytes, str]:
        """The exposition text and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST


class RequestMetrics:
    """The clock of one generation. The label children are looked up once: `on_output` runs for every step."""

    def __init__(self, metrics: Metrics, endpoint: Endpoint, model: str, start: float) -> None:
        self._metrics: Metrics | None = metrics
        self._endpoint = endpoint
        self._model = model
        self._start = start
        self._last_output: dict[int, float] = {}  # by choice
        self._num_output_tokens = 0
        self._ttft = metrics._ttft.labels(model)
        self._itl = metrics._itl.labels(model)
        self._e2e = metrics._e2e.labels(model)
        self._generation_tokens = metrics._generation_tokens.labels(model)

    def on_output(self, num_tokens: int, choice: int = 0) -> None:
        """Tokens came out: the first of the request is its time to first token, a choice's next ones are gaps."""
        now = time.perf_counter()
        last = self._last_output.get(choice)
        if last is not None:
            self._itl.observe(now - last)
        elif not self._last_output:
            self._ttft.observe(now - self._start)
        self._last_output[choice] = now
        self._num_output_tokens += num_tokens
        self._generation_tokens.inc(num_tokens)

    def finish(self, reason: RequestOutcome, *, num_prompt_tokens: int) -> None:
        """The generation ended. Only the first call counts, so that a `finally` may call it too."""
        metrics, self._metrics = self._metrics, None
        if metrics is None:
            return
        self._e2e.observe(time.perf_counter() - self._start)
        metrics._finished.labels(self._endpoint, self._model, reason).inc()
        metrics._prompt_tokens.labels(self._model).inc(num_prompt_tokens)
        metrics._prompt_sizes.labels(self._model).observe(num_prompt_tokens)
        metrics._output_sizes.labels(self._model).observe(self._num_output_tokens)


class _EngineCollector:
    """Turns one engine snapshot into metric families at scrape time; totals are already monotonic."""

    def __init__(self, engine_stats: Callable[[], EngineStats]) -> None:
        self._engine_stats = engine_stats

    def collect(self) -> Iterator[Metric]:
        stats = self._engine_stats()
        total = stats.num_blocks_total
        gauges = (
            ("num_requests_running", "Sequences in the running batch.", stats.num_running),
            ("num_requests_waiting", "Sequences that wait for a place.", stats.num_waiting),
            ("kv_cache_usage_perc", "Share of KV blocks in use, 1 is all.", stats.num_blocks_used / total),
            ("kv_cache_blocks", "KV blocks there are.", total),
            ("kv_cache_reusable_blocks", "KV blocks that the prefix cache holds.", stats.num_blocks_cached),
            ("num_loaded_adapters", "Adapter versions in the engine.", stats.num_adapters),
        )
        counters = (
            ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", stats.prefix_query_tokens),
            ("prefix_cache_hits", "Prompt tokens found in the prefix cache.", stats.prefix_hit_tokens),
            ("num_preemptions", "Sequences put back to be recomputed.", stats.num_preemptions),
            ("engine_steps", "Steps of the engine.", stats.num_steps),
            ("engine_step_seconds", "Time spent in steps.", stats.step_seconds),
            ("engine_step_errors", "Steps that failed.", stats.num_step_errors),
        )
        for name, text, value in gauges:
            yield GaugeMetricFamily(f"sterna_{name}", text, value)
        for name, text, value in counters:
            yield CounterMetricFamily(f"sterna_{name}", text, value)
        yield _batch_size_histogram(stats)


def _batch_size_histogram(stats: EngineStats) -> Metric:
    family = HistogramMetricFamily("sterna_iteration_num_seqs", "Sequences in a step.")
    bounds = [*(str(float(bound)) for bound in BATCH_SIZE_BUCKETS), "+Inf"]
    # The sum of sizes is not counted by the engine, and a histogram may leave it out.
    family.add_metric([], list(zip(bounds, accumulate(stats.batch_size_counts), strict=True)), sum_value=None)
    return family
