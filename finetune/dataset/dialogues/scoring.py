"""How well something answers a data set's turns: the numbers of the model card, for a model as for a baseline.

A responder gets a turn's request and gives an assistant message as the wire has it. Turns with an expected call count
towards right tools, right arguments (the structural match of finetune/gate/match.py) and well-formed calls; the first
turn of a request that needs no tool counts towards "no call"; turns after a tool's answer, where the dialogue ends,
towards "stops". Each part of the set has its own numbers, for its parts are different tests. Every turn is asked with
the right history, so that one wrong call does not spoil the next turn.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from finetune.dataset.dialogues.examples import Dialogue, Turn, turns
from finetune.dataset.order import shuffled
from finetune.gate.intervals import Estimate, share_of
from finetune.gate.match import calls_match, names_match
from server.tools.well_formed import judge_calls

Message = Mapping[str, Any]
Responder = Callable[[Turn], Message]
RIGHT_TOOL, RIGHT_ARGUMENTS, WELL_FORMED, NO_CALL, STOPS = (
    "right_tool", "right_arguments", "well_formed", "no_call", "stops",
)  # fmt: skip
METRICS = (RIGHT_TOOL, RIGHT_ARGUMENTS, WELL_FORMED, NO_CALL, STOPS)


MapTurns = Callable[[Responder, Iterable[Turn]], Iterable[Message]]


@dataclass(slots=True)
class Share:
    is_right: list[bool] = field(default_factory=list)
    clusters: list[str] = field(default_factory=list)
    """The template of each: five examples of one template tell less than five templates."""

    @property
    def num(self) -> int:
        return len(self.is_right)

    @property
    def value(self) -> float | None:
        """None: there was nothing to judge."""
        return sum(self.is_right) / self.num if self.num else None

    def estimate(self) -> Estimate:
        """With its 95 % interval, templates as clusters."""
        return share_of(np.array(self.is_right, bool), np.unique(self.clusters, return_inverse=True)[1])


Scores = dict[str, dict[str, Share]]
"""By part (and by part and kind, "families/tool_error"), then by metric."""


def score(dialogues: Sequence[Dialogue], responder: Responder, *, map_turns: MapTurns = map) -> Scores:
    """`map_turns`: asks several at once (an executor's `map`), answers in order."""
    asked = [(dialogue, turn) for dialogue in dialogues for turn in turns(dialogue)]
    found: defaultdict[str, dict[str, Share]] = defaultdict(lambda: {metric: Share() for metric in METRICS})
    answers = map_turns(responder, [turn for _, turn in asked])
    for (dialogue, turn), message in zip(asked, answers, strict=True):
        for metric, is_right in judge(turn, message).items():
            for group in (dialogue.part, f"{dialogue.part}/{dialogue.kind}"):
                found[group][metric].is_right.append(is_right)
                found[group][metric].clusters.append(dialogue.template)
    return dict(found)


def sample(dialogues: Iterable[Dialogue], limit: int | None) -> list[Dialogue]:
    """At most `limit` of each part, drawn by the digests of their ids; None: all."""
    by_part: defaultdict[str, list[Dialogue]] = defaultdict(list)
    for one in dialogues:
        by_part[one.part].append(one)
    found = []
    for many in by_part.values():
        order = shuffled([one.id for one in many], seed=0, epoch=0)
        found += [many[place] for place in sorted(order[:limit])]
    return found


def judge(turn: Turn, message: Message) -> dict[str, bool]:
    """What this turn counts towards, and whether the answer is right."""
    calls = message.get("tool_calls") or ()
    tools = turn.request["tools"]
    form = judge_calls(message, tools)
    if not turn.expected:
        asked_first = turn.request["messages"][-1]["role"] == "user"
        return {NO_CALL if asked_first else STOPS: form.num_calls == 0}
    return {
        RIGHT_TOOL: names_match(calls, turn.expected),
        RIGHT_ARGUMENTS: calls_match(calls, turn.expected, tools),
        WELL_FORMED: form.num_calls > 0 and form.num_malformed == 0,
    }


def body(scores: Scores) -> dict[str, dict[str, dict[str, Any]]]:
    """As JSON has it."""
    return {
        group: {metric: _estimate_body(share.estimate()) for metric, share in by_metric.items() if share.num}
        for group, by_metric in sorted(scores.items())
    }


def _estimate_body(one: Estimate) -> dict[str, Any]:
    return {
        "share": one.value,
        "lower": one.lower,
        "upper": one.upper,
        "num": one.num_traces,
        "num_templates": one.num_clusters,
    }
