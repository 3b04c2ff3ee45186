"""The gate's decision: a pure function of the paired answers, the adapter's history and the settings.

In order: enough fresh gold clusters, or "not enough evidence" (nothing is looked at, so they stay fresh); the primary
test; only if it fails, the second route (lower token loss by cluster bootstrap, and accuracy not lower by more than
`max_accuracy_loss`); beside either of them the guards: absolute floors while there is no live version, relative margins
against it afterwards, both on the point estimates (why: docs/loop.md). Every number that was used is in the `Decision`,
which goes to JSON and back unchanged. Not here: how the answers were obtained, and what a promotion does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Generic

import numpy as np
from pydantic import TypeAdapter

from finetune.gate.bootstrap import BootstrapTest, bootstrap_improvement, resamples_for
from finetune.gate.guards import Guard, guards_of
from finetune.gate.metrics import Compared, compare
from finetune.gate.results import PairedTrace, RegressionScore
from finetune.gate.settings import GateSettings
from finetune.gate.spending import History, Trace
from finetune.gate.statistics import Pairs, PrimaryTest, balanced_weights, half_width, pairs_of, primary_test


class Outcome(StrEnum):
    PROMOTE = "promote"
    REJECT = "reject"
    NOT_ENOUGH_EVIDENCE = "not_enough_evidence"


@dataclass(frozen=True, slots=True)
class Level:
    """What this decision may spend."""

    decision: int
    """1 for the first; earlier ones that promoted or did not look are not counted."""
    primary: float
    second: float


@dataclass(frozen=True, slots=True)
class SecondRoute:
    loss: BootstrapTest
    num_traces: int
    """With a loss on both sides."""
    accuracy_difference: float
    lower_95: float
    """One-sided 95 % bound of the difference of balanced accuracy."""
    lower: float
    """The same at the level that this decision may spend, which is stricter; it decides."""
    is_passed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    outcome: Outcome
    reasons: tuple[str, ...]
    adapter: str
    candidate: str
    opponent: str
    """A version, or the base's name."""
    has_live: bool
    settings: GateSettings
    num_clusters: int
    """Fresh and gold."""
    num_call_clusters: int
    num_none_clusters: int
    num_traces: int
    num_stale_traces: int
    """Gold, but known to an earlier decision: left out."""
    num_other_traces: int
    """Not gold: reported apart."""
    level: Level | None = None
    primary: PrimaryTest | None = None
    second: SecondRoute | None = None
    guards: tuple[Guard, ...] = ()
    scores: tuple[Compared, ...] = ()
    regression_candidate: RegressionScore | None = None
    regression_opponent: RegressionScore | None = None
    clusters: tuple[str, ...] = ()
    """That were looked at, those without gold as well (a label may come later), and the newest trace among them: what
    the next decision must leave out."""
    newest_position: int = -1

    @property
    def is_tested(self) -> bool:
        return self.outcome is not Outcome.NOT_ENOUGH_EVIDENCE

    @property
    def is_promoted(self) -> bool:
        return self.outcome is Outcome.PROMOTE

    def to_json(self) -> str:
        return _ADAPTER.dump_json(self).decode()

    @staticmethod
    def from_json(text: str | bytes) -> "Decision":
        """Raises pydantic.ValidationError."""
        return _ADAPTER.validate_json(text)


_ADAPTER: TypeAdapter[Decision] = TypeAdapter(Decision)


@dataclass(frozen=True, slots=True)
class Evidence(Generic[Trace]):
    """What one decision may use of the traces that there are."""

    traces: Sequence[Trace]
    num_stale: int
    others: Sequence[Trace]
    num_clusters: int
    num_call_clusters: int
    num_none_clusters: int

    def missing(self, settings: GateSettings) -> tuple[str, ...]:
        """Why it is not enough; empty when it is."""
        wanted = [
            (self.num_clusters, settings.min_clusters, "fresh labelled episode clusters"),
            (self.num_call_clusters, settings.min_stratum_clusters, "of them with a trace that expects a call"),
            (self.num_none_clusters, settings.min_stratum_clusters, "of them with a trace that expects none"),
        ]
        return tuple(f"{have} {what}, {need} are needed" for have, need, what in wanted if have < need)


def evidence_of(traces: Sequence[Trace], history: History) -> Evidence[Trace]:
    """Also before the traces are answered, to see whether it is worth the while."""
    gold = [trace for trace in traces if trace.is_gold]
    fresh = history.fresh(gold)
    of_stratum = [{t.cluster for t in fresh if t.expects_call is expects} for expects in (True, False)]
    others = [trace for trace in traces if not trace.is_gold]
    num_clusters = len(of_stratum[0] | of_stratum[1])
    return Evidence(fresh, len(gold) - len(fresh), others, num_clusters, len(of_stratum[0]), len(of_stratum[1]))


def decide(
    traces: Sequence[PairedTrace],
    *,
    adapter: str,
    candidate: str,
    opponent: str,
    has_live: bool,
    history: History,
    regression: tuple[RegressionScore, RegressionScore] | None = None,
    settings: GateSettings | None = None,
) -> Decision:
    """`regression`: of the candidate and of its opponent. Without a live version the opponent is the base."""
    settings = settings or GateSettings()
    evidence = evidence_of(traces, history)
    common: dict[str, Any] = {
        "adapter": adapter,
        "candidate": candidate,
        "opponent": opponent,
        "has_live": has_live,
        "settings": settings,
        "num_clusters": evidence.num_clusters,
        "num_call_clusters": evidence.num_call_clusters,
        "num_none_clusters": evidence.num_none_clusters,
        "num_traces": len(evidence.traces),
        "num_stale_traces": evidence.num_stale,
        "num_other_traces": len(evidence.others),
    }
    if missing := evidence.missing(settings):
        return Decision(outcome=Outcome.NOT_ENOUGH_EVIDENCE, reasons=missing, **common)
    spend = settings.budget_per_route * history.share_of_budget
    level = Level(history.num_unpromoted + 1, spend, spend)
    pairs = pairs_of(evidence.traces)
    primary = primary_test(pairs, level.primary)
    second = None if primary.is_passed else second_route(pairs, level.second, settings.max_accuracy_loss)
    scores = compare([*evidence.traces, *evidence.others])
    guards = guards_of(scores, regression, has_live, settings)
    is_shown = primary.is_passed or (second is not None and second.is_passed)
    is_promoted = is_shown and all(guard.is_kept for guard in guards if guard.is_binding)
    return Decision(
        outcome=Outcome.PROMOTE if is_promoted else Outcome.REJECT,
        reasons=_reasons(primary, second, guards, level, settings),
        level=level,
        primary=primary,
        second=second,
        guards=guards,
        scores=scores,
        regression_candidate=regression[0] if regression else None,
        regression_opponent=regression[1] if regression else None,
        clusters=tuple(sorted({trace.cluster for trace in traces})),
        newest_position=max(trace.position for trace in traces),
        **common,
    )


def second_route(pairs: Pairs, level: float, max_accuracy_loss: float) -> SecondRoute:
    """Both must hold at `level`, so promoting what lacks either of them has at most that chance."""
    weights = balanced_weights(pairs.expects_call)
    difference = float(weights @ pairs.right)
    below = [half_width(weights, pairs.clusters, pairs.right, pairs.expects_call, 1 - one) for one in (0.05, level)]
    lower_95, lower = (difference - half for half in below)
    is_scored = ~np.isnan(pairs.loss)
    num_scored = int(is_scored.sum())
    loss = BootstrapTest(0.0, 0.0, 1.0, 0)
    if num_scored:
        loss = bootstrap_improvement(
            pairs.loss[is_scored],
            np.full(num_scored, 1 / num_scored),
            np.unique(pairs.clusters[is_scored], return_inverse=True)[1],
            max_resamples=resamples_for(level),
        )
    is_passed = loss.p_value <= level and min(lower_95, lower) > -max_accuracy_loss
    return SecondRoute(loss, num_scored, difference, lower_95, lower, is_passed)


def _reasons(
    primary: PrimaryTest, second: SecondRoute | None, guards: Sequence[Guard], level: Level, settings: GateSettings
) -> tuple[str, ...]:
    points = 100 * primary.difference
    is_or_not = "is" if second is None else "is not"
    reasons = [f"balanced accuracy {points:+.1f} points: {is_or_not} shown, p {primary.p_value:.2g}"]
    reasons[0] += (
        f" against {level.primary:.2g} (decision {level.decision}), at least {100 * primary.lower:+.1f} points"
    )
    if second is not None:
        what = "passes" if second.is_passed else "fails"
        reasons.append(
            f"the second route {what}: token loss {-second.loss.mean:+.3f}, p {second.loss.p_value:.2g} against "
            f"{level.second:.2g}; accuracy at least {100 * second.lower:+.1f} points, "
            f"limit {-100 * settings.max_accuracy_loss:+.1f}"
        )
    for guard in guards:
        if guard.is_binding and not guard.is_kept:
            value = "was not measured" if guard.value is None else f"is {100 * guard.value:.1f} %"
            reasons.append(f"{guard.name} {value}, limit {100 * guard.limit:.1f} %")
    return tuple(reasons)
