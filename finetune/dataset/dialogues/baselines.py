"""What simple rules reach on a data set: always call, never call, and copy the nearest training example.

A number of the model card means something only beside these. `AlwaysCall` is as good as a rule gets without learning:
the offered tool whose signature shares most words with the request, numbers and quoted texts of the request in their
order, and of an enumeration the value that the request names. `NearestTemplate` finds the training request that shares
most words (Jaccard index, first one on a tie) and makes the call that was right there at the same step.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.dataset.dialogues.examples import Dialogue, Turn
from finetune.dataset.dialogues.scoring import Message

_WORD = re.compile(r"[^\W_]+")
_NUMBER = re.compile(r"-?\d+(?:[.,]\d+)*")
_QUOTED = re.compile(r"\"([^\"]+)\"|'([^']+)'")
_DONE: Message = {"role": "assistant", "content": "That is done."}


def never_call(turn: Turn) -> Message:
    return _DONE


def always_call(turn: Turn) -> Message:
    """One call to every request, whatever came before in it."""
    request = _request(turn)
    said = _words(request)
    tools = [tool["function"] for tool in turn.request["tools"]]
    if not tools:
        return _DONE
    best = max(tools, key=lambda tool: len(said & _words(f"{tool['name']} {tool['description']}")))
    numbers = [_as_number(text) for text in _NUMBER.findall(_QUOTED.sub(" ", request))]
    texts = [one or other for one, other in _QUOTED.findall(request)]
    arguments = {}
    for name in best["parameters"]["required"]:
        value = _guess(best["parameters"]["properties"][name], numbers, texts, said)
        if value is not None:
            arguments[name] = value
    return call_message(best["name"], arguments)


def _guess(schema: Mapping[str, Any], numbers: list[float], texts: list[str], said: frozenset[str]) -> Any:
    """Takes what it uses off `numbers` and `texts`; None: there is nothing to give."""
    if "enum" in schema:
        return next((value for value in schema["enum"] if value.lower() in said), schema["enum"][0])
    match schema["type"]:
        case "number" | "integer":
            return numbers.pop(0) if numbers else None
        case "string":
            return texts.pop(0) if texts else None
    taken: list[Any] = list(numbers) if schema["items"]["type"] == "number" else list(texts)
    return taken or None


class NearestTemplate:
    def __init__(self, training: Iterable[Dialogue]) -> None:
        self._calls: list[Sequence[Mapping[str, Any]]] = []
        sizes: list[int] = []
        places: defaultdict[str, list[int]] = defaultdict(list)
        for number, one in enumerate(training):
            words = _words(one.request)
            self._calls.append(one.expected)
            sizes.append(len(words))
            for word in words:
                places[word].append(number)
        self._sizes = np.array(sizes)
        self._places: dict[str, NDArray[np.int64]] = {word: np.array(found) for word, found in places.items()}
        self._last: tuple[str, int] = ("", -1)

    def __call__(self, turn: Turn) -> Message:
        calls = self._calls[self._nearest(_request(turn))]
        step = sum(message["role"] == "tool" for message in turn.request["messages"])
        return call_message(calls[step]["name"], calls[step]["arguments"]) if step < len(calls) else _DONE

    def _nearest(self, request: str) -> int:
        if self._last[0] != request:  # the turns of one dialogue come one after the other
            words = _words(request)
            common = np.zeros(len(self._sizes))
            for word in words & self._places.keys():
                common[self._places[word]] += 1
            self._last = request, int((common / (self._sizes + len(words) - common)).argmax())
        return self._last[1]


def call_message(name: str, arguments: Mapping[str, Any]) -> Message:
    function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "call_0", "type": "function", "function": function}],
    }


def _request(turn: Turn) -> str:
    return next(str(message["content"]) for message in turn.request["messages"] if message["role"] == "user")


def _words(text: str) -> frozenset[str]:
    return frozenset(_WORD.findall(text.lower()))


def _as_number(text: str) -> float:
    plain = text.replace(",", "").rstrip(".")
    value = float(plain)
    return int(value) if value == int(value) else value
