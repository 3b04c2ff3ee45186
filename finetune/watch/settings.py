"""What the watch tolerates, and what a canary must show: one frozen object, stored with the state.

A tolerance is the harm that is none: two versions are never alike to the last digit, and a test that runs for ever
finds every difference. A margin, wider, is what a canary must be shown to stay within. What the gate has measured is
allowed for (`settings_after`): a version that learned to call changes the call rate, and can fail calls that the base
never made.
"""

from dataclasses import dataclass, replace

from finetune.gate.decision import Decision
from finetune.gate.metrics import ALL, CALLED, NO_CALL

ERRORS_PER_CALL = 0.2
"""Of calls that the predecessor did not make: results that report an error, which are not the version's alone."""
MALFORMED_PER_CALL = 0.1
"""The rest of the gate's floor of 90 % well-formed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchSettings:
    false_rollback: float = 0.01
    """Chance that a version without harm is ever rolled back, over canary and live together."""
    false_promotion: float = 0.05
    """Chance that a canary with harm beyond any one margin is ever promoted."""
    call_rate_change: tuple[float, float] = (-0.05, 0.05)
    """Allowed change of the share of requests with tools that are answered with a call."""
    tool_errors: float = 0.01
    """Allowed rise per request; the next three likewise, the latency as a ratio."""
    retries: float = 0.02
    malformed: float = 0.01
    feedback: float = 0.02
    """Allowed fall of the mean score."""
    latency_ratio: float = 1.25
    margin_call_rate: float = 0.10
    """Beyond `call_rate_change`; the next three likewise beyond what is allowed, the latency times it."""
    margin_tool_errors: float = 0.05
    margin_retries: float = 0.05
    margin_malformed: float = 0.05
    margin_latency_ratio: float = 1.25


def settings_after(decision: Decision, settings: WatchSettings | None = None) -> WatchSettings:
    """Allow for what the gate measured, whatever the share of requests that need a call in live traffic."""
    settings = settings or WatchSettings()
    rows = {row.metric: row for row in decision.scores if row.group == ALL}
    called, silent = rows[CALLED].difference.value, rows[NO_CALL].difference.value
    assert called is not None, "a decision that looked at its traces has both strata"
    assert silent is not None
    low, high = settings.call_rate_change
    more_calls = max(called, -silent, 0.0)
    return replace(
        settings,
        call_rate_change=(max(low + min(called, -silent), -1.0), min(high + max(called, -silent), 1.0)),
        tool_errors=settings.tool_errors + ERRORS_PER_CALL * more_calls,
        malformed=settings.malformed + MALFORMED_PER_CALL * more_calls,
        # The base runs without low-rank matrices, and refuses in a sentence what a version answers with a call.
        latency_ratio=settings.latency_ratio * (1.0 if decision.has_live else 1.6),
    )
