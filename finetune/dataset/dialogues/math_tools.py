"""Tools that compute: arithmetic, percentages, lists of numbers, whole numbers, shapes, money and speed."""

import math

from finetune.dataset.dialogues.tool import INTEGER, NUMBER, Tool, ToolRefusal, choice, list_of, make_tool


def arithmetic(operation: str, a: float, b: float) -> float:
    """Basic arithmetic on two numbers."""
    if operation == "divide" and b == 0:
        raise ToolRefusal("division by zero is not defined")
    if operation == "power":
        if abs(a) > 1000 or not 0 <= b <= 10:
            raise ToolRefusal("powers need a base up to 1000 and an exponent from 0 to 10")
        return a**b
    return {"add": a + b, "subtract": a - b, "multiply": a * b, "divide": a / b if b else 0}[operation]


def percent_of(percent: float, value: float) -> float:
    """Percentage of a value."""
    return percent * value / 100


def percent_change(before: float, after: float) -> float:
    """Change between two values in percent."""
    if before == 0:
        raise ToolRefusal("a change from zero has no percentage")
    return (after - before) / abs(before) * 100


def statistics(numbers: list[float], measure: str) -> float:
    """One statistic of a list of numbers."""
    if not numbers:
        raise ToolRefusal("the list is empty")
    ordered, count = sorted(numbers), len(numbers)
    middle = (ordered[(count - 1) // 2] + ordered[count // 2]) / 2
    return {
        "sum": math.fsum(numbers),
        "mean": math.fsum(numbers) / count,
        "median": middle,
        "min": ordered[0],
        "max": ordered[-1],
        "range": ordered[-1] - ordered[0],
    }[measure]


def root(value: float, degree: int = 2) -> float:
    """Root of a number, square root by default."""
    if not 2 <= degree <= 10:
        raise ToolRefusal("the degree must lie between 2 and 10")
    if value < 0:
        raise ToolRefusal("a negative number has no real root here")
    return value ** (1 / degree)


def greatest_common_divisor(a: int, b: int) -> int:
    """Greatest common divisor of two whole numbers."""
    if a <= 0 or b <= 0:
        raise ToolRefusal("both numbers must be positive")
    return math.gcd(a, b)


def least_common_multiple(a: int, b: int) -> int:
    """Least common multiple of two whole numbers."""
    if a <= 0 or b <= 0:
        raise ToolRefusal("both numbers must be positive")
    return math.lcm(a, b)


def is_prime(number: int) -> bool:
    """Whether a whole number is prime."""
    if number < 2:
        raise ToolRefusal("prime numbers begin at 2")
    return all(number % factor for factor in range(2, math.isqrt(number) + 1))


def prime_factors(number: int) -> list[int]:
    """Prime factors of a whole number."""
    if not 2 <= number <= 1_000_000:
        raise ToolRefusal("the number must lie between 2 and 1000000")
    found, factor = [], 2
    while factor * factor <= number:
        while number % factor == 0:
            found.append(factor)
            number //= factor
        factor += 1
    return [*found, number] if number > 1 else found


def factorial(number: int) -> int:
    """Factorial of a whole number."""
    if not 0 <= number <= 20:
        raise ToolRefusal("the number must lie between 0 and 20")
    return math.factorial(number)


def combinations(items: int, chosen: int) -> int:
    """Ways to choose items, order ignored."""
    if not 0 <= chosen <= items <= 200:
        raise ToolRefusal("no more can be chosen than there are, and there may be 200 at most")
    return math.comb(items, chosen)


def round_number(value: float, decimals: int = 0) -> float:
    """Round a number to some decimals."""
    if not 0 <= decimals <= 6:
        raise ToolRefusal("decimals must lie between 0 and 6")
    return round(value, decimals)


def area(shape: str, width: float, height: float | None = None) -> float:
    """Area of a shape; a circle's width is its diameter."""
    if width <= 0 or (height is not None and height <= 0):
        raise ToolRefusal("sizes must be greater than zero")
    if shape == "circle":
        return math.pi * width * width / 4
    sides = width * (width if height is None else height)
    return sides / 2 if shape == "triangle" else sides


def split_bill(total: float, people: int, tip_percent: float = 0) -> float:
    """Share of each person of a bill."""
    if people < 1:
        raise ToolRefusal("at least one person must pay")
    if total < 0:
        raise ToolRefusal("the total cannot be negative")
    return total * (1 + tip_percent / 100) / people


def simple_interest(principal: float, rate_percent: float, years: float) -> float:
    """Simple interest earned."""
    if years < 0:
        raise ToolRefusal("the number of years cannot be negative")
    return principal * rate_percent * years / 100


def average_speed(distance: float, hours: float) -> float:
    """Average speed from distance and hours."""
    if hours <= 0:
        raise ToolRefusal("the time must be longer than zero")
    return distance / hours


_OPERATIONS = choice("add", "subtract", "multiply", "divide", "power")
_MEASURES = choice("sum", "mean", "median", "min", "max", "range")

TOOLS: tuple[Tool, ...] = (
    make_tool("math", "do arithmetic", arithmetic, operation=_OPERATIONS, a=NUMBER, b=NUMBER),
    make_tool("math", "take percentages", percent_of, percent=NUMBER, value=NUMBER),
    make_tool("math", "compute a change in percent", percent_change, before=NUMBER, after=NUMBER),
    make_tool("math", "summarize a list of numbers", statistics, numbers=list_of(NUMBER), measure=_MEASURES),
    make_tool("math", "take roots", root, value=NUMBER, degree={**INTEGER, "default": 2}),
    make_tool("math", "find common divisors", greatest_common_divisor, a=INTEGER, b=INTEGER),
    make_tool("math", "find common multiples", least_common_multiple, a=INTEGER, b=INTEGER),
    make_tool("math", "test for prime numbers", is_prime, number=INTEGER),
    make_tool("math", "find prime factors", prime_factors, number=INTEGER),
    make_tool("math", "compute factorials", factorial, number=INTEGER),
    make_tool("math", "count combinations", combinations, items=INTEGER, chosen=INTEGER),
    make_tool("math", "round numbers", round_number, value=NUMBER, decimals={**INTEGER, "default": 0}),
    make_tool(
        "math",
        "compute areas",
        area,
        shape=choice("rectangle", "square", "circle", "triangle"),
        width=NUMBER,
        height=NUMBER,
        optional=("height",),
    ),
    make_tool("math", "split bills", split_bill, total=NUMBER, people=INTEGER, tip_percent={**NUMBER, "default": 0}),
    make_tool("math", "compute interest", simple_interest, principal=NUMBER, rate_percent=NUMBER, years=NUMBER),
    make_tool("math", "compute average speeds", average_speed, distance=NUMBER, hours=NUMBER),
)
