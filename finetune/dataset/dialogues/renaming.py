"""The same tools under other names, so that a model reads the signature it is given instead of remembering one.

A renamed tool has another name, other argument names and another description, and does the same. Which names belong
together is drawn per tool (the k-th name with every argument's k-th name); the last ones are kept for the held-out part
"renamed_tools" and are in no training example. Names in snake_case, or in camelCase now and then.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Self

from finetune.dataset.dialogues.drawing import Dice
from finetune.dataset.dialogues.scenarios import HERE
from finetune.dataset.dialogues.tool import Tool
from finetune.dataset.dialogues.toolbox import TOOLS
from finetune.dataset.dialogues.wording import capitalized

CAMEL_SHARE = 0.2
_DESCRIPTIONS = ("{description}", "{purpose}", "Tool to {purpose_low}", "Use it to {purpose_low}", "Can {purpose_low}")


@dataclass(frozen=True, slots=True)
class ShownTool:
    """How an example offers a tool."""

    tool: Tool
    name: str
    arguments: Mapping[str, str]
    """Shown name by the tool's own, for every argument."""
    description: str

    @classmethod
    def plain(cls, tool: Tool) -> Self:
        return cls(tool, tool.name, {name: name for name in tool.parameters["properties"]}, tool.description)

    @classmethod
    def from_alias(cls, name: str, alias: Mapping[str, Any]) -> Self:
        """As an example's `aliases` has it. Raises KeyError for a tool that there is not."""
        return cls(TOOLS[alias["tool"]], name, dict(alias["arguments"]), str(alias["description"]))

    def alias(self) -> dict[str, Any]:
        return {"tool": self.tool.name, "arguments": dict(self.arguments), "description": self.description}

    @property
    def is_renamed(self) -> bool:
        return self != ShownTool.plain(self.tool)

    def signature(self) -> dict[str, Any]:
        own = self.tool.parameters
        parameters = {
            "type": "object",
            "properties": {self.arguments[name]: schema for name, schema in own["properties"].items()},
            "required": [self.arguments[name] for name in own["required"]],
        }
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}

    def shown(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        return {self.arguments[name]: value for name, value in arguments.items()}

    def own(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The tool's argument names for shown ones; a name that is not shown stays, for the check to find."""
        names = {shown: name for name, shown in self.arguments.items()}
        return {names.get(shown, shown): value for shown, value in arguments.items()}


def renamed(tool: Tool, dice: Dice, *, held_out: bool) -> ShownTool:
    """Training's names, or with `held_out` the ones that training never sees."""
    content = _aliases()
    names = content["tools"][tool.name]
    kept = len(names) - 1
    style = kept if held_out else dice.below(kept)
    is_camel = dice.chance(CAMEL_SHARE)
    shown: dict[str, str] = {}
    for name in tool.parameters["properties"]:
        # Half of the time an argument keeps its own name: signatures differ in parts.
        other = content["arguments"][name][style] if held_out or dice.chance(0.5) else name
        shown[name] = other if other not in shown.values() else name
    if is_camel:
        shown = {name: _camel(other) for name, other in shown.items()}
    purpose = tool.purpose
    _, bracket, rest = tool.description.partition(" (")  # how a date is written must be said by every description
    values = {"description": tool.description, "purpose": capitalized(purpose), "purpose_low": purpose}
    form = dice.pick(_DESCRIPTIONS)
    description = form.format(**values) + ("" if form == _DESCRIPTIONS[0] else bracket + rest)
    return ShownTool(tool, _camel(names[style]) if is_camel else names[style], shown, description)


@cache
def _aliases() -> dict[str, dict[str, list[str]]]:
    return tomllib.loads((HERE / "aliases.toml").read_text("utf-8"))


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(map(capitalized, rest))
