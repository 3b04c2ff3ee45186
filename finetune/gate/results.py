"""The gate's data: one answer judged, the pair of answers to one held-out trace, the regression set's scores.

A label is *gold* when it was obtained independently of what was served: a known answer, a label of the random audit
share, a correction of a trace of that share that an auditor has looked at. Corrections and thumbs that users chose to
give depend on the answer that they saw, so they are reported apart; an unlabelled trace has nothing to be judged by and
cannot be made into a pair.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from finetune.gate.expected import Expected
from finetune.gate.match import calls_match, names_match
from server.tools.well_formed import judge_calls


class Label(StrEnum):
    KNOWN_ANSWER = "known_answer"
    AUDIT = "audit"
    AUDITED_CORRECTION = "audited_correction"
    CORRECTION = "correction"
    """Of a trace that nobody drew: somebody saw a fault in it."""
    THUMBS = "thumbs"


GOLD = frozenset({Label.KNOWN_ANSWER, Label.AUDIT, Label.AUDITED_CORRECTION})


def label_of(source: str, *, is_audit: bool, is_audited: bool = False) -> Label:
    """`source` of a feedback (server/traces/feedback.py), whether its trace is of the audit share, and whether an
    auditor has looked at it. Users correct what is wrong: their corrections of drawn traces that nobody else looked at
    are a choice of the served version's faults, which any other version would seem to mend."""
    match source:
        case "known_answer":
            return Label.KNOWN_ANSWER
        case "audit_sample":  # a client may say so of any trace; ours is the draw
            return Label.AUDIT if is_audit else Label.CORRECTION
        case "user_correction":
            return Label.AUDITED_CORRECTION if is_audit and is_audited else Label.CORRECTION
        case "thumbs":
            return Label.THUMBS
    raise ValueError(f"feedback has no source '{source}'")


@dataclass(frozen=True, slots=True)
class Judged:
    """One answer beside what was expected."""

    has_call: bool
    """Calls, or attempts at one left in the text."""
    is_right: bool
    """Exactly right; where no call was expected: there was none, and no attempt at one."""
    is_well_formed: bool
    """Called, and every call well-formed. Where no call was expected: nothing malformed."""
    is_right_tool: bool
    token_loss: float | None = None
    """Mean nats a token of the expected answer under this version. None: the label holds no text to score."""


def judge(
    message: Mapping[str, Any],
    expected: Expected,
    tools: Sequence[Mapping[str, Any]],
    *,
    token_loss: float | None = None,
) -> Judged:
    """`message`: the assistant message as the server sent it. `tools`: the request's."""
    form = judge_calls(message, tools)
    calls = message.get("tool_calls") or ()
    is_sound = form.num_malformed == 0
    if not expected:
        is_silent = form.num_calls == 0
        return Judged(not is_silent, is_silent, is_sound, is_silent, token_loss)
    return Judged(
        has_call=form.num_calls > 0,
        is_right=is_sound and calls_match(calls, expected, tools),
        is_well_formed=is_sound and form.num_calls > 0,
        is_right_tool=names_match(calls, expected),
        token_loss=token_loss,
    )


class HeldOut(Protocol):
    """What is known of a held-out trace before anybody has answered it again."""

    @property
    def cluster(self) -> str: ...
    @property
    def position(self) -> int: ...
    @property
    def expects_call(self) -> bool: ...
    @property
    def is_gold(self) -> bool: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedTrace:
    """One held-out trace, answered by the candidate and by its opponent."""

    trace_id: str
    cluster: str
    """Of its episode: traces whose answers are not independent, or whose questions are equal, share one."""
    position: int
    """Of the trace in the log's order (its sequence number): tells what is newer than the last decision."""
    label: Label
    expects_call: bool
    is_seen: bool
    """The tools that it is about (expected, or offered where no call is) all occur in the candidate's training data."""
    candidate: Judged
    opponent: Judged

    @property
    def is_gold(self) -> bool:
        return self.label in GOLD


@dataclass(frozen=True, slots=True)
class RegressionScore:
    """One version on the general prompts."""

    perplexity: float
    format_share: float
    """Of the prompts whose answer has the form that was asked for."""
    num_prompts: int
