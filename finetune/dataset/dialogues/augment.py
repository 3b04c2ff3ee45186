"""Five ways in which the same request is made: what people change without changing what they want.

The values of the slots, the offered tools and the system message are drawn anew for each as well (dialogue.py).
"""

import re
from collections.abc import Callable, Mapping

from finetune.dataset.dialogues.drawing import Dice
from finetune.dataset.dialogues.templates import Template
from finetune.dataset.dialogues.wording import outside_slots

_HELLO = ("Hello!", "Hi there.", "Good morning.", "Hi!", "Good evening.", "Hey there!", "Excuse me.")
_THANKS = ("Thank you!", "Thanks a lot.", "Many thanks.", "Thanks in advance.", "")
_FILLERS = (
    "Quick one.",
    "Okay, next thing.",
    "Sorry to bother you.",
    "One more thing.",
    "All right.",
    "Here is the next one.",
    "A short one.",
)
_ENDINGS = ("That is all.", "I would like to know.", "Can you help?", "Any help is welcome.", "I need it today.")
_SHORT = (("i am", "i'm"), ("what is", "what's"), ("do not", "don't"), ("cannot", "can't"), ("we are", "we're"),
          ("it is", "it's"), ("i would", "i'd"), ("could you", "can u"), ("please", "pls"))  # fmt: skip


def _plain(template: Template, dice: Dice) -> str:
    return template.text


def _polite(template: Template, dice: Dice) -> str:
    return _joined(dice.pick(_HELLO), template.text, dice.pick(_THANKS))


def _casual(template: Template, dice: Dice) -> str:
    """Typed in a hurry: no capitals, short forms, no full stop at the end."""
    short = dice.chance(0.6)

    def hurried(text: str) -> str:
        text = text.lower()
        for long, form in _SHORT if short else ():
            text = re.sub(rf"\b{long}\b", form, text)
        return text

    return outside_slots(template.text, hurried).rstrip(".")


def _reordered(template: Template, dice: Dice) -> str:
    if not template.scene:  # nothing to put elsewhere
        return _joined(template.request, dice.pick(_ENDINGS))
    return _joined(template.request, template.tail, template.scene)


def _chatty(template: Template, dice: Dice) -> str:
    return _joined(dice.pick(_FILLERS), template.text)


def _joined(*parts: str) -> str:
    return " ".join(part for part in parts if part)


AUGMENTATIONS: Mapping[str, Callable[[Template, Dice], str]] = {
    "plain": _plain,
    "polite": _polite,
    "casual": _casual,
    "reordered": _reordered,
    "chatty": _chatty,
}
WRITTEN_NUMBERS = frozenset({"chatty"})
"""Numbers as in prose, "1,250" and "seven", in these."""
