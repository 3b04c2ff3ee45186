"""How hard an example is, in [0, 1], from what can be counted: the score that the curriculum goes by.

A weighted sum of four things, each scaled to [0, 1]: which decisions it takes (several calls, an error, noticing that
no tool fits or that an argument is missing), how many tools are offered, how many characters of argument values have
to be copied, and how long the request is. The weights are a choice, not a measurement: decisions count most.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from finetune.dataset.dialogues.subjects import Subject

_DECISION = {"own": 0.2, "call": 0.3, "unfit": 0.8, "missing": 0.9}
_MANY_CHARACTERS = 60
"""Of all argument values; nine of ten examples have fewer."""
_LONG_REQUEST = 220
_MAX_TOOLS = 4


def difficulty(
    subject: Subject, request: str, tools: Sequence[Mapping[str, Any]], calls: Sequence[Mapping[str, Any]]
) -> float:
    decision = _DECISION[subject.reason]
    if subject.kind == "tool_error":
        decision = 0.5
    if len(calls) > 1:
        decision = 0.7 if len(calls) == 2 else 1.0
    copied = sum(len(str(value)) for call in calls for value in call["arguments"].values())
    parts = (
        (0.40, decision),
        (0.20, (len(tools) - 1) / (_MAX_TOOLS - 1)),  # none is as easy as one
        (0.25, copied / _MANY_CHARACTERS),
        (0.15, len(request) / _LONG_REQUEST),
    )
    return round(sum(weight * min(1.0, max(0.0, value)) for weight, value in parts), 4)
