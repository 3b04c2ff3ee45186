"""Prometheus metrics of one server: its own registry, no process-wide state, names as vLLM's with a `sterna_` prefix.

    metrics.watch_engine(engine.stats)                   # snapshots, read at each scrape
    meter = metrics.start_request("chat", "tools@7", purpose="user")
    meter.on_output(num_tokens, choice)                  # for every EngineOutput with tokens
    meter.finish("stop", num_prompt_tokens=12)           # once; later calls do nothing
    body, content_type = await metrics.scrape()          # GET /metrics

The first argument is the label `model`: the version that answered, or the base's served name (metrics_versions.py keeps
it bounded). What has purpose `evaluation` is left out of all that is counted by model: it goes into
`sterna_evaluation_requests_total` and nowhere else. But for `count_tool_outcome`, which any thread may call, everything
here is called on the event loop, and nothing waits.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Protocol

from prometheus_client.core import Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from server.adapters.router import Arm
from server.metrics_collectors import AdapterCollector, EngineCollector, LogCollector
from server.metrics_families import (
    Endpoint,
    Families,
    RequestOutcome,
    ShadowOutcome,
    SwapOutcome,
    UnloggedReason,
)
from server.metrics_versions import MAX_VERSIONS
from server.traces.record import Purpose

if TYPE_CHECKING:  # snapshots of parts that `sterna generate` does not load
    from server.adapters.residency import ResidencyStats
    from server.adapters.service import ServiceStats
    from server.adapters.version import Version
    from server.engine.stats import EngineStats
    from server.traces.feedback import Source
    from server.traces.log_stats import LogStats

__all__ = ["Endpoint", "Metrics", "RequestMetrics", "RequestOutcome", "ShadowOutcome", "SwapOutcome", "UnloggedReason"]


class RequestMetrics(Protocol):
    """The clock of one generation."""

    def on_output(self, num_tokens: int, choice: int = 0) -> None:
        """Tokens came out: the first of the request is its time to first token, a choice's next ones are gaps."""

    def finish(self, reason: RequestOutcome, *, num_prompt_tokens: int) -> None:
        """The generation ended. Only the first call counts, so that a `finally` may call it too."""


class Metrics:
    """The metric objects of one server. Two of them can live in one process."""

    def __init__(self, *, max_versions: int = MAX_VERSIONS) -> None:
        """`max_versions`: values of the label `model` at once."""
        self._families = Families(max_versions)

    # -- read at a scrape ---------------------------------------------------------------------------------------------

    def watch_engine(self, stats: "Callable[[], EngineStats]") -> None:
        """From now on each scrape reads one snapshot. Never called (a backend elsewhere): no engine metrics."""
        self._families.registry.register(EngineCollector(stats))

    def watch_log(self, stats: "Callable[[], LogStats]") -> None:
        self._families.registry.register(LogCollector(stats))

    def watch_adapters(
        self,
        service: "Callable[[], ServiceStats]",
        residency: "Callable[[], ResidencyStats]",
        versions: "Callable[[], Iterable[Version]] | None" = None,
    ) -> None:
        """`versions`: all that are not deleted, to be counted by state. None: they are not counted."""
        self._families.registry.register(AdapterCollector(service, residency, versions))

    async def scrape(self) -> tuple[bytes, str]:
        """The exposition text and its content type.

        Lets others run between two families: with MAX_VERSIONS all of it takes 50 ms, which every stream would notice.
        """
        pieces = []
        for family in self._families.registry.collect():
            pieces.append(generate_latest(_Collected(family)))
            await asyncio.sleep(0)
        return b"".join(pieces), CONTENT_TYPE_LATEST

    def render(self) -> tuple[bytes, str]:
        """The same, at once."""
        return generate_latest(self._families.registry), CONTENT_TYPE_LATEST

    # -- requests -----------------------------------------------------------------------------------------------------

    def start_request(
        self, endpoint: Endpoint, model: str, *, now: float | None = None, purpose: Purpose = "user"
    ) -> RequestMetrics:
        """`now`: time.perf_counter() of the request's arrival, if that was earlier."""
        if purpose == "evaluation":
            return _Evaluation(self._families, endpoint, model)
        return _Request(self._families, endpoint, model, time.perf_counter() if now is None else now)

    def count_route(self, model: str, arm: Arm, *, purpose: Purpose = "user") -> None:
        if purpose == "user":
            self._families.versions.child(self._families.routed, model, arm.value).inc()

    def count_answer(
        self, model: str, offered_tools: bool, num_calls: int, num_malformed: int, *, purpose: Purpose = "user"
    ) -> None:
        """One choice of a chat. The numbers are those of server/tools/well_formed.py: malformed ones are calls too."""
        if purpose == "evaluation" or not offered_tools:
            return
        families, child = self._families, self._families.versions.child
        child(families.answers_offered, model).inc()
        if num_calls:
            child(families.answers_called, model).inc()
            child(families.tool_calls, model, "well_formed").inc(num_calls - num_malformed)
            child(families.tool_calls, model, "malformed").inc(num_malformed)

    def count_unlogged(self, reason: UnloggedReason) -> None:
        """Whoever said no first: the settings, then the key, then the request."""
        self._families.unlogged.labels(reason).inc()

    def count_response(self, endpoint: Endpoint, status: int) -> None:
        """`status` is the code that was sent; a client that left before any counts as 499."""
        self._families.responses.labels(endpoint, str(status)).inc()

    # -- what comes of them -------------------------------------------------------------------------------------------

    def count_tool_outcome(self, model: str, is_error: bool) -> None:
        """The first result of a call by `model` came back. Any thread may call."""
        families = self._families
        families.versions.child(families.tool_results, model, "error" if is_error else "ok").inc()

    def count_feedback(self, model: str, source: "Source", score: float | None) -> None:
        """Feedback that was new, on an answer of `model` of purpose user."""
        families, child = self._families, self._families.versions.child
        child(families.feedback, model, source).inc()
        if score is not None:
            child(families.scores, model, source).observe(score)

    def count_shadow(self, outcome: ShadowOutcome) -> None:
        """`dropped`: there were too many runs under way already."""
        self._families.shadows.labels(outcome).inc()

    def count_swap(self, outcome: SwapOutcome, seconds: float) -> None:
        self._families.swaps.labels(outcome).observe(seconds)


class _Collected:
    """One family as something to collect."""

    def __init__(self, family: Metric) -> None:
        self._family = family

    def collect(self) -> Iterator[Metric]:
        yield self._family


class _Request:
    """The label children are looked up once: `on_output` runs for every step."""

    def __init__(self, families: Families, endpoint: Endpoint, model: str, start: float) -> None:
        self._families: Families | None = families
        self._endpoint = endpoint
        self._model = model
        self._start = start
        self._last_output: dict[int, float] = {}  # by choice
        self._num_output_tokens = 0
        child = families.versions.child
        self._ttft = child(families.ttft, model)
        self._itl = child(families.itl, model)
        self._generation_tokens = child(families.generation_tokens, model)

    def on_output(self, num_tokens: int, choice: int = 0) -> None:
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
        families, self._families = self._families, None
        if families is None:
            return
        child, model = families.versions.child, self._model
        child(families.e2e, model).observe(time.perf_counter() - self._start)
        child(families.finished, model, self._endpoint, reason).inc()
        child(families.prompt_tokens, model).inc(num_prompt_tokens)
        child(families.prompt_sizes, model).observe(num_prompt_tokens)
        child(families.output_sizes, model).observe(self._num_output_tokens)


class _Evaluation:
    """Purpose evaluation: only that it happened."""

    def __init__(self, families: Families, endpoint: Endpoint, model: str) -> None:
        self._families: Families | None = families
        self._endpoint = endpoint
        self._model = model

    def on_output(self, num_tokens: int, choice: int = 0) -> None:
        """Counts nothing."""

    def finish(self, reason: RequestOutcome, *, num_prompt_tokens: int) -> None:
        families, self._families = self._families, None
        if families is not None:
            families.versions.child(families.evaluations, self._model, self._endpoint, reason).inc()
