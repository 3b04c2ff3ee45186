"""What a request can be about: its wordings, how its slots are drawn, the calls it takes, and what is answered.

One subject per group of wordings of phrases.toml (a tool, or a tool with an argument that the wording says),
chains.toml, questions.toml, puzzles.py and the families' facts. A subject knows no family, example or split.
"""

import tomllib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, Literal

from finetune.dataset.dialogues.drawing import Drawer, Slots
from finetune.dataset.dialogues.puzzles import PUZZLES
from finetune.dataset.dialogues.scenarios import HERE, scenarios
from finetune.dataset.dialogues.slots import draw_refused, draw_slots, refusable
from finetune.dataset.dialogues.tool import Category
from finetune.dataset.dialogues.toolbox import TOOLS, UNIVERSAL
from finetune.dataset.dialogues.wording import capitalized, slot_names

Kind = Literal["tool_used", "no_tool", "tool_error", "multi_tool"]
KINDS: tuple[Kind, ...] = ("tool_used", "no_tool", "tool_error", "multi_tool")
Reason = Literal["call", "own", "unfit", "missing"]
"""Why a tool is called or not: an own answer, no tool that fits, an argument that is missing."""

FRAMES = (
    "{imperative}.",
    "Please {imperative}.",
    "Can you {imperative}?",
    "Could you {imperative} for me?",
    "I need you to {imperative}.",
    "I would like you to {imperative}.",
    "Help me {imperative}.",
    "Would you {imperative}, please?",
    "Your next task: {imperative}.",
)


@dataclass(frozen=True, slots=True)
class Step:
    """One call: arguments are values, "{slot}" or "#n", the result of step n."""

    tool: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Subject:
    key: str
    kind: Kind
    category: Category
    group: str
    """Subjects of a group share its part of the templates: a tool, or a kind of question."""
    wordings: Sequence[str]
    draw: Callable[[Drawer], Slots]
    answers: Sequence[str]
    reason: Reason
    steps: Sequence[Step] = ()
    """All arguments that a wording might name; `steps_for` leaves those it does not."""
    offered: frozenset[str] = frozenset()
    not_offered: frozenset[str] = frozenset()
    family: str | None = None
    purpose: str = field(default="")

    def steps_for(self, wording: str) -> list[Step]:
        named = slot_names(wording)
        return [
            Step(step.tool, {key: value for key, value in step.arguments.items() if slot_names(str(value)) <= named})
            for step in self.steps
        ]


@cache
def subjects() -> dict[Kind, list[Subject]]:
    found: dict[Kind, list[Subject]] = {kind: [] for kind in KINDS}
    for one in [*_of_tools(), *_chains(), *_questions(), *_puzzles(), *_facts()]:
        found[one.kind].append(one)
    return found


def _load(name: str) -> dict[str, Any]:
    return tomllib.loads((HERE / name).read_text("utf-8"))


def _of_tools() -> list[Subject]:
    """Each group of wordings three times: done, refused by the tool, and asked where no tool fits."""
    found = []
    refusals = _load("questions.toml")["refusals"]
    numbers: defaultdict[str, int] = defaultdict(int)
    for one in _load("phrases.toml")["tool"]:
        tool, fixed = TOOLS[one["name"]], one.get("fixed", {})
        key = f"{tool.name}.{numbers[tool.name]}"
        numbers[tool.name] += 1
        wordings = [frame.format(imperative=text) for text in one["do"] for frame in FRAMES]
        # Whole sentences are as likely as all the frames of the imperatives together.
        wordings = [capitalized(text) for text in wordings] + one["ask"] * (len(wordings) // len(one["ask"]))
        steps = [Step(tool.name, {**fixed, **{name: f"{{{name}}}" for name in _free(tool.name, fixed)}})]
        done = Subject(
            key=key, kind="tool_used", category=tool.category, group=tool.name, wordings=wordings,
            draw=partial(draw_slots, tool.name, fixed=fixed),
            answers=one["answers"], reason="call", steps=steps, offered=frozenset({tool.name}), purpose=tool.purpose,
        )  # fmt: skip
        found.append(done)
        refused = [wording for wording in wordings if refusable(tool.name, fixed, slot_names(wording))]
        if refused:
            found.append(
                Subject(
                    key=f"error:{key}",
                    kind="tool_error",
                    category="errors",
                    group=tool.name,
                    wordings=refused,
                    draw=partial(draw_refused, tool.name, fixed=fixed),
                    answers=(),
                    reason="call",
                    steps=steps,
                    offered=done.offered,
                    purpose=tool.purpose,
                )
            )
        found.append(
            Subject(
                key=f"unfit:{key}",
                kind="no_tool",
                category="reasoning",
                group="unfit",
                wordings=wordings,
                draw=done.draw,
                answers=[text.format(purpose=tool.purpose) for text in refusals],
                reason="unfit",
                # What is like it might do it in a clever way; then not calling would be wrong.
                not_offered=UNIVERSAL | {name for name, other in TOOLS.items() if other.category == tool.category},
                purpose=tool.purpose,
            )
        )
    return found


def _free(tool: str, fixed: Mapping[str, Any]) -> list[str]:
    return [name for name in TOOLS[tool].parameters["properties"] if name not in fixed]


def _chains() -> list[Subject]:
    found = []
    for number, one in enumerate(_load("chains.toml")["chain"]):
        steps = [Step(tool, arguments) for tool, arguments in one["steps"]]
        own = one.get("slots", {})
        found.append(
            Subject(
                key=f"chain.{number}",
                kind="multi_tool",
                category=TOOLS[steps[0].tool].category,
                group=f"chain.{number}",
                wordings=one["phrases"],
                draw=partial(_draw_chain, steps=steps, own=own),
                answers=one["answers"],
                reason="call",
                steps=steps,
                offered=frozenset(step.tool for step in steps),
                purpose=" and ".join(TOOLS[step.tool].purpose for step in steps),
            )
        )
    return found


def _draw_chain(drawer: Drawer, steps: Sequence[Step], own: Mapping[str, str]) -> Slots:
    slots: Slots = {}
    for step in steps:
        fixed = {key: value for key, value in step.arguments.items() if not slot_names(str(value))}
        for name, slot in draw_slots(step.tool, drawer, fixed).items():
            slots.setdefault(name, slot)
    for name, source in own.items():
        slots[name] = draw_slots(source, drawer, {})[source]
    return slots


def _questions() -> list[Subject]:
    content = _load("questions.toml")
    found = []
    for number, (tool, wordings, answer) in enumerate(content["concepts"]):
        found.append(_own(f"concept.{number}", "concept", wordings, answer, offered=frozenset({tool})))
    for number, (wordings, answer) in enumerate(content["chat"]):
        found.append(_own(f"chat.{number}", "chat", wordings, answer))
    for number, (name, wordings, answer) in enumerate(content["missing"]):
        found.append(
            Subject(
                key=f"missing.{number}",
                kind="no_tool",
                category="reasoning",
                group="missing",
                wordings=wordings,
                draw=partial(draw_slots, name, fixed={"operation": "multiply"}),
                answers=(answer,),
                reason="missing",
                offered=frozenset({name}),
                purpose=TOOLS[name].purpose,
            )
        )
    return found


def _puzzles() -> list[Subject]:
    return [
        Subject(
            key=f"puzzle.{puzzle.name}", kind="no_tool", category="reasoning", group="puzzle",
            wordings=puzzle.phrases, draw=puzzle.draw, answers=("{answer}",), reason="own",
        )
        for puzzle in PUZZLES
    ]  # fmt: skip


def _facts() -> list[Subject]:
    return [
        _own(f"fact.{family.name}.{number}", "fact", [question], answer, family=family.name)
        for family in scenarios().families.values()
        for number, (question, answer) in enumerate(family.facts)
    ]


def _own(
    key: str,
    group: str,
    wordings: Sequence[str],
    answer: str,
    *,
    offered: frozenset[str] = frozenset(),
    family: str | None = None,
) -> Subject:
    """A question with a fixed answer."""
    return Subject(
        key=key, kind="no_tool", category="reasoning", group=group, wordings=wordings, draw=lambda drawer: {},
        answers=(answer,), reason="own", offered=offered, family=family,
    )  # fmt: skip
