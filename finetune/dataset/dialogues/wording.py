"""The small grammar of the wordings: [this|that], <words of the family>, {slots}; what remains when slots are masked.

Alternatives do not nest. `<Person>` begins a sentence, `<person>` does not.
"""

import re
from collections.abc import Callable, Mapping, Sequence

from finetune.dataset.dialogues.drawing import Dice, Slots

SLOT = re.compile(r"\{(\w+)\}")
_CHOICE = re.compile(r"\[([^\[\]]*\|[^\[\]]*)\]")
_WORD = re.compile(r"<(\w+)>")
_TOKEN = re.compile(r"\w+(?:'\w+)?")
MASK = "_"


def expand(text: str, words: Mapping[str, Sequence[str]], dice: Dice) -> str:
    """Alternatives and family words chosen; slots stay. The same family word is the same throughout one text."""
    text = _CHOICE.sub(lambda found: dice.pick(found[1].split("|")), text)
    chosen: dict[str, str] = {}

    def word(found: re.Match[str]) -> str:
        key = found[1].lower()
        value = chosen.setdefault(key, dice.pick(words[key]))
        return capitalized(value) if found[1][0].isupper() else value

    return _WORD.sub(word, text)


def slot_names(text: str) -> set[str]:
    return set(SLOT.findall(text))


def fill(text: str, slots: Slots) -> str:
    return SLOT.sub(lambda found: slots[found[1]].text, text)


def outside_slots(text: str, change: Callable[[str], str]) -> str:
    """`change` for what lies between the slots."""
    return "".join(piece if SLOT.fullmatch(piece) else change(piece) for piece in re.split(r"(\{\w+\})", text))


def capitalized(text: str) -> str:
    return text[:1].upper() + text[1:]


def masked_tokens(text: str) -> frozenset[str]:
    """Distinct lower-case words of a template, all its slots as one mask."""
    return frozenset(_TOKEN.findall(SLOT.sub(f" {MASK} ", text).lower()))
