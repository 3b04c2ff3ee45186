"""Numbers of the trace log for /metrics: a snapshot that is read without waiting."""

from bisect import bisect_left
from dataclasses import dataclass

COMMIT_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
"""Upper bounds in seconds: from a fast NVMe's fsync to a lock that was waited for in vain."""


@dataclass(frozen=True, slots=True)
class CommitStats:
    num_traces: int
    bucket_counts: tuple[int, ...]
    """Transactions by COMMIT_BUCKETS, not cumulative; the last is above all bounds."""
    sum_seconds: float


@dataclass(frozen=True, slots=True)
class LogStats:
    num_queued: int
    num_dropped: int
    """Not written because the queue was full or the server stopped; must be 0 in durable mode."""
    num_failed: int
    """Not written in time, and whoever waited was told; they may be written later, as failed."""
    fault: str | None
    """Why nothing can be written now."""
    commits: CommitStats


class CommitClock:
    """Counts commits; one thread adds, any thread takes a snapshot."""

    def __init__(self) -> None:
        self._num_traces = 0
        self._counts = [0] * (len(COMMIT_BUCKETS) + 1)
        self._sum_seconds = 0.0

    def add(self, seconds: float, num_traces: int) -> None:
        self._counts[bisect_left(COMMIT_BUCKETS, seconds)] += 1
        self._sum_seconds += seconds
        self._num_traces += num_traces

    def snapshot(self) -> CommitStats:
        return CommitStats(self._num_traces, tuple(self._counts), self._sum_seconds)
