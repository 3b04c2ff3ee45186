"""How people write numbers, dates, units and separators, beside digits and codes."""

_SMALL = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip

UNIT_NAMES = {
    "mm": ("millimetres", "millimeters", "mm"),
    "cm": ("centimetres", "centimeters", "cm"),
    "m": ("metres", "meters"),
    "km": ("kilometres", "kilometers", "km"),
    "in": ("inches",),
    "ft": ("feet",),
    "yd": ("yards",),
    "mi": ("miles",),
    "g": ("grams", "g"),
    "kg": ("kilograms", "kilos", "kg"),
    "t": ("tonnes", "metric tons"),
    "oz": ("ounces",),
    "lb": ("pounds",),
    "st": ("stone",),
    "ml": ("millilitres", "milliliters", "ml"),
    "l": ("litres", "liters"),
    "tsp": ("teaspoons",),
    "tbsp": ("tablespoons",),
    "cup": ("cups",),
    "pt": ("pints",),
    "gal": ("gallons",),
    "s": ("seconds",),
    "min": ("minutes",),
    "h": ("hours",),
    "d": ("days",),
    "wk": ("weeks",),
    "m/s": ("metres per second", "m/s"),
    "km/h": ("kilometres per hour", "km/h"),
    "mph": ("miles per hour", "mph"),
    "kn": ("knots",),
    "B": ("bytes",),
    "KB": ("kilobytes", "KB"),
    "MB": ("megabytes", "MB"),
    "GB": ("gigabytes", "GB"),
    "TB": ("terabytes", "TB"),
    "C": ("Celsius",),
    "F": ("Fahrenheit",),
    "K": ("Kelvin",),
}
SEPARATOR_NAMES = {
    ",": "a comma",
    ";": "a semicolon",
    "-": "a hyphen",
    "/": "a slash",
    "|": "a vertical bar",
    "+": "a plus sign",
    ":": "a colon",
    "_": "an underscore",
}


def in_words(number: int) -> str:
    """From zero to twelve."""
    return _SMALL[number]


def separated(number: int) -> str:
    return f"{number:,}"
