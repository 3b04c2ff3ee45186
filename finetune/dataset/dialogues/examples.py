"""One example of a data set: a whole dialogue in OpenAI's fine-tuning form with what is known about it, as a JSON line.

`messages` and `tools` are what OpenAI's fine-tuning files hold; the keys beside them are ours. Every assistant message
is a turn to learn: `turns` gives the request before it, the message, and the calls that are right. Reading checks the
form of a line and says which one is wrong; whether its content is right is the report's business (quality.py).
"""

import json
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
        """Raises ValueError that says what is wrong."""
        if not line.strip():
            raise ValueError("the line is empty")
        value = json.loads(line)
        if not isinstance(value, dict):
            raise ValueError("the line is no JSON object")
        names = [field.name for field in fields(cls)]
        if missing := [name for name in names if name not in value and name != "aliases"]:
            raise ValueError(f"the key '{missing[0]}' is missing")
        if unknown := [name for name in value if name not in names]:
            raise ValueError(f"there is no key '{unknown[0]}'; there are {', '.join(names)}")
        for name, accepted in (("part", PARTS), ("kind", KINDS), ("category", CATEGORIES)):
            if value[name] not in accepted:
                raise ValueError(f"'{name}' must be one of {', '.join(accepted)}, not {value[name]!r:.40}")
        for name in ("expected", "messages", "tools"):
            if not isinstance(value[name], list) or not all(isinstance(one, dict) for one in value[name]):
                raise ValueError(f"'{name}' must be a list of objects")
        if not isinstance(value.get("aliases", {}), dict):
            raise ValueError("'aliases' must be an object")
        if isinstance(value["difficulty"], bool) or not isinstance(value["difficulty"], int | float):
            raise ValueError("'difficulty' must be a number")
        return cls(**value)


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
    except ValueError as error:  # json.JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise DialogueError(f"{path}, line {number}: {error}") from None
    if not number:
        raise DialogueError(f"{path} is empty: a data set has at least one line")
