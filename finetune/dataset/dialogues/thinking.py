"""The thinking prefix: one or two short sentences before every call and every answer that say why.

Optional and universal: with it, every assistant turn has one. They name the purpose of the tool that is called, or why
none is; values are not repeated, the call itself has them.
"""

from finetune.dataset.dialogues.drawing import Dice
from finetune.dataset.dialogues.subjects import Subject

_CALL = ("I should {purpose}. The tool {tool} can do that.", "{tool} can {purpose}, so I call it.",
         "To answer I have to {purpose}, which {tool} does.")  # fmt: skip
_NEXT = ("Now I have to {purpose} with {tool}.", "The next step is {tool}.", "With that result I call {tool}.")
_AFTER = {
    "result": ("The result is there, so I can answer.", "The tool has answered. I pass the result on."),
    "error": ("The tool refused, so I say why.", "The call failed. I explain the reason and do not guess."),
}
_NO_CALL = {
    "own": ("No tool is needed, I can answer this myself.", "This takes no tool, only an answer."),
    "unfit": ("No tool that I have can {purpose}.", "I would have to {purpose}, and no offered tool does."),
    "missing": ("Something is missing for the call, so I ask.", "An argument is missing. I must not invent it."),
}


def before_call(tool: str, purpose: str, number: int, dice: Dice) -> str:
    """`tool`: as it is offered. `number`: of the call, from 0."""
    return dice.pick(_NEXT if number else _CALL).format(tool=tool, purpose=purpose)


def before_answer(subject: Subject, *, refused: bool, dice: Dice) -> str:
    if subject.reason != "call":
        return dice.pick(_NO_CALL[subject.reason]).format(purpose=subject.purpose)
    return dice.pick(_AFTER["error" if refused else "result"])
