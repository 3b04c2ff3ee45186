"""Words, names and short phrases that texts in requests are made of: enough that they are copied, not remembered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from finetune.dataset.dialogues.drawing import Dice

NAMES = tuple(
    """Ada Adam Aisha Alma Amir Ana Anton Arjun Astrid Bela Ben Bruno Carla Cem Chen Clara Dana David Diego Dora Edgar
    Elena Elif Emil Emma Erik Eva Farid Felix Fiona Gino Greta Hana Hans Hugo Ida Igor Ines Iris Ivan Jana Jonas Jose
    Julia Kaito Karim Karl Kenji Lara Lea Leo Lina Lola Lucas Luis Maja Marco Mara Marta Mei Mila Mina Moritz Nadia Nils
    Nina Noah Nora Olga Omar Oscar Otto Paula Pedro Pia Rania Rita Rosa Samir Sara Selma Silas Sofia Sven Tara Theo Tom
    Uma Vera Victor Wanda Yara Yusuf Zoe""".split()  # noqa: SIM905 - readable
)
NOUNS = tuple(
    """acorn anchor apple arrow autumn badge bamboo banjo barrel basket beacon bell berry blanket bottle branch brick
    bridge bucket button cabin candle canvas carpet castle cedar cellar chair cherry circle clock cloud clover coffee
    copper coral corner cotton cradle cricket crystal curtain daisy desert diamond dragon drum eagle echo ember engine
    falcon feather fern ferry fiddle finger forest fossil fountain garlic ginger glacier glove granite guitar hammer
    harbor harvest hazel helmet hill honey horizon island ivory ivy jacket jasmine jungle kettle kitten ladder lagoon
    lantern lavender lemon letter lily lizard locket magnet mango maple marble meadow melon mirror mountain mustard
    needle nettle oasis ocean olive onion orange orchard otter owl paddle palace panda paper parrot pebble pencil pepper
    piano pillow pine planet plum pocket poppy prairie puzzle quill rabbit raven ribbon river robin rocket rope saddle
    salmon sandal satchel shadow shell silver sparrow spider spoon squirrel stable stone summer sunset swallow tablet
    temple thistle thunder ticket tiger timber tower trumpet tulip tunnel turtle umbrella valley velvet village violet
    violin wagon walnut whistle willow window winter zebra""".split()  # noqa: SIM905 - readable
)
ADJECTIVES = tuple(
    """amber ancient big blue bright broken calm clean clever cold crisp dark deep dry dusty early empty faint fancy
    fast final fine free fresh gentle golden grand green happy heavy hidden high hollow hot hungry icy late lazy light
    little lonely long loud lucky mild narrow new noisy old open pale plain proud quick quiet rare red ripe rough round
    rusty salty sharp short shy silent simple slow small smooth soft sour steep strange strong sunny sweet tall tiny
    tired warm wet white wide wild wise young""".split()  # noqa: SIM905 - readable
)
VERBS = tuple(
    """bring build carry catch check clean close collect cover draw fill find fix fold hide hold keep lift mark measure
    mix move open pack paint pick place press push read save sell send share show sort stack store take test throw turn
    wash watch weigh wrap""".split()  # noqa: SIM905 - readable
)
PAST = tuple(
    """bought borrowed broke built carried cleaned dropped fixed found hid held kept left liked lost moved opened
    packed painted saw sold sent took washed wanted""".split()  # noqa: SIM905 - readable
)
PLACES = (
    "at the door", "by the gate", "in the attic", "in the box", "in the cellar", "near the wall", "on the bench",
    "on the roof", "on the shelf", "under the stairs", "behind the house", "beside the lamp", "across the road",
    "along the river",
)  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
PALINDROMES = (
    "level", "radar", "rotor", "kayak", "noon", "civic", "refer", "madam", "racecar", "stats", "tenet", "solos", "deed",
    "never odd or even", "step on no pets", "no lemon no melon", "was it a car or a cat I saw", "top spot",
)  # fmt: skip


_FIRST = tuple(
    """ba bel bor da del dro fa fen gar hal jor ka kel lo mar mi nor o pa quin ra sel ta tor u va wen yor zan""".split()  # noqa: SIM905 - readable
)
_MIDDLE = tuple(
    """ber da do la le li lo ma men na ne ni ra ri ro ta ti to va ve vi za""".split()  # noqa: SIM905 - readable
)
_LAST = tuple(
    """bert da dell din ek en field ford ik ina is ko la lin mar nov o ra ric rum sen ski son ta
    ton us vik wick""".split()  # noqa: SIM905 - readable
)
COINED_SHARE = 0.3
"""Of names: ones that nobody has, so that copying is learned letter by letter too, and not only words from a list."""


def name(dice: Dice) -> str:
    return coined(dice) if dice.chance(COINED_SHARE) else dice.pick(NAMES)


def coined(dice: Dice) -> str:
    """A surname or a brand that does not exist: some 20,000 of them."""
    middle = dice.pick(_MIDDLE) if dice.chance(0.6) else ""
    return (dice.pick(_FIRST) + middle + dice.pick(_LAST)).capitalize()


def word(dice: Dice) -> str:
    return name(dice) if dice.chance(0.25) else dice.pick(dice.pick([NOUNS, NOUNS, ADJECTIVES]))


def code(dice: Dice) -> str:
    """As on a label: "KX-204"."""
    letters = "".join(chr(ord("A") + dice.below(26)) for _ in range(dice.between(2, 3)))
    return f"{letters}{dice.pick(['-', ' ', ''])}{dice.between(10, 9999)}"


def phrase(dice: Dice, words: Mapping[str, Sequence[str]]) -> str:
    """Two to nine words, as on signs, labels and in notes. No quotation marks."""
    noun, other, adjective = dice.pick(NOUNS), dice.pick(NOUNS), dice.pick(ADJECTIVES)
    who = name(dice)
    things, place = dice.pick(words["things"]), dice.pick(PLACES)
    shapes = (
        f"{adjective} {things} for {who}",
        f"{who} {dice.pick(PAST)} the {adjective} {noun}",
        f"please {dice.pick(VERBS)} the {noun} and the {other}",
        f"{noun} and {other} on {dice.pick(DAYS)}",
        f"the {adjective} {noun} is {place}",
        f"no {things} {place} after {dice.between(2, 11)} o'clock",
        f"{adjective} {noun}",
        f"{noun} {other} {dice.pick(NOUNS)}",
        f"{who} and {dice.pick(NAMES)} {dice.pick(VERBS)} {things} {place}",
        f"{things} {code(dice)}",
        f"{dice.pick(VERBS)} {adjective} {things}",
        f"ask {who} about the {noun} {place}",
        f"{dice.pick(['only', 'just', 'about'])} {dice.between(2, 90)} {things} left",
        f"{who} says the {other} {dice.pick(['looks', 'feels', 'seems'])} {adjective}",
        f"{dice.pick(DAYS)} {adjective} {noun} club",
        " ".join(dice.sample(NOUNS, dice.between(2, 5))),
    )
    made = dice.pick(shapes)
    return made[0].upper() + made[1:] if dice.chance(0.4) else made
