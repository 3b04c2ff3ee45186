"""The metric families that are counted request by request: names, help texts, labels and buckets, in one place.

Those with the label `model` are reached through `versions`, which bounds its values. Every other label's values come
from a fixed list. Not here: when something is counted (metrics.py), and what other parts count (metrics_collectors.py).
"""

from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, Summary

from server.metrics_versions import Family, VersionLabels

Endpoint = Literal[
    "chat", "completions", "tokenize", "detokenize", "models", "traces", "episodes", "feedback", "adapters",
    "health", "metrics", "other",
]  # fmt: skip
RequestOutcome = Literal["stop", "length", "tool_calls", "cancelled", "error"]
UnloggedReason = Literal["request", "key", "settings"]
ShadowOutcome = Literal["done", "failed", "dropped"]
SwapOutcome = Literal["switched", "failed"]

# Seconds. From one decode step of a small model on a fast core to a long prompt on a slow one.
_TTFT_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_ITL_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_E2E_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_SWAP_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_TOKEN_BUCKETS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)

_TOOL_CALLS_TEXT = (
    "Tool calls in answers. well_formed: the tool was offered, and the arguments are a JSON object with all required "
    "keys (types are not checked). malformed: the others, and calls left unparsed in the text."
)


class Families:
    """`registry` also holds the process's own metrics."""

    def __init__(self, max_versions: int) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._generation()
        self._learning()
        self._whole_server()
        self.versions = VersionLabels(self._from_zero(), max_versions=max_versions)

    def _generation(self) -> None:
        reasons = ("model", "endpoint", "finished_reason")
        self.finished = self._counter("request_success", "Generations ended.", *reasons)
        self.evaluations = self._counter("evaluation_requests", "Generations of purpose evaluation.", *reasons)
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of ended requests.", "model")
        self.generation_tokens = self._counter("generation_tokens", "Tokens generated.", "model")
        self.ttft = self._histogram("time_to_first_token_seconds", "From request to first token.", _TTFT_BUCKETS)
        self.itl = self._histogram("inter_token_latency_seconds", "Between two outputs of one choice.", _ITL_BUCKETS)
        self.e2e = self._histogram("e2e_request_latency_seconds", "From request to last token.", _E2E_BUCKETS)
        self.prompt_sizes = self._histogram("request_prompt_tokens", "Prompt tokens of a request.", _TOKEN_BUCKETS)
        self.output_sizes = self._histogram(
            "request_generation_tokens", "Tokens generated for a request.", _TOKEN_BUCKETS
        )

    def _learning(self) -> None:
        self.routed = self._counter("routed_requests", "Requests by why this version answers.", "model", "arm")
        self.answers_offered = self._counter("answers_with_tools_offered", "Chat answers that could call.", "model")
        self.answers_called = self._counter("answers_with_tool_calls", "Of these, those with a call.", "model")
        self.tool_calls = self._counter("tool_calls", _TOOL_CALLS_TEXT, "model", "form")
        self.tool_results = self._counter("tool_results", "Results of tool calls that came back.", "model", "outcome")
        self.feedback = self._counter("feedback", "Feedback taken, with or without a score.", "model", "source")
        self.scores = Summary(
            "sterna_feedback_score", "Scores of feedback, 0 to 1.", ("model", "source"), registry=self.registry
        )

    def _whole_server(self) -> None:
        self.responses = self._counter("http_responses", "HTTP requests answered.", "endpoint", "status")
        self.unlogged = self._counter("traces_not_logged", "Answers not logged, by whose wish.", "reason")
        self.shadows = self._counter("shadow_runs", "Runs of a shadow version.", "outcome")
        self.swaps = self._histogram("adapter_swap_seconds", "From a change to its route.", _SWAP_BUCKETS, "outcome")
        for family, values in (
            (self.unlogged, UnloggedReason),
            (self.shadows, ShadowOutcome),
            (self.swaps, SwapOutcome),
        ):
            for value in get_args(values):
                family.labels(value)

    def _from_zero(self) -> list[tuple[Family, tuple[str, ...]]]:
        """A rate over a counter that is not there yet misses its first increment, which for a rare one is all."""
        alone: list[Family] = [
            *(self.prompt_tokens, self.generation_tokens, self.answers_offered, self.answers_called),
            *(self.ttft, self.itl, self.e2e, self.prompt_sizes, self.output_sizes),
        ]
        return [
            *((family, ()) for family in alone),
            *((self.tool_calls, (form,)) for form in ("well_formed", "malformed")),
            *((self.tool_results, (outcome,)) for outcome in ("ok", "error")),
        ]

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"sterna_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], label: str = "model") -> Histogram:
        return Histogram(f"sterna_{name}", text, (label,), buckets=buckets, registry=self.registry)
