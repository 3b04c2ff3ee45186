"""Base templates: a subject's wording in a family's world, chosen so that no two are alike once slots are masked.

Which template comes next is drawn from the seed; one that is too near to an earlier one of any split is drawn again, so
that nothing held out resembles what is trained on. Kinds have exact shares; within a kind tools (or kinds of question)
and families take turns.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from finetune.dataset.dialogues.distinct import DistinctSets
from finetune.dataset.dialogues.drawing import Dice
from finetune.dataset.dialogues.scenarios import Family, Split, scenarios
from finetune.dataset.dialogues.subjects import KINDS, Kind, Subject, subjects
from finetune.dataset.dialogues.toolbox import SEEN, UNSEEN
from finetune.dataset.dialogues.wording import expand, masked_tokens
from finetune.dataset.errors import DialogueError

SHARES: Mapping[Kind, float] = {"tool_used": 0.40, "no_tool": 0.35, "tool_error": 0.15, "multi_tool": 0.10}
QUESTION_SHARES = {"puzzle": 0.34, "unfit": 0.20, "concept": 0.16, "fact": 0.14, "missing": 0.10, "chat": 0.06}
"""Of the requests that need no tool."""
THRESHOLD = 0.8
"""Of the Jaccard index of two templates' words: below it they are distinct."""
MAX_TRIES = 400
"""In a row for one template. In a set of 6,000 the worst one needs about a tenth of that."""
BARE_SHARE, TAIL_SHARE = 0.15, 0.35
Part = Literal["train", "validation", "families", "unseen_tools", "renamed_tools"]


@dataclass(frozen=True, slots=True)
class Template:
    id: str
    part: Part
    family: Family
    subject: Subject
    scene: str
    """Before the request; may be empty, as may be the tail."""
    request: str
    tail: str

    @property
    def kind(self) -> Kind:
        return self.subject.kind

    @property
    def text(self) -> str:
        return " ".join(part for part in (self.scene, self.request, self.tail) if part)


def make_templates(counts: Mapping[Part, int], seed: int) -> Iterator[Template]:
    """`counts` of each part, in its order: what comes later keeps its distance from what came before."""
    known = DistinctSets(THRESHOLD)
    splits: Mapping[Part, Split] = {
        "train": "train", "validation": "validation", "families": "held_out", "unseen_tools": "held_out",
        "renamed_tools": "held_out",
    }  # fmt: skip
    for part, count in counts.items():
        families = scenarios().of(splits[part])
        for number, kind, group in _plan(part, count):
            dice = Dice(seed, part, number)
            family = families[number % len(families)]
            yield _distinct(f"{part}-{number:05}", part, family, _by_group()[kind, group], known, dice)


def _plan(part: Part, count: int) -> Iterator[tuple[int, Kind, str]]:
    """(number, kind, group) of each template. Kinds are mixed, so that the first thousand are like the last."""
    only_calls = part in ("unseen_tools", "renamed_tools")
    kinds = {"tool_used": 1.0} if only_calls else {str(kind): share for kind, share in SHARES.items()}
    turns = dict.fromkeys(KINDS, 0)
    for number, name in enumerate(mixed(kinds, count)):
        kind = next(kind for kind in KINDS if kind == name)
        yield number, kind, _group(part, kind, turns[kind])
        turns[kind] += 1


def mixed(shares: Mapping[str, float], count: int) -> list[str]:
    """`count` names, each as often as its share says (to the nearest whole), spread evenly."""
    due = dict.fromkeys(shares, 0.0)
    found = []
    for _ in range(count):
        for name, share in shares.items():
            due[name] += share
        chosen = max(due, key=lambda name: due[name])
        due[chosen] -= 1
        found.append(chosen)
    return found


def _group(part: Part, kind: Kind, turn: int) -> str:
    if kind == "no_tool":
        return _question_cycle()[turn % len(_question_cycle())]
    groups = _groups(kind, part == "unseen_tools")
    return groups[turn % len(groups)]


@cache
def _groups(kind: Kind, unseen: bool) -> list[str]:
    """In an order that mixes the categories, so that the first few templates have all of them."""
    tools = UNSEEN if unseen else SEEN
    groups = [group for one, group in _by_group() if one == kind and (group in tools or kind == "multi_tool")]
    return Dice("groups", kind).shuffled(groups)


@cache
def _question_cycle() -> list[str]:
    return mixed(QUESTION_SHARES, 100)


@cache
def _by_group() -> dict[tuple[Kind, str], list[Subject]]:
    found: dict[tuple[Kind, str], list[Subject]] = {}
    for kind, many in subjects().items():
        for one in many:
            # Training must not read what unseen tools are asked for, not even where nothing fits.
            if one.group != "unfit" or one.key.split(":")[1].split(".")[0] in SEEN:
                found.setdefault((kind, one.group), []).append(one)
    return found


def _distinct(
    id: str, part: Part, family: Family, among: Sequence[Subject], known: DistinctSets, dice: Dice
) -> Template:
    fitting = [subject for subject in among if subject.family in (None, family.name)]
    for _ in range(MAX_TRIES):
        template = _draw(id, part, family, dice.pick(fitting), dice)
        if known.add(masked_tokens(template.text)):
            return template
    raise DialogueError(
        f"there are no more distinct templates for {fitting[0].kind} requests of the group '{fitting[0].group}' in the "
        f"family '{family.name}' after {len(known)}; ask for fewer templates"
    )


def _draw(id: str, part: Part, family: Family, subject: Subject, dice: Dice) -> Template:
    is_bare = dice.chance(BARE_SHARE)
    scene = "" if is_bare else expand(dice.pick(family.scenes), family.words, dice)
    # An answer to nobody: "Thank you" and "What is fog?" are not for somebody's report.
    has_tail = subject.group not in ("chat", "fact", "concept") and not is_bare and dice.chance(TAIL_SHARE)
    tail = expand(dice.pick(scenarios().tails), family.words, dice) if has_tail else ""
    return Template(id, part, family, subject, scene, expand(dice.pick(subject.wordings), family.words, dice), tail)
