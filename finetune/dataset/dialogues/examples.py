"""One example of a data set: a whole dialogue in OpenAI's fine-tuning form with what is known about it, as a JSON line.

`messages` and `tools` are what OpenAI's fine-tuning files hold; the keys beside them are ours. Every assistant message
is a turn to learn: `turns` gives the request before it, the message, and the calls that are right. Reading checks the
form of a line and says which one is wrong; whether its content is right is the report's business (quality.py).
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from finetune.dataset.dialogues.renaming import ShownTool
from finetune.dataset.dialogues.subjects import KINDS, Kind
from finetune.dataset.dialogues.tool import CATEGORIES, Category
from finetune.dataset.dialogues.toolbox import TOOLS
from finetune.dataset.errors import DialogueError
from finetune.gate.expected import Expected, expected_from_message

PARTS = ("train", "validation", "families", "unseen_tools", "renamed_tools", "fresh_values")
MAX_NESTING = 200
"""Of a line and of a call's arguments. A generated one has 8; what judges arguments runs out of stack at 330."""
_TEXTS = ("id", "family", "template", "template_text", "subject", "augmentation")


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialogue:
    id: str
    part: str
    """Of `PARTS`: what it may be used for."""
    kind: Kind
    category: Category
    family: str
    template: str
    template_text: str
    """The wording with its {slots}."""
    subject: str
    augmentation: str
    difficulty: float
    expected: Sequence[Mapping[str, Any]]
    """Every call in order: {"name", "arguments"} with the arguments as an object."""
    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]]
    aliases: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Of renamed tools (renaming.py), by the name that is offered."""

    @property
    def own_calls(self) -> list[dict[str, Any]]:
        """`expected` with the tools' and arguments' own names. Raises KeyError for an alias of no tool."""
        return [
            {"name": tool.tool.name, "arguments": tool.own(call["arguments"])}
            for call in self.expected
            for tool in [shown_tool(self, call["name"])]
        ]

    @property
    def request(self) -> str:
        """What the user says."""
        return next(str(message["content"]) for message in self.messages if message["role"] == "user")

    def to_line(self) -> bytes:
        """Equal dialogues are equal bytes; keys stay in their order, which is the prompt's."""
        written = {field.name: getattr(self, field.name) for field in fields(self)}
        return json.dumps(written, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> Self:
        """Raises ValueError or RecursionError that says what is wrong."""
        return cls.from_object(read_object(line))

    @classmethod
    def from_object(cls, value: Mapping[str, Any]) -> Self:
        """Raises ValueError. Of messages and tools only that they are objects is checked."""
        names = [field.name for field in fields(cls)]
        if missing := [name for name in names if name not in value and name != "aliases"]:
            raise ValueError(f"the key '{missing[0]}' is missing")
        if unknown := [name for name in value if name not in names]:
            raise ValueError(f"there is no key '{unknown[0]}'; there are {', '.join(names)}")
        for name, accepted in (("part", PARTS), ("kind", KINDS), ("category", CATEGORIES)):
            if value[name] not in accepted:
                raise ValueError(f"'{name}' must be one of {', '.join(accepted)}, not {value[name]!r:.40}")
        for name in _TEXTS:
            if not isinstance(value[name], str):
                raise ValueError(f"'{name}' must be a string, not {value[name]!r:.40}")
        for name in ("expected", "messages", "tools"):
            if not isinstance(value[name], list) or not all(isinstance(one, dict) for one in value[name]):
                raise ValueError(f"'{name}' must be a list of objects")
        aliases = value.get("aliases", {})
        if not isinstance(aliases, dict) or not all(map(_is_alias, aliases.values())):
            raise ValueError("'aliases' must be an object of objects with 'tool', 'arguments' and 'description'")
        if not _is_finite(value["difficulty"]):
            raise ValueError(f"'difficulty' must be a number, not {value['difficulty']!r:.40}")
        return cls(**value)


def read_object(line: bytes) -> dict[str, Any]:
    """A line's JSON object. Raises ValueError that says what is wrong, RecursionError for one nested too deeply."""
    if not line.strip():
        raise ValueError("the line is empty")
    value = json.loads(line)
    if not isinstance(value, dict):
        raise ValueError("the line is no JSON object")
    check_value(value)
    return value


def check_value(value: Any) -> None:
    """Raises ValueError for JSON that cannot be rendered: too deep (if not RecursionError), or half a character."""
    text = json.dumps(value, ensure_ascii=False)
    if text.count("[") + text.count("{") > MAX_NESTING:  # rare, and a walk costs as much as all else
        layer = [value]
        for _ in range(MAX_NESTING):
            layer = [inner for one in layer if isinstance(one, dict | list)
                     for inner in (one.values() if isinstance(one, dict) else one)]  # fmt: skip
        if layer:
            raise ValueError(f"it is nested more than {MAX_NESTING} deep")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start : error.start + 1]
        raise ValueError(f"the text has {half!a}, which is half of a character") from None


def _is_alias(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("arguments"), dict):
        return False
    texts = (value.get("tool"), value.get("description"), *value["arguments"].values())
    return all(isinstance(text, str) for text in texts)


def _is_finite(value: Any) -> bool:
    """Fits float64 as well: JSON has integers of any size, and Python's has NaN."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) <= sys.float_info.max


def shown_tool(dialogue: Dialogue, name: str) -> ShownTool:
    """What is offered under this name. Raises KeyError."""
    alias = dialogue.aliases.get(name)
    return ShownTool.plain(TOOLS[name]) if alias is None else ShownTool.from_alias(name, alias)


@dataclass(frozen=True, slots=True)
class Turn:
    """One assistant message to learn, and the request that it answers (as `chat_request` of render.py reads it)."""

    request: Mapping[str, Any]
    message: Mapping[str, Any]
    expected: Expected


def turns(dialogue: Dialogue) -> list[Turn]:
    """Earlier thinking is left out of the history: clients do not send it back."""
    found = []
    for place, message in enumerate(dialogue.messages):
        if message["role"] == "assistant":
            history = [
                {key: value for key, value in one.items() if key != "reasoning_content"}
                for one in dialogue.messages[:place]
            ]
            request = {"messages": history, "tools": list(dialogue.tools)}
            found.append(Turn(request, message, expected_from_message(message)))
    return found


def read_dialogues(path: Path) -> Iterator[Dialogue]:
    """Raises DialogueError naming the first line that is empty or broken, or the file that is."""
    number = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):  # noqa: B007 - the error names it
                if not line.endswith(b"\n"):
                    raise ValueError("the file breaks off in this line")
                yield Dialogue.from_line(line)
    except OSError as error:
        raise DialogueError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # json.JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise DialogueError(f"{path}, line {number}: {error}") from None
    if not number:
        raise DialogueError(f"{path} is empty: a data set has at least one line")
