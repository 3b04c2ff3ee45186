"""Metrics that are read from the trace log and the adapters at each scrape, and a scrape that lets others run."""

import asyncio
from datetime import UTC, datetime

from server.adapters.follower import Failure
from server.adapters.residency import ResidencyStats
from server.adapters.service import ServiceStats
from server.adapters.states import State
from server.adapters.version import Version, VersionRef
from server.metrics import Metrics
from server.traces.log_stats import COMMIT_BUCKETS, CommitClock, LogStats
from tests.server import exposition


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return exposition.value(metrics, f"sterna_{name}", **labels)


def version(number: int, state: State) -> Version:
    return Version(
        ref=VersionRef("tools", number),
        state=state,
        digest=f"sha256:{number:064x}",
        base_digest="sha256:0",
        rank=8,
        size_bytes=1,
        memory_bytes=1,
        origin="test",
        parent=None,
        directory=f"tools/{number}",
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
        predecessor=None,
        state_change=number,
        is_pinned=False,
        is_deleted=False,
    )


def test_the_trace_log() -> None:
    clock = CommitClock()
    clock.add(0.002, 3)
    clock.add(0.002, 1)
    clock.add(60.0, 2)
    fault: str | None = None
    metrics = Metrics()
    metrics.watch_log(lambda: LogStats(5, 0, 2, fault, clock.snapshot()))
    assert value(metrics, "trace_queue") == 5
    assert value(metrics, "trace_log_broken") == 0
    assert value(metrics, "traces_committed_total") == 6
    assert value(metrics, "traces_failed_total") == 2
    assert value(metrics, "traces_dropped_total") == 0
    assert value(metrics, "trace_commit_seconds_bucket", le="0.001") == 0
    assert value(metrics, "trace_commit_seconds_bucket", le="0.0025") == 2
    assert value(metrics, "trace_commit_seconds_bucket", le=str(COMMIT_BUCKETS[-1])) == 2
    assert value(metrics, "trace_commit_seconds_bucket", le="+Inf") == 3
    assert value(metrics, "trace_commit_seconds_count") == 3
    assert value(metrics, "trace_commit_seconds_sum") == 60.004
    fault = "the file is gone"
    assert value(metrics, "trace_log_broken") == 1


def test_the_adapters() -> None:
    failure = Failure(VersionRef("tools", 2), "no room", 1, 0.0)
    versions = [version(1, State.LIVE), version(2, State.CANDIDATE), version(3, State.CANDIDATE)]
    metrics = Metrics()
    metrics.watch_adapters(
        lambda: ServiceStats(change=9, num_requests={}, num_poll_errors=4, failures=(failure,)),
        lambda: ResidencyStats(
            num_held=2, held_bytes=1000, num_leases=3, num_loads=5, num_failed_loads=1, num_evictions=2
        ),
        lambda: versions,
    )
    assert value(metrics, "adapter_registry_change") == 9
    assert value(metrics, "adapters_failing") == 1
    assert value(metrics, "adapter_poll_errors_total") == 4
    assert value(metrics, "adapter_versions_held") == 2
    assert value(metrics, "adapter_held_bytes") == 1000
    assert value(metrics, "adapter_leases") == 3
    assert value(metrics, "adapter_loads_total") == 5
    assert value(metrics, "adapter_load_errors_total") == 1
    assert value(metrics, "adapter_evictions_total") == 2
    assert value(metrics, "adapter_versions", state="candidate") == 2
    assert value(metrics, "adapter_versions", state="live") == 1
    assert value(metrics, "adapter_versions", state="rejected") == 0


def test_a_scrape_lets_others_run_and_says_what_a_rendering_says() -> None:
    metrics = Metrics()
    metrics.count_swap("switched", 0.2)
    turns = 0

    async def scrape() -> tuple[bytes, str]:
        task = asyncio.create_task(metrics.scrape())
        nonlocal turns
        while not task.done():
            turns += 1
            await asyncio.sleep(0)
        return task.result()

    text, content_type = asyncio.run(scrape())
    body, rendered_type = metrics.render()
    assert turns > 10  # about one a family
    assert content_type == rendered_type
    found = exposition.parse(text.decode())
    assert found.keys() == exposition.parse(body.decode()).keys()
    assert found["sterna_adapter_swap_seconds_count", frozenset({("outcome", "switched")})] == 1
