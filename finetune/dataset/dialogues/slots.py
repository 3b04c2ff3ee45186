"""What each tool's slots are filled with, and which fillings make a tool refuse.

`draw_slots` gives more slots than a wording uses (root's degree, the tip): those that occur in the wording become
arguments. `draw_refused` changes one slot so that the tool answers with an error; `refusable` says which wordings that
takes. Ranges are those of everyday life, and keep results short enough to read.
"""

from collections.abc import Callable, Mapping, Set
from typing import Any

from finetune.dataset.dialogues import conversion_tools, wordlists
from finetune.dataset.dialogues.conversion_tools import to_base, to_roman
from finetune.dataset.dialogues.drawing import Drawer, Slot, Slots
from finetune.dataset.dialogues.numerals import MONTHS, SEPARATOR_NAMES, UNIT_NAMES

Fixed = Mapping[str, Any]
Draw = Callable[[Drawer, Fixed], Slots]


def draw_slots(tool: str, drawer: Drawer, fixed: Fixed) -> Slots:
    return _DRAWS[tool](drawer, fixed)


def _arithmetic(drawer: Drawer, fixed: Fixed) -> Slots:
    match fixed["operation"]:
        case "power":
            return {"a": drawer.integer(2, 60), "b": drawer.integer(2, 6)}
        case "divide":
            return {"a": drawer.integer(20, 20000), "b": drawer.integer(2, 48)}
        case "multiply":
            return {"a": drawer.integer(3, 900), "b": drawer.integer(2, 160)}
        case "subtract":
            high = drawer.integer(30, 90000)
            return {"a": high, "b": drawer.integer(2, max(9, int(high.value) - 1))}
    return {"a": drawer.integer(4, 90000), "b": drawer.integer(2, 90000)}


def _two_wholes(drawer: Drawer, fixed: Fixed) -> Slots:
    """With a divisor in common, as a rule more than 1."""
    common = drawer.dice.between(2, 24)
    a, b = (drawer.fit(lambda: drawer.number(common * drawer.dice.between(2, 36))) for _ in range(2))
    return {"a": a, "b": b}


def _percent_change(drawer: Drawer, fixed: Fixed) -> Slots:
    return {"before": drawer.integer(10, 20000), "after": drawer.integer(10, 20000)}


def _combinations(drawer: Drawer, fixed: Fixed) -> Slots:
    items = drawer.integer(5, 40)
    return {"items": items, "chosen": drawer.integer(2, min(6, int(items.value) - 1))}


def _round(drawer: Drawer, fixed: Fixed) -> Slots:
    places = drawer.dice.between(4, 6)
    value = drawer.fit(lambda: drawer.fraction(0, 900, places))
    return {"value": value, "decimals": drawer.integer(2, places - 2)}


def _area(drawer: Drawer, fixed: Fixed) -> Slots:
    return {"width": drawer.decimal(2, 120), "height": drawer.decimal(2, 90)}


def _bill(drawer: Drawer, fixed: Fixed) -> Slots:
    tip = drawer.number(drawer.dice.pick([5, 8, 10, 12, 15, 18, 20]))
    return {"total": drawer.decimal(20, 900), "people": drawer.integer(2, 14), "tip_percent": tip}


def _interest(drawer: Drawer, fixed: Fixed) -> Slots:
    rate = drawer.decimal(1, 9, 1)
    return {"principal": drawer.integer(100, 80000), "rate_percent": rate, "years": drawer.integer(2, 25)}


def _letter(drawer: Drawer, fixed: Fixed) -> Slots:
    text = drawer.text()
    letters = [char for char in str(text.value).lower() if char.isascii() and char.isalpha()]
    letter = drawer.dice.pick(letters) if drawer.dice.chance(0.8) else drawer.dice.pick("aeiostr")
    return {"text": text, "letter": drawer.quoted(letter) if drawer.dice.chance(0.6) else Slot(letter, letter)}


def _palindrome(drawer: Drawer, fixed: Fixed) -> Slots:
    def make() -> str:
        if drawer.dice.chance(0.4):
            return drawer.dice.pick(wordlists.PALINDROMES)
        return drawer.word().lower()

    return {"text": drawer.text(make)}


def _replace(drawer: Drawer, fixed: Fixed) -> Slots:
    text = drawer.text()
    words = str(text.value).split()
    old = drawer.dice.pick([word for word in words if len(word) > 2] or words)  # "on" is also in "Monday"
    new = next(word for word in iter(lambda: drawer.word().lower(), None) if word != old.lower())
    return {"text": text, "old": drawer.quoted(old), "new": drawer.quoted(new)}


def _separator(drawer: Drawer) -> Slot:
    mark = drawer.dice.pick(list(SEPARATOR_NAMES))
    return Slot(mark, SEPARATOR_NAMES[mark]) if drawer.dice.chance(0.3) else drawer.quoted(mark)


def _join(drawer: Drawer, fixed: Fixed) -> Slots:
    return {"words": drawer.word_list(2, 4), "separator": _separator(drawer)}


def _split(drawer: Drawer, fixed: Fixed) -> Slots:
    separator = _separator(drawer)
    mark = str(separator.value)
    parts = lambda: mark.join(drawer.dice.sample(wordlists.NOUNS, drawer.dice.between(2, 4)))  # noqa: E731
    return {"text": drawer.text(parts), "separator": separator}


def _shorten(drawer: Drawer, fixed: Fixed) -> Slots:
    return {"text": drawer.text(), "length": drawer.integer(3, 16)}


def _pick_word(drawer: Drawer, fixed: Fixed) -> Slots:
    text = drawer.text()
    return {"text": text, "position": drawer.integer(1, len(str(text.value).split()))}


def _caesar(drawer: Drawer, fixed: Fixed) -> Slots:
    return {"text": drawer.text(), "shift": drawer.integer(1, 25)}


def _units(units: Mapping[str, float] | tuple[str, ...], low: int, high: int) -> Draw:
    def draw(drawer: Drawer, fixed: Fixed) -> Slots:
        pair = drawer.dice.sample(list(units), 2)
        slots = {key: Slot(unit, drawer.dice.pick(UNIT_NAMES[unit])) for key, unit in
                 zip(("from_unit", "to_unit"), pair, strict=True)}  # fmt: skip
        return {"value": drawer.decimal(low, high), **slots}

    return draw


def _to_base(drawer: Drawer, fixed: Fixed) -> Slots:
    return {"number": drawer.integer(13, 60000), "base": drawer.number(_base(drawer))}


def _from_base(drawer: Drawer, fixed: Fixed) -> Slots:
    base = _base(drawer)
    digits = drawer.fit(lambda: _same(to_base(drawer.dice.between(20, 3900), base)))
    return {"digits": digits, "base": drawer.number(base)}


def _base(drawer: Drawer) -> int:
    return drawer.dice.pick([2, 2, 16, 16, 8, 8, 3, 4, 5, 6, 7, 9, 12, 20])


def _same(text: str) -> Slot:
    return Slot(text, text)


def _roman(drawer: Drawer, fixed: Fixed) -> Slots:
    return {"numeral": drawer.fit(lambda: _same(to_roman(drawer.dice.between(4, 3900))))}


def _day(drawer: Drawer, year: int | None = None, month: int | None = None, day: int | None = None) -> Slot:
    """Half of them as machines write it, the rest as people do."""

    def make() -> Slot:
        y = year or drawer.dice.between(1990, 2035)
        m = month or drawer.dice.between(1, 12)
        return written_date(drawer, y, m, day or drawer.dice.between(1, 28))

    return drawer.fit(make)


def written_date(drawer: Drawer, year: int, month: int, day: int) -> Slot:
    iso, name = f"{year}-{month:02}-{day:02}", MONTHS[month - 1]
    return Slot(iso, drawer.dice.pick([iso, iso, f"{day} {name} {year}", f"{name} {day}, {year}"]))


def _between(drawer: Drawer, fixed: Fixed) -> Slots:
    start, end = _day(drawer), _day(drawer)
    first, last = sorted((start, end), key=lambda slot: str(slot.value))
    return {"start": first, "end": last} if first.value != last.value else _between(drawer, fixed)


def _add_days(drawer: Drawer, fixed: Fixed) -> Slots:
    return {"date": _day(drawer), "days": drawer.integer(2, 400)}


def _color(drawer: Drawer, fixed: Fixed) -> Slots:
    digits = "0123456789ABCDEF"
    return {"color": drawer.fit(lambda: _same("#" + "".join(drawer.dice.pick(digits) for _ in range(6))))}


_DRAWS: Mapping[str, Draw] = {
    "arithmetic": _arithmetic,
    "percent_of": lambda d, f: {"percent": d.integer(2, 95), "value": d.integer(20, 60000)},
    "percent_change": _percent_change,
    "statistics": lambda d, f: {"numbers": d.numbers(2, 200)},
    "root": lambda d, f: {"value": d.integer(3, 60000), "degree": d.integer(3, 6)},
    "greatest_common_divisor": _two_wholes,
    "least_common_multiple": _two_wholes,
    "is_prime": lambda d, f: {"number": d.integer(11, 50000)},
    "prime_factors": lambda d, f: {"number": d.integer(12, 9999)},
    "factorial": lambda d, f: {"number": d.integer(3, 12)},
    "combinations": _combinations,
    "round_number": _round,
    "area": _area,
    "split_bill": _bill,
    "simple_interest": _interest,
    "average_speed": lambda d, f: {"distance": d.integer(5, 900), "hours": d.decimal(1, 14, 1)},
    "count_words": lambda d, f: {"text": d.text()},
    "count_characters": lambda d, f: {"text": d.text()},
    "count_letter": _letter,
    "count_vowels": lambda d, f: {"text": d.text()},
    "reverse_text": lambda d, f: {"text": d.text(d.word if d.dice.chance(0.5) else None)},
    "is_palindrome": _palindrome,
    "change_case": lambda d, f: {"text": d.text()},
    "replace_text": _replace,
    "sort_words": lambda d, f: {"words": d.word_list()},
    "join_words": _join,
    "split_text": _split,
    "shorten_text": _shorten,
    "pick_word": _pick_word,
    "caesar_shift": _caesar,
    "repeat_text": lambda d, f: {"text": d.text(d.word), "times": d.integer(2, 9)},
    "convert_length": _units(conversion_tools.LENGTHS, 2, 900),
    "convert_weight": _units(conversion_tools.WEIGHTS, 2, 900),
    "convert_volume": _units(conversion_tools.VOLUMES, 2, 600),
    "convert_time": _units(conversion_tools.TIMES, 2, 600),
    "convert_speed": _units(conversion_tools.SPEEDS, 2, 300),
    "convert_data": _units(conversion_tools.DATA, 2, 900),
    "convert_temperature": _units(conversion_tools.DEGREES, 1, 420),
    "to_base": _to_base,
    "from_base": _from_base,
    "to_roman": lambda d, f: {"number": d.integer(4, 3900)},
    "from_roman": _roman,
    "days_between": _between,
    "add_days": _add_days,
    "weekday": lambda d, f: {"date": _day(d)},
    "hex_to_rgb": _color,
    "small": lambda d, f: {"small": d.integer(3, 60)},
}


def refusable(tool: str, fixed: Fixed, used: Set[str]) -> bool:
    """Whether a wording that uses these slots can be filled so that the tool refuses."""
    if tool == "arithmetic":
        return fixed.get("operation") in ("divide", "power")
    return tool in _REFUSED and _REFUSED[tool][0] <= used


def draw_refused(tool: str, drawer: Drawer, fixed: Fixed) -> Slots:
    """Slots that `tool` refuses."""
    slots = draw_slots(tool, drawer, fixed)
    if tool == "arithmetic":
        high = drawer.integer(11, 60) if fixed["operation"] == "power" else drawer.number(0)
        return {**slots, "b": high}
    return {**slots, **_REFUSED[tool][1](drawer, slots)}


def _negative(drawer: Drawer, low: int, high: int) -> Slot:
    return drawer.fit(lambda: drawer.number(-drawer.dice.between(low, high)))


def _no_day(drawer: Drawer) -> Slot:
    """A day that its month does not have."""
    month = drawer.dice.pick([2, 4, 6, 9, 11])
    return _day(drawer, month=month, day=drawer.dice.pick([30, 31]) if month == 2 else 31)


def _bad_digits(drawer: Drawer, slots: Slots) -> Slots:
    base = drawer.dice.pick([2, 3, 4, 5, 6, 7, 8])
    wrong = str(drawer.dice.between(base, 9))

    def make() -> Slot:
        good = to_base(drawer.dice.between(20, 3000), base)
        place = drawer.dice.below(len(good))
        return _same(good[:place] + wrong + good[place + 1 :])

    return {"digits": drawer.fit(make), "base": drawer.number(base)}


def _bad_color(drawer: Drawer, slots: Slots) -> Slots:
    good = str(slots["color"].value)
    wrong = drawer.dice.pick("GHKLMXZ")
    return {"color": _same(good[:4] + wrong + good[5:] if drawer.dice.chance(0.6) else good[:-1])}


_REFUSED: Mapping[str, tuple[frozenset[str], Callable[[Drawer, Slots], Slots]]] = {
    "percent_change": (frozenset({"before"}), lambda d, s: {"before": d.number(0)}),
    "root": (frozenset({"value"}), lambda d, s: {"value": _negative(d, 4, 900)}),
    "greatest_common_divisor": (frozenset({"a"}), lambda d, s: {"a": d.number(0)}),
    "is_prime": (frozenset({"number"}), lambda d, s: {"number": d.number(d.dice.pick([0, 1, 1, -3, -7, -11, -29]))}),
    "factorial": (frozenset({"number"}), lambda d, s: {"number": d.integer(21, 300)}),
    "combinations": (frozenset({"chosen"}), lambda d, s: {"chosen": d.integer(int(s["items"].value) + 1, 90)}),
    "round_number": (frozenset({"decimals"}), lambda d, s: {"decimals": d.integer(7, 15)}),
    "area": (frozenset({"width"}), lambda d, s: {"width": d.number(d.dice.pick([0, -2, -4, -15]))}),
    "split_bill": (frozenset({"people"}), lambda d, s: {"people": d.number(0)}),
    "simple_interest": (frozenset({"years"}), lambda d, s: {"years": _negative(d, 2, 12)}),
    "average_speed": (frozenset({"hours"}), lambda d, s: {"hours": d.number(0)}),
    "count_letter": (frozenset({"letter"}), lambda d, s: {"letter": d.quoted(d.dice.pick(["th", "ing", "ee", "st"]))}),
    "is_palindrome": (frozenset({"text"}), lambda d, s: {"text": d.quoted(d.dice.pick(["!!!", "?!?", "...", "--"]))}),
    "replace_text": (
        frozenset({"old"}),
        lambda d, s: {"old": d.quoted(d.dice.pick(["zinc", "quartz", "jigsaw", "oxygen", "vortex", "yacht", "fjord"]))},
    ),
    "split_text": (frozenset({"separator"}), lambda d, s: {"text": d.text(d.word)}),
    "shorten_text": (frozenset({"length"}), lambda d, s: {"length": d.number(d.dice.pick([0, -1, -3, -5]))}),
    "pick_word": (frozenset({"position"}), lambda d, s: {"position": d.integer(12, 60)}),
    "caesar_shift": (frozenset({"shift"}), lambda d, s: {"shift": d.integer(26, 90)}),
    "convert_length": (frozenset({"value"}), lambda d, s: {"value": _negative(d, 2, 90)}),
    "convert_weight": (frozenset({"value"}), lambda d, s: {"value": _negative(d, 2, 90)}),
    "convert_volume": (frozenset({"value"}), lambda d, s: {"value": _negative(d, 2, 90)}),
    "convert_time": (frozenset({"value"}), lambda d, s: {"value": _negative(d, 2, 90)}),
    "convert_temperature": (frozenset({"value"}), lambda d, s: {"value": _negative(d, 480, 900)}),
    "to_base": (frozenset({"base"}), lambda d, s: {"base": d.number(d.dice.pick([0, 1, 37, 40, 50, 64, 100]))}),
    "from_base": (frozenset({"digits"}), _bad_digits),
    "to_roman": (frozenset({"number"}), lambda d, s: {"number": d.integer(4000, 20000)}),
    "days_between": (frozenset({"end"}), lambda d, s: {"end": _no_day(d)}),
    "add_days": (frozenset({"date"}), lambda d, s: {"date": _no_day(d)}),
    "weekday": (frozenset({"date"}), lambda d, s: {"date": _no_day(d)}),
    "hex_to_rgb": (frozenset({"color"}), _bad_color),
}
