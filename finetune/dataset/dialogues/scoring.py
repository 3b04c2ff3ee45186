"""How well something answers a data set's turns: the numbers of the model card, for a model as for a baseline.

A responder gets a turn's request and gives an assistant message as the wire has it. Turns with an expected call count
towards right tools, right arguments (the structural match of finetune/gate/match.py) and well-formed calls; the first
turn of a request that needs no tool counts towards "no call"; turns after a tool's answer, where the dialogue ends,
towards "stops". Each part of the set has its own numbers, for its parts are different tests. Every turn is asked with
the right history, so that one wrong call does not spoil the next turn.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from finetune.dataset.dialogues.examples import Dialogue, Turn, turns
from finetune.gate.match import calls_match, names_match
from server.tools.well_formed import judge_calls

Message = Mapping[str, Any]
Responder = Callable[[Turn], Message]
RIGHT_TOOL, RIGHT_ARGUMENTS, WELL_FORMED, NO_CALL, STOPS = (
    "right_tool", "right_arguments", "well_formed", "no_call", "stops",
)  # fmt: skip
METRICS = (RIGHT_TOOL, RIGHT_ARGUMENTS, WELL_FORMED, NO_CALL, STOPS)


@dataclass(slots=True)
class Share:
    num_right: int = 0
    num: int = 0

    def add(self, is_right: bool) -> None:
        self.num_right += is_right
        self.num += 1

    @property
    def value(self) -> float | None:
        """None: there was nothing to judge."""
        return self.num_right / self.num if self.num else None


Scores = dict[str, dict[str, Share]]
"""By part (and by part and kind, "families/tool_error"), then by metric."""


def score(dialogues: Iterable[Dialogue], responder: Responder) -> Scores:
    found: defaultdict[str, dict[str, Share]] = defaultdict(lambda: {metric: Share() for metric in METRICS})
    for dialogue in dialogues:
        for turn in turns(dialogue):
            judged = judge(turn, responder(turn))
            for group in (dialogue.part, f"{dialogue.part}/{dialogue.kind}"):
                for metric, is_right in judged.items():
                    found[group][metric].add(is_right)
    return dict(found)


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


def body(scores: Scores) -> dict[str, dict[str, dict[str, float | int | None]]]:
    """As JSON has it."""
    return {
        group: {metric: {"share": share.value, "num": share.num} for metric, share in by_metric.items()}
        for group, by_metric in sorted(scores.items())
    }
