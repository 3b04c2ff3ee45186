"""What the sidecar tells Prometheus: where each round is, how training goes, what gates and watches found.

Gauges show the present or last round of each adapter; counters begin at 0 with the process. Labels are bounded: the
adapters of the registry, and words of ours. Not here: the port (app.py).
"""

from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from finetune.dataset.filters import Drop
from finetune.gate.metrics import ALL
from finetune.rounds.gating import decision_of
from finetune.rounds.round import Phase, Result, Round
from finetune.rounds.watching import Watched


class SidecarMetrics:
    """An `Observer` of rounds; two of them can live in one process. Safe to use from several threads."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._phase = self._gauge("round_phase", "1: the adapter's round is in this phase.", "adapter", "phase")
        self._progress = self._gauge("round_progress_ratio", "Of the present phase, 0 to 1.", "adapter")
        self._rounds = self._counter("rounds", "Rounds that ended.", "result")
        self._gates = self._counter("gate", "Decisions of the gate.", "result")
        self._loss = self._gauge("train_loss", "Mean loss per unit of weight, of the last step.", "adapter")
        self._validation = self._gauge(
            "train_validation_loss", "Mean loss on the validation part, when last measured.", "adapter"
        )
        self._norm = self._gauge("train_grad_norm", "Before clipping, of the last step.", "adapter")
        self._rate = self._gauge("train_learning_rate", "Of the last step.", "adapter")
        self._speed = self._gauge("train_tokens_per_second", "Real tokens, of the last step.", "adapter")
        self._tokens = self._counter("train_tokens", "Real tokens trained on.", "adapter")
        self._paused = self._counter("train_paused_seconds", "Waited for serving.")
        self._examples = self._gauge(
            "examples", "Of the last snapshot: kept, or dropped for a reason.", "adapter", "part", "outcome"
        )
        self._scores = self._gauge(
            "held_out_score", "Of the last gate, by metric, of the candidate and of what was live.", "adapter",
            "metric", "side",
        )  # fmt: skip
        self._e_value = self._gauge("watch_e_value", "Evidence of harm; a rollback at 100.", "adapter", "version")
        self._episodes = self._gauge("watch_episodes", "Counted by the watch.", "adapter", "version", "arm")
        self._webhooks = self._counter("webhooks", "Attempts to tell one.", "outcome")
        for result in Result:
            self._rounds.labels(result)
        for word in ("promote", "reject", "not_enough_evidence"):
            self._gates.labels(word)

    def render(self) -> tuple[bytes, str]:
        return generate_latest(self._registry), CONTENT_TYPE_LATEST

    # -- of rounds ----------------------------------------------------------------------------------------------------

    def on_phase(self, round: Round) -> None:
        adapter = round.ref.adapter
        for phase in Phase:
            self._phase.labels(adapter, phase).set(round.result is None and round.phase is phase)
        self._progress.labels(adapter).set(0 if round.result is None else 1)
        if "snapshot" in round.facts:
            self._count_examples(adapter, round.facts["snapshot"])
        if round.result is not None:
            self._rounds.labels(round.result).inc()
        if round.decision is not None and (round.result is not None or round.phase is Phase.PROMOTE):
            self.show_decision(round)
        if round.decision is not None and round.result is not None:  # once, however often it had to be carried out
            self._gates.labels(round.decision["outcome"]).inc()

    def on_progress(self, round: Round, num_done: int, num_in_all: int, **values: float) -> None:
        adapter = round.ref.adapter
        self._progress.labels(adapter).set(num_done / max(num_in_all, 1))
        gauges = {"loss": self._loss, "grad_norm": self._norm, "learning_rate": self._rate}
        gauges |= {"tokens_per_second": self._speed, "validation_loss": self._validation}
        for name, gauge in gauges.items():
            if name in values:
                gauge.labels(adapter).set(values[name])
        self._tokens.labels(adapter).inc(values.get("num_tokens", 0))

    def show_decision(self, round: Round) -> None:
        """Also of the last round before this process began."""
        for row in decision_of(round).scores:
            if row.group == ALL:
                for side, estimate in (("candidate", row.candidate), ("live", row.opponent)):
                    if estimate.value is not None:
                        self._scores.labels(round.ref.adapter, row.metric, side).set(estimate.value)

    def _count_examples(self, adapter: str, facts: Mapping[str, Any]) -> None:
        for part, count in facts.get("kept", {}).items():
            self._examples.labels(adapter, part, "kept").set(count)
        for part, reasons in facts.get("dropped", {}).items():
            for reason in Drop:  # also those that the last snapshot had and this one has not
                self._examples.labels(adapter, part, reason).set(reasons.get(reason, 0))

    # -- of everything else -------------------------------------------------------------------------------------------

    def on_paused(self, seconds: float) -> None:
        self._paused.inc(seconds)

    def on_look(self, watched: Watched) -> None:
        adapter = watched.version.partition("@")[0]
        self._e_value.labels(adapter, watched.version).set(watched.e_value)
        for arm, count in zip(("old", "new"), watched.num_episodes, strict=True):
            self._episodes.labels(adapter, watched.version, arm).set(count)

    def on_delivery(self, outcome: str) -> None:
        self._webhooks.labels(outcome).inc()

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"sterna_{name}", text, labels, registry=self._registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"sterna_{name}", text, labels, registry=self._registry)
