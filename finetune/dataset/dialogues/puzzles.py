"""Small questions of logic whose answer is worked out here, without any tool: order, place, time, kinship, either-or.

Each puzzle has wordings with {slots} and a function that draws the slots and the answer (slot "answer"). The answers
follow from the question alone; nothing has to be calculated, so no offered tool is the better way.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from finetune.dataset.dialogues.drawing import Drawer, Slot, Slots
from finetune.dataset.dialogues.wordlists import DAYS, NAMES, NOUNS


@dataclass(frozen=True, slots=True)
class Puzzle:
    name: str
    phrases: tuple[str, ...]
    draw: Callable[[Drawer], Slots]


def _slots(**texts: str) -> Slots:
    return {name: Slot(text, text) for name, text in texts.items()}


_COMPARED = (
    ("taller", "tallest", "shortest"), ("older", "oldest", "youngest"), ("faster", "fastest", "slowest"),
    ("stronger", "strongest", "weakest"), ("louder", "loudest", "quietest"), ("braver", "bravest", "most timid"),
)  # fmt: skip


def _order(drawer: Drawer) -> Slots:
    a, b, c = drawer.dice.sample(NAMES, 3)
    more, most, least = drawer.dice.pick(_COMPARED)
    asks_most = drawer.dice.chance(0.5)
    answer = f"{a if asks_most else c} is the {most if asks_most else least}."
    return _slots(a=a, b=b, c=c, more=more, asked=most if asks_most else least, answer=answer)


def _day(drawer: Drawer) -> Slots:
    place = drawer.dice.below(7)
    word, step = drawer.dice.pick([("tomorrow", 1), ("the day after tomorrow", 2), ("in three days", 3)])
    return _slots(day=DAYS[place], when=word, answer=f"It will be {DAYS[(place + step) % 7]}.")


def _past_day(drawer: Drawer) -> Slots:
    place = drawer.dice.below(7)
    word, step = drawer.dice.pick([("yesterday", 1), ("the day before yesterday", 2), ("three days ago", 3)])
    return _slots(day=DAYS[place], when=word, answer=f"It was {DAYS[(place - step) % 7]}.")


_GROUPS: Mapping[str, tuple[str, ...]] = {
    "fruit": ("apple", "pear", "plum", "cherry", "banana", "peach", "mango", "grape"),
    "animal": ("dog", "horse", "tiger", "rabbit", "goat", "otter", "mouse", "bear"),
    "tool": ("hammer", "saw", "wrench", "drill", "chisel", "pliers", "file", "spade"),
    "colour": ("red", "green", "blue", "yellow", "purple", "brown", "grey", "orange"),
    "vehicle": ("car", "bus", "train", "tram", "bicycle", "truck", "ferry", "scooter"),
    "instrument": ("violin", "flute", "drum", "trumpet", "piano", "harp", "cello", "guitar"),
    "garment": ("coat", "shirt", "glove", "sock", "scarf", "hat", "jacket", "skirt"),
    "piece of furniture": ("chair", "table", "wardrobe", "sofa", "desk", "bed", "stool", "shelf"),
}


def _odd_one(drawer: Drawer) -> Slots:
    kind, other = drawer.dice.sample(list(_GROUPS), 2)
    odd = drawer.dice.pick(_GROUPS[other])
    items = drawer.dice.shuffled([*drawer.dice.sample(_GROUPS[kind], 3), odd])
    article = "an" if kind[0] in "aeiou" else "a"
    answer = f"The {odd} does not belong there, it is not {article} {kind}."
    return _slots(items=", ".join(items), answer=answer.replace("The " + odd, odd.capitalize(), 1))


def _queue(drawer: Drawer) -> Slots:
    a, b, c = drawer.dice.sample(NAMES, 3)
    asks_first = drawer.dice.chance(0.5)
    place = "first" if asks_first else "last"
    return _slots(a=a, b=b, c=c, place=place, answer=f"{a if asks_first else c} is {place}.")


def _either(drawer: Drawer) -> Slots:
    thing, one, two = drawer.dice.sample(NOUNS, 3)
    first = drawer.dice.chance(0.5)
    ruled, left = (one, two) if first else (two, one)
    return _slots(thing=thing, one=one, two=two, ruled=ruled, answer=f"It is in the {left}.")


def _swap(drawer: Drawer) -> Slots:
    (a, b), (x, y) = drawer.dice.sample(NAMES, 2), drawer.dice.sample(NOUNS, 2)
    asks_x = drawer.dice.chance(0.5)
    return _slots(a=a, b=b, x=x, y=y, asked=x if asks_x else y, answer=f"{b if asks_x else a} has it now.")


def _shelf(drawer: Drawer) -> Slots:
    x, y, z = drawer.dice.sample(NOUNS, 3)
    where, answer = drawer.dice.pick([("in the middle", y), ("on the far left", x), ("on the far right", z)])
    return _slots(x=x, y=y, z=z, where=where, answer=f"The {answer} is {where}.")


def _condition(drawer: Drawer) -> Slots:
    sign, state = drawer.dice.pick(
        [("the lamp is on", "the door is open"), ("the flag is up", "the gate is open"),
         ("it rains", "the tour is off"), ("the bell rings", "lunch is ready"),
         ("the sign is red", "the lift is broken"),
         ("the radio plays", "somebody is at home")]
    )  # fmt: skip
    return _slots(sign=sign, state=state, answer=f"Yes, {state}.")


_KIN = {
    ("mother", "mother"): "grandmother", ("mother", "father"): "grandmother", ("father", "mother"): "grandfather",
    ("father", "father"): "grandfather", ("brother", "mother"): "uncle", ("brother", "father"): "uncle",
    ("sister", "mother"): "aunt", ("sister", "father"): "aunt",
}  # fmt: skip


_WOMEN = ("Ada", "Alma", "Ana", "Carla", "Clara", "Dora", "Elena", "Emma", "Eva", "Greta", "Hana", "Ida", "Julia",
          "Lara", "Lea", "Maja", "Nora", "Olga", "Sofia")  # fmt: skip
_MEN = ("Adam", "Amir", "Anton", "Bruno", "David", "Diego", "Emil", "Erik", "Farid", "Hans", "Hugo", "Ivan", "Karl",
        "Leo", "Marco", "Nils", "Otto", "Pedro", "Tom")  # fmt: skip


def _kin(drawer: Drawer) -> Slots:
    first, second = drawer.dice.pick(list(_KIN))
    a, b = (drawer.dice.pick(_WOMEN if word in ("mother", "sister") else _MEN) for word in (first, second))
    c = drawer.dice.pick([name for name in NAMES if name not in (a, b)])
    if a == b:
        return _kin(drawer)
    return _slots(a=a, b=b, c=c, first=first, second=second, answer=f"{a} is the {_KIN[first, second]} of {c}.")


_OPPOSITES = (
    ("hot", "cold"), ("tall", "short"), ("early", "late"), ("open", "closed"), ("full", "empty"), ("day", "night"),
    ("rich", "poor"), ("wet", "dry"), ("up", "down"), ("loud", "quiet"), ("thick", "thin"), ("hard", "soft"),
    ("old", "young"), ("light", "dark"), ("win", "lose"), ("buy", "sell"), ("begin", "end"), ("sweet", "sour"),
)  # fmt: skip


def _analogy(drawer: Drawer) -> Slots:
    (a, b), (c, d) = drawer.dice.sample(_OPPOSITES, 2)
    return _slots(a=a, b=b, c=c, answer=f"It is {d}.")


_HEAVIER = (
    ("elephant", "cat"), ("brick", "feather"), ("truck", "bicycle"), ("piano", "flute"), ("anchor", "spoon"),
    ("cow", "hen"), ("barrel", "cup"), ("sofa", "cushion"), ("melon", "cherry"), ("bus", "scooter"),
    ("fridge", "kettle"), ("whale", "salmon"), ("statue", "coin"), ("oak tree", "twig"), ("safe", "wallet"),
)  # fmt: skip


def _heavier(drawer: Drawer) -> Slots:
    heavy, light = drawer.dice.pick(_HEAVIER)
    asked, answer = drawer.dice.pick([("heavier", heavy), ("lighter", light)])
    a, b = drawer.dice.shuffled([heavy, light])
    return _slots(a=a, b=b, asked=asked, answer=f"The {answer} is {asked}.")


def _arrival(drawer: Drawer) -> Slots:
    a, b, c = drawer.dice.sample(NAMES, 3)
    place = drawer.dice.pick(["first", "last"])
    return _slots(a=a, b=b, c=c, place=place, answer=f"{a if place == 'first' else c} came {place}.")


def _colour(drawer: Drawer) -> Slots:
    kind, colour = drawer.dice.pick(NOUNS), drawer.dice.pick(_GROUPS["colour"])
    owner = drawer.dice.pick(NAMES)
    return _slots(kind=kind, colour=colour, owner=owner, answer=f"It must be {colour}.")


PUZZLES: tuple[Puzzle, ...] = (
    Puzzle("order", ("{a} is {more} than {b}, and {b} is {more} than {c}. Who is the {asked}?",
        "Who is the {asked} of the three if {a} is {more} than {b} and {b} is {more} than {c}?",
        "Of {a}, {b} and {c} at <place>, {a} is {more} than {b} and {b} is {more} than {c}. Which one is the {asked}?",
        "Help me think: {a} is {more} than {b}, {b} is {more} than {c}. Who of them is the {asked}?"), _order),
    Puzzle("day", ("If today is {day}, which day is it {when}?", "Today is {day}. What day will it be {when}?",
        "<Event> is {when} and today is {day}. On which day of the week is it?",
        "It is {day} now at <place>. Which day comes {when}?"), _day),
    Puzzle("past_day", ("If today is {day}, which day was it {when}?", "Today is {day}. What day was it {when}?",
        "<Person> came {when} and today is {day}. On which day of the week was that?"), _past_day),
    Puzzle("odd_one", ("Which one does not belong: {items}?", "One of these does not fit the others: {items}. Which?",
        "Which of {items} is the odd one out?",
        "On the list at <place> are {items}. Which of them does not fit?"), _odd_one),
    Puzzle("queue", ("{a} stands in front of {b}, and {c} stands behind {b}. Who is {place}?",
        "In the line at <place>, {b} is right behind {a} and right in front of {c}. Who is {place}?",
        "Who is {place} in line if {a} is ahead of {b} and {b} is ahead of {c}?"), _queue),
    Puzzle("either", ("The {thing} is either in the {one} or in the {two}. It is not in the {ruled}. Where is it?",
        "<Person> put the {thing} into the {one} or into the {two}, and the {ruled} is empty. Where is the {thing}?",
        "Either the {one} or the {two} holds the {thing}, but not the {ruled}. So where is it?"), _either),
    Puzzle("swap", ("{a} has the {x} and {b} has the {y}. They swap. Who has the {asked} now?",
        "At <place>, {a} gives {b} the {x} and gets the {y} for it. Who has the {asked} now?",
        "Before <event> {a} held the {x} and {b} the {y}, then they exchanged them. Who holds the {asked}?"), _swap),
    Puzzle("shelf", ("The {x} is left of the {y}, and the {y} is left of the {z}. Which is {where}?",
        "On a shelf at <place> the {y} is right of the {x} and left of the {z}. What is {where}?",
        "If the {z} is to the right of the {y} and the {y} to the right of the {x}, what is {where}?"), _shelf),
    Puzzle("condition", ("Whenever {sign}, {state}. Now {sign}. Does that mean that {state}?",
        "<Person> says: if {sign}, then {state}. Right now {sign}. Can I be sure that {state}?",
        "At <place> the rule is that {state} whenever {sign}. Just now {sign}. Is it true that {state}?"), _condition),
    Puzzle("kin", ("{a} is the {first} of {b}, and {b} is the {second} of {c}. What is {a} to {c}?",
        "How is {a} related to {c} if {a} is the {first} of {b} and {b} is the {second} of {c}?",
        "<Person> says that {b} is the {second} of {c} and {a} is the {first} of {b}. So what is {a} to {c}?"), _kin),
    Puzzle("analogy", ("{a} is to {b} as {c} is to what?", "If {a} goes with {b}, what goes with {c}?",
        "In a riddle at <event>: {a} is the opposite of {b}, so what is the opposite of {c}?",
        "Complete the pair: {a} and {b}, {c} and ...?"), _analogy),
    Puzzle("heavier", ("Which is {asked}, a real {a} or a real {b}?", "Is the {a} or the {b} usually {asked}?",
        "Out of the {a} and the {b}, which one is {asked}?",
        "For a quiz at <event>: which is {asked}, the {a} or the {b}?"), _heavier),
    Puzzle("arrival", ("{a} arrived before {b}, and {c} arrived after {b}. Who came {place}?",
        "{b} came to <place> after {a} but before {c}. Who came {place}?",
        "At <event> {c} was later than {b} and {b} later than {a}. Who of them came {place}?"), _arrival),
    Puzzle("colour", ("Every {kind} that {owner} owns is {colour}. This {kind} belongs to {owner}. What colour is it?",
        "{owner} only buys {colour} things, and bought a {kind}. Which colour does it have?",
        "At <place> all {kind} signs are {colour}. What colour is the {kind} sign by the door?"), _colour),
)  # fmt: skip
