"""What other parts of the server count themselves, read at scrape time: the engine, the trace log, the adapters.

Each collector calls a function that returns a snapshot at once and turns it into metric families. Totals are already
monotonic. Not here: what is counted request by request (metrics.py).
"""

from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from server.adapters.states import State
from server.engine.stats import BATCH_SIZE_BUCKETS, EngineStats
from server.traces.log_stats import COMMIT_BUCKETS, LogStats

if TYPE_CHECKING:
    from server.adapters.residency import ResidencyStats
    from server.adapters.service import ServiceStats
    from server.adapters.version import Version


class EngineCollector:
    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        total = stats.num_blocks_total
        yield from _gauges(
            ("num_requests_running", "Sequences in the running batch.", stats.num_running),
            ("num_requests_waiting", "Sequences that wait for a place.", stats.num_waiting),
            ("kv_cache_usage_perc", "Share of KV blocks in use, 1 is all.", stats.num_blocks_used / total),
            ("kv_cache_blocks", "KV blocks there are.", total),
            ("kv_cache_reusable_blocks", "KV blocks that the prefix cache holds.", stats.num_blocks_cached),
            ("num_loaded_adapters", "Adapter versions in the engine.", stats.num_adapters),
        )
        yield from _counters(
            ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", stats.prefix_query_tokens),
            ("prefix_cache_hits", "Prompt tokens found in the prefix cache.", stats.prefix_hit_tokens),
            ("spec_decode_num_drafts", "Steps of a sequence that carried guesses.", stats.num_drafts),
            ("spec_decode_num_draft_tokens", "Guessed tokens computed.", stats.draft_tokens),
            ("spec_decode_num_accepted_tokens", "Guessed tokens that were right.", stats.accepted_tokens),
            (
                "grammar_forced_tokens",
                "Tokens that a grammar forced, computed without a step of their own.",
                stats.forced_tokens,
            ),
            ("num_preemptions", "Sequences put back to be recomputed.", stats.num_preemptions),
            ("engine_steps", "Steps of the engine.", stats.num_steps),
            ("engine_step_seconds", "Time spent in steps.", stats.step_seconds),
            ("engine_step_errors", "Steps that failed.", stats.num_step_errors),
        )
        # The sum of sizes is not counted by the engine, and a histogram may leave it out.
        yield _histogram(
            "iteration_num_seqs", "Sequences in a step.", BATCH_SIZE_BUCKETS, stats.batch_size_counts, None
        )


class LogCollector:
    def __init__(self, stats: Callable[[], LogStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        yield from _gauges(
            ("trace_queue", "Traces that wait to be written.", stats.num_queued),
            ("trace_log_broken", "1: the database cannot be written now.", stats.fault is not None),
        )
        yield from _counters(
            ("traces_committed", "Traces that are in the log.", stats.commits.num_traces),
            ("traces_failed", "Traces not written in time, and their request was failed for it.", stats.num_failed),
            ("traces_dropped", "Traces lost: the queue was full, or the server stopped. Must be 0.", stats.num_dropped),
        )
        commits = stats.commits
        text = "Transactions of the trace log, from taking the traces to the commit."
        yield _histogram("trace_commit_seconds", text, COMMIT_BUCKETS, commits.bucket_counts, commits.sum_seconds)


class AdapterCollector:
    def __init__(
        self,
        service: "Callable[[], ServiceStats]",
        residency: "Callable[[], ResidencyStats]",
        versions: "Callable[[], Iterable[Version]] | None",
    ) -> None:
        self._service = service
        self._residency = residency
        self._versions = versions

    def collect(self) -> Iterator[Metric]:
        service, residency = self._service(), self._residency()
        yield from _gauges(
            ("adapter_registry_change", "Number of the registry's last change that was seen.", service.change),
            ("adapters_failing", "Adapters not served as the registry says.", len(service.failures)),
            ("adapter_versions_held", "Versions loading, loaded or not yet unloaded.", residency.num_held),
            ("adapter_held_bytes", "Memory of the held versions.", residency.held_bytes),
            ("adapter_leases", "Requests that hold a version.", residency.num_leases),
        )
        yield from _counters(
            ("adapter_poll_errors", "Looks at the registry that failed.", service.num_poll_errors),
            ("adapter_loads", "Versions loaded.", residency.num_loads),
            ("adapter_load_errors", "Versions that could not be loaded.", residency.num_failed_loads),
            ("adapter_evictions", "Idle versions unloaded to make room.", residency.num_evictions),
        )
        if self._versions is None:
            return
        by_state = Tally(version.state for version in self._versions())
        family = GaugeMetricFamily("sterna_adapter_versions", "Versions that were not deleted.", labels=["state"])
        for state in State:
            family.add_metric([state], by_state[state])
        yield family


def _gauges(*numbers: tuple[str, str, float]) -> Iterator[Metric]:
    for name, text, value in numbers:
        yield GaugeMetricFamily(f"sterna_{name}", text, value)


def _counters(*numbers: tuple[str, str, float]) -> Iterator[Metric]:
    for name, text, value in numbers:
        yield CounterMetricFamily(f"sterna_{name}", text, value)


def _histogram(
    name: str, text: str, bounds: Sequence[float], counts: Sequence[int], sum_value: float | None
) -> HistogramMetricFamily:
    """`counts`: one for each bound and one above all, not cumulative."""
    family = HistogramMetricFamily(f"sterna_{name}", text)
    labels = [*(str(float(bound)) for bound in bounds), "+Inf"]
    family.add_metric([], list(zip(labels, accumulate(counts), strict=True)), sum_value=sum_value)
    return family
