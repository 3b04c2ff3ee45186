"""What a right answer is: the expected tool calls with every accepted value, or that no tool is to be called.

Made from a known answer in the form of the Berkeley Function Calling Leaderboard (a list of accepted values for each
parameter, "" among them: it may be left out), or from an assistant message that is right as it stands (a correction,
an audited answer). Not here: comparing (match.py), and where the labels come from.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from finetune.errors import FinetuneError


class BadLabelError(FinetuneError):
    """A label that is no possible answer: nothing can be judged by it."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """Any of `values` is right: a JSON value, a list, or a mapping from key to `Accepted`."""

    values: tuple[Any, ...]
    may_be_absent: bool = False


@dataclass(frozen=True, slots=True)
class ExpectedCall:
    name: str
    arguments: Mapping[str, Accepted]


Expected = tuple[ExpectedCall, ...]
"""In any order. Empty: no tool is to be called."""

NO_CALL: Expected = ()


def expected_from_bfcl(ground_truth: Sequence[Mapping[str, Mapping[str, Sequence[Any]]]]) -> Expected:
    """A leaderboard's `ground_truth`: `[{"area": {"base": [10], "unit": ["cm", ""]}}]`. Raises BadLabelError."""
    calls = []
    for call in ground_truth:
        if len(call) != 1:
            raise BadLabelError(f"an expected call names one tool, not {sorted(call)}")
        name, arguments = next(iter(call.items()))
        if not isinstance(arguments, Mapping):
            raise BadLabelError(f"'{name}' needs accepted values by parameter, got {arguments!r:.80}")
        calls.append(ExpectedCall(name, {key: _accepted(key, values) for key, values in arguments.items()}))
    return tuple(calls)


def _accepted(key: str, values: Any) -> Accepted:
    if not isinstance(values, list | tuple) or not values:
        raise BadLabelError(f"'{key}' needs a list of accepted values, got {values!r:.80}")
    others = [value for value in values if value != ""]
    is_text = all(isinstance(value, str) for value in others)  # only then is "" also a value that may be given
    given = values if is_text else others
    return Accepted(tuple(_nested(key, value) for value in given), may_be_absent="" in values)


def _nested(key: str, value: Any) -> Any:
    """Inside objects the leaderboard gives a list of accepted values for every key too."""
    if isinstance(value, Mapping):
        return {inner: _accepted(f"{key}.{inner}", values) for inner, values in value.items()}
    if isinstance(value, list | tuple):
        return [_nested(key, item) for item in value]
    return value


def expected_from_message(message: Mapping[str, Any]) -> Expected:
    """An assistant message that is right: its calls with exactly these values. Raises BadLabelError."""
    calls = []
    for call in message.get("tool_calls") or ():
        function = call["function"]
        arguments = parse_arguments(function["arguments"])
        if arguments is None:
            raise BadLabelError(f"the arguments of '{function['name']}' are no JSON object")
        calls.append(ExpectedCall(function["name"], {key: exactly(value) for key, value in arguments.items()}))
    return tuple(calls)


def exactly(value: Any) -> Accepted:
    return Accepted((_exact(value),))


def _exact(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: exactly(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_exact(item) for item in value]
    return value


def parse_arguments(text: str) -> dict[str, Any] | None:
    """A call's arguments as OpenAI's wire has them: the JSON text of an object. None: they are not."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
