"""Tools that convert: units of measurement, number systems, dates and colours."""

from collections.abc import Iterable
from datetime import date as Date
from datetime import timedelta
from typing import Any

from finetune.dataset.dialogues.tool import INTEGER, NUMBER, TEXT, Tool, ToolRefusal, choice, make_tool

LENGTHS = {"mm": 0.001, "cm": 0.01, "m": 1.0, "km": 1000.0, "in": 0.0254, "ft": 0.3048, "yd": 0.9144, "mi": 1609.344}
WEIGHTS = {"g": 0.001, "kg": 1.0, "t": 1000.0, "oz": 0.028349523125, "lb": 0.45359237, "st": 6.35029318}
VOLUMES = {"ml": 0.001, "l": 1.0, "tsp": 0.00492892159375, "tbsp": 0.01478676478125, "cup": 0.2365882365,
           "pt": 0.473176473, "gal": 3.785411784}  # fmt: skip
TIMES = {"s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0, "wk": 604800.0}
SPEEDS = {"m/s": 1.0, "km/h": 1 / 3.6, "mph": 0.44704, "kn": 1852 / 3600}
DATA = {"B": 1.0, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
DEGREES = ("C", "F", "K")

_ROMAN = ((1000, "M"), (900, "CM"), (500, "D"), (400, "CD"), (100, "C"), (90, "XC"), (50, "L"), (40, "XL"), (10, "X"),
          (9, "IX"), (5, "V"), (4, "IV"), (1, "I"))  # fmt: skip
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
_WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def convert_length(value: float, from_unit: str, to_unit: str) -> float:
    """Convert a length."""
    return _scaled(value, LENGTHS, from_unit, to_unit)


def convert_weight(value: float, from_unit: str, to_unit: str) -> float:
    """Convert a weight."""
    return _scaled(value, WEIGHTS, from_unit, to_unit)


def convert_volume(value: float, from_unit: str, to_unit: str) -> float:
    """Convert a volume."""
    return _scaled(value, VOLUMES, from_unit, to_unit)


def convert_time(value: float, from_unit: str, to_unit: str) -> float:
    """Convert a duration."""
    return _scaled(value, TIMES, from_unit, to_unit)


def convert_speed(value: float, from_unit: str, to_unit: str) -> float:
    """Convert a speed."""
    return _scaled(value, SPEEDS, from_unit, to_unit)


def convert_data(value: float, from_unit: str, to_unit: str) -> float:
    """Convert an amount of data."""
    return _scaled(value, DATA, from_unit, to_unit)


def _scaled(value: float, units: dict[str, float], from_unit: str, to_unit: str) -> float:
    if value < 0:
        raise ToolRefusal("the value cannot be negative")
    return value * units[from_unit] / units[to_unit]


def convert_temperature(value: float, from_unit: str, to_unit: str) -> float:
    """Convert a temperature."""
    kelvin = {"C": value + 273.15, "F": (value - 32) / 1.8 + 273.15, "K": value}[from_unit]
    if kelvin < 0:
        raise ToolRefusal("nothing is colder than absolute zero, -273.15 C")
    return {"C": kelvin - 273.15, "F": (kelvin - 273.15) * 1.8 + 32, "K": kelvin}[to_unit]


def to_base(number: int, base: int) -> str:
    """Write a whole number in another base."""
    if not 2 <= base <= 36:
        raise ToolRefusal("the base must lie between 2 and 36")
    if number < 0:
        raise ToolRefusal("the number cannot be negative")
    digits = ""
    while number or not digits:
        number, digit = divmod(number, base)
        digits = _DIGITS[digit] + digits
    return digits


def from_base(digits: str, base: int) -> int:
    """Read digits of another base as a number."""
    if not 2 <= base <= 36:
        raise ToolRefusal("the base must lie between 2 and 36")
    for digit in digits.lower():
        if digit not in _DIGITS[:base]:
            raise ToolRefusal(f"'{digit}' is not a digit of base {base}")
    return int(digits, base)


def to_roman(number: int) -> str:
    """Write a number in Roman numerals."""
    if not 1 <= number <= 3999:
        raise ToolRefusal("Roman numerals go from 1 to 3999")
    numeral = ""
    for value, letters in _ROMAN:
        count, number = divmod(number, value)
        numeral += letters * count
    return numeral


def from_roman(numeral: str) -> int:
    """Read a Roman numeral."""
    rest, number = numeral.upper(), 0
    for value, letters in _ROMAN:
        while rest.startswith(letters):
            rest, number = rest[len(letters) :], number + value
    if rest or not number or to_roman(number) != numeral.upper():
        raise ToolRefusal(f"'{numeral}' is not a Roman numeral")
    return number


def days_between(start: str, end: str) -> int:
    """Days between two dates (YYYY-MM-DD)."""
    return (_date(end) - _date(start)).days


def add_days(date: str, days: int) -> str:
    """Date some days after a date (YYYY-MM-DD)."""
    if abs(days) > 100_000:
        raise ToolRefusal("at most 100000 days can be added")
    return (_date(date) + timedelta(days=days)).isoformat()


def weekday(date: str) -> str:
    """Day of the week of a date (YYYY-MM-DD)."""
    return _WEEKDAYS[_date(date).weekday()]


def _date(text: str) -> Date:
    try:
        return Date.fromisoformat(text)
    except ValueError:
        raise ToolRefusal(f"{text} is not a date of the calendar") from None


def hex_to_rgb(color: str) -> list[int]:
    """Red, green and blue of a hex color."""
    digits = color.removeprefix("#").lower()
    if len(digits) != 6 or any(digit not in _DIGITS[:16] for digit in digits):
        raise ToolRefusal(f"'{color}' is not a color of six hex digits")
    return [int(digits[place : place + 2], 16) for place in (0, 2, 4)]


def _units(names: Iterable[str]) -> dict[str, Any]:
    units = choice(*names)
    return {"value": NUMBER, "from_unit": units, "to_unit": units}


TOOLS: tuple[Tool, ...] = (
    make_tool("conversions", "convert lengths", convert_length, **_units(LENGTHS)),
    make_tool("conversions", "convert weights", convert_weight, **_units(WEIGHTS)),
    make_tool("conversions", "convert volumes", convert_volume, **_units(VOLUMES)),
    make_tool("conversions", "convert durations", convert_time, **_units(TIMES)),
    make_tool("conversions", "convert speeds", convert_speed, **_units(SPEEDS)),
    make_tool("conversions", "convert amounts of data", convert_data, **_units(DATA)),
    make_tool("conversions", "convert temperatures", convert_temperature, **_units(DEGREES)),
    make_tool("conversions", "write numbers in other bases", to_base, number=INTEGER, base=INTEGER),
    make_tool("conversions", "read numbers in other bases", from_base, digits=TEXT, base=INTEGER),
    make_tool("conversions", "write Roman numerals", to_roman, number=INTEGER),
    make_tool("conversions", "read Roman numerals", from_roman, numeral=TEXT),
    make_tool("conversions", "count the days between dates", days_between, start=TEXT, end=TEXT),
    make_tool("conversions", "add days to a date", add_days, date=TEXT, days=INTEGER),
    make_tool("conversions", "find the day of the week", weekday, date=TEXT),
    make_tool("conversions", "read hex colors", hex_to_rgb, color=TEXT),
)
