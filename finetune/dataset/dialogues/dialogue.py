"""From a template to an example: slots filled, tools offered, the calls made by really running them, the answer said.

Drawn from (seed, template, augmentation) alone, so an example does not depend on how many others are made. A drawing in
which a tool refuses where it should not (or answers where it should refuse) is drawn again.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from finetune.dataset.dialogues.augment import AUGMENTATIONS, WRITTEN_NUMBERS
from finetune.dataset.dialogues.difficulty import difficulty
from finetune.dataset.dialogues.drawing import Dice, Drawer, NoValueError, Pool, Slots
from finetune.dataset.dialogues.examples import Dialogue
from finetune.dataset.dialogues.renaming import ShownTool, renamed
from finetune.dataset.dialogues.subjects import Step, Subject
from finetune.dataset.dialogues.templates import Template
from finetune.dataset.dialogues.thinking import before_answer, before_call
from finetune.dataset.dialogues.tool import Tool, run_tool
from finetune.dataset.dialogues.toolbox import SEEN, TOOLS
from finetune.dataset.dialogues.wording import SLOT, capitalized, expand, fill
from finetune.dataset.errors import DialogueError

MAX_TRIES = 60
MAX_OFFERED = 4
_NUM_OFFERED = (1, 2, 2, 3, 3, 3, 4, 4)
SYSTEM_SHARE = 0.25
RENAMED_IN_EXAMPLE = 0.75
NO_TOOLS_SHARE = 0.1
"""Of the questions that are nobody's tool's business: asked with no tools offered at all, as ordinary chat is."""
_SYSTEMS = ("You are a helpful assistant.", "You help the people of <place>.", "Answer in one short sentence.",
            "You are the assistant of <place>. Use a tool only when it is needed.", "Be brief and exact.",
            "You work with <person>. Be friendly.")  # fmt: skip
_ERRORS = ("That did not work: {error}.", "I could not do that: {error}.", "The tool refused, because {error}.",
           "Sorry, {error}. Please check the request.", "There is no result: {error}.")  # fmt: skip


def make_dialogue(
    template: Template,
    augmentation: str,
    seed: int,
    *,
    thinking: bool,
    pool: Pool,
    renamed_share: float = 0.0,
    part: str | None = None,
) -> Dialogue | None:
    """`renamed_share`: of examples whose tools may have other names. `part`: what it is made for, if not what the
    template was. None: `pool` has no such values."""
    part = part or template.part
    dice = Dice(seed, part, template.id, augmentation)
    wording = AUGMENTATIONS[augmentation](template, dice)
    steps = template.subject.steps_for(template.request)
    is_written = augmentation in WRITTEN_NUMBERS
    for _ in range(MAX_TRIES):
        drawer = Drawer(dice, template.family.words, pool=pool, written=is_written)
        try:
            slots = template.subject.draw(drawer)
        except NoValueError:
            return None
        ran = _run(steps, slots, refused=template.kind == "tool_error")
        if ran is not None and (pool != "fresh" or _has_long_value(ran[0])):
            calls, contents = ran
            break
    else:
        if pool == "fresh":
            return None
        raise DialogueError(f"{template.id}: no filling of '{template.request}' runs through")
    request = capitalized(fill(wording, slots)) if augmentation != "casual" else fill(wording, slots)
    offered = _shown(_offered(template.subject, dice), part, renamed_share, dice)
    tools = [tool.signature() for tool in offered.values()]
    calls = [{"name": offered[one["name"]].name, "arguments": offered[one["name"]].shown(one["arguments"])}
             for one in calls]  # fmt: skip
    messages = [
        *_system(template, dice),
        {"role": "user", "content": request},
        *_called(calls, contents, offered, dice, thinking),
        _answer(template, slots, contents, dice, thinking),
    ]
    return Dialogue(
        id=f"{part}-{template.id}-{augmentation}" if part != template.part else f"{template.id}-{augmentation}",
        part=part,
        kind=template.kind,
        category=template.subject.category,
        family=template.family.name,
        template=template.id,
        template_text=template.text,
        subject=template.subject.key,
        augmentation=augmentation,
        difficulty=difficulty(template.subject, request, tools, calls),
        expected=calls,
        messages=messages,
        tools=tools,
        aliases={tool.name: tool.alias() for tool in offered.values() if tool.is_renamed},
    )


def _run(steps: Sequence[Step], slots: Slots, *, refused: bool) -> tuple[list[dict[str, Any]], list[str]] | None:
    """Calls and what the tools said; None when one of them refuses though it should not, or the other way round."""
    calls: list[dict[str, Any]] = []
    contents: list[str] = []
    results: list[Any] = []
    for step in steps:
        # In the schema's order, which is also the one that a constrained answer is held to.
        order = [name for name in TOOLS[step.tool].parameters["properties"] if name in step.arguments]
        arguments = {name: _value(step.arguments[name], slots, results) for name in order}
        content = run_tool(TOOLS[step.tool], arguments)
        answer = json.loads(content)
        if ("error" in answer) != refused:
            return None
        calls.append({"name": step.tool, "arguments": arguments})
        contents.append(content)
        results.append(answer.get("result"))
    return calls, contents


def _value(value: Any, slots: Slots, results: Sequence[Any]) -> Any:
    if isinstance(value, str):
        if found := SLOT.fullmatch(value):
            return slots[found[1]].value
        if value.startswith("#") and value[1:].isdigit():
            return results[int(value[1:]) - 1]
    return value


def _has_long_value(calls: Sequence[Mapping[str, Any]]) -> bool:
    """Something of the first call that the pool could reserve."""
    first = calls[0]["arguments"] if calls else {}
    return any(len(str(value)) >= 2 and not isinstance(value, bool) for value in first.values())


def _offered(subject: Subject, dice: Dice) -> list[Tool]:
    """The tools that it takes and others, in any order; half of the others are of the same kind."""
    wanted = sorted(subject.offered)
    if subject.reason == "own" and not wanted and dice.chance(NO_TOOLS_SHARE):
        return []
    count = max(len(wanted), dice.pick(_NUM_OFFERED))
    others = [name for name in SEEN if name not in wanted and name not in subject.not_offered]
    alike = [name for name in others if any(TOOLS[name].category == TOOLS[one].category for one in wanted)]
    chosen = list(wanted)
    while len(chosen) < min(count, MAX_OFFERED):
        rest = [name for name in (alike if alike and dice.chance(0.5) else others) if name not in chosen]
        chosen.append(dice.pick(rest))
    return [TOOLS[name] for name in dice.shuffled(chosen)]


def _shown(tools: Sequence[Tool], part: str, renamed_share: float, dice: Dice) -> dict[str, ShownTool]:
    """By the tool's own name. In a renamed example most tools have other names, in the part "renamed_tools" all."""
    held_out = part == "renamed_tools"
    some = dice.chance(renamed_share)
    found = {}
    for tool in tools:
        is_renamed = held_out or (some and dice.chance(RENAMED_IN_EXAMPLE))
        found[tool.name] = renamed(tool, dice, held_out=held_out) if is_renamed else ShownTool.plain(tool)
    return found


def _system(template: Template, dice: Dice) -> list[dict[str, Any]]:
    if not dice.chance(SYSTEM_SHARE):
        return []
    return [{"role": "system", "content": expand(dice.pick(_SYSTEMS), template.family.words, dice)}]


def _called(
    calls: Sequence[Mapping[str, Any]],
    contents: Sequence[str],
    offered: Mapping[str, ShownTool],
    dice: Dice,
    thinking: bool,
) -> list[dict[str, Any]]:
    purposes = {tool.name: tool.tool.purpose for tool in offered.values()}
    messages: list[dict[str, Any]] = []
    for number, (call, content) in enumerate(zip(calls, contents, strict=True)):
        id = f"call_{number}"
        arguments = json.dumps(call["arguments"], ensure_ascii=False)
        function = {"name": call["name"], "arguments": arguments}
        message: dict[str, Any] = {"role": "assistant", "content": None}
        if thinking:
            message["reasoning_content"] = before_call(call["name"], purposes[call["name"]], number, dice)
        message["tool_calls"] = [{"id": id, "type": "function", "function": function}]
        messages += [message, {"role": "tool", "tool_call_id": id, "content": content}]
    return messages


def _answer(template: Template, slots: Slots, contents: Sequence[str], dice: Dice, thinking: bool) -> dict[str, Any]:
    last = json.loads(contents[-1]) if contents else {}
    refused = "error" in last
    if refused:
        text = dice.pick(_ERRORS).replace("{error}", last["error"])
    else:
        said = dice.pick(template.subject.answers)
        text = SLOT.sub(lambda found: _said(found[1], slots, last), said)
    message = {"role": "assistant", "content": text}
    if thinking:
        message["reasoning_content"] = before_answer(template.subject, refused=refused, dice=dice)
    return message


def _said(name: str, slots: Slots, last: Mapping[str, Any]) -> str:
    if name != "result":
        slot = slots[name]
        return slot.text if isinstance(slot.value, str) else str(slot.value)
    return said_result(last["result"])


def said_result(result: Any) -> str:
    if isinstance(result, bool):
        return "yes" if result else "no"
    return ", ".join(map(str, result)) if isinstance(result, list) else str(result)
