"""The ways in which models write tool calls as text, as data.

`ToolCallParser` (parser.py) and the forced-call grammars (constraint.py) both read these descriptions, so what a
grammar lets the model write is what the parser reads back. Three formats are known:

- `hermes`: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, one block a call (Hermes, Qwen 2.5 and 3, and
  every template without tool support, whose messages `hermes.py` folds into this convention);
- `llama3_json`: the answer is `{"name": ..., "parameters": {...}}`, several separated by `;`, possibly after
  `<|python_tag|>` (Llama 3.1 and later);
- `mistral`: `[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]`.

Not covered: Mistral's later `[TOOL_CALLS]name[ARGS]{...}` and formats that are not JSON.
"""

from dataclasses import dataclass
from typing import Literal

ToolFormatName = Literal["hermes", "llama3_json", "mistral"]

WHITESPACE = " \t\r\n"


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """One format. A section is: marker, whitespace, `opening`, calls separated by `separator`, `closing`."""

    name: ToolFormatName
    marker: str
    """Text that begins a section. It may be one special token: see `ToolCallParser` on detokenizing."""
    opening: str
    """Literal between the marker and the first call ("" for none)."""
    separator: str
    """Literal between two calls of one section ("" when each call has a section of its own)."""
    closing: str
    """Literal that ends the section ("" when the answer's end does)."""
    argument_keys: tuple[str, ...]
    """Names of the arguments' key; the first is the one we make the model write."""
    starts_bare: bool = False
    """An answer whose first character is `{` is a call without the marker."""


HERMES = ToolFormat("hermes", "<tool_call>", "", "", "</tool_call>", ("arguments",))
LLAMA3_JSON = ToolFormat("llama3_json", "<|python_tag|>", "", ";", "", ("parameters", "arguments"), starts_bare=True)
MISTRAL = ToolFormat("mistral", "[TOOL_CALLS]", "[", ",", "]", ("arguments",))

TOOL_FORMATS: dict[ToolFormatName, ToolFormat] = {f.name: f for f in (HERMES, LLAMA3_JSON, MISTRAL)}


def detect_tool_format(template_text: str | None, supports_tools: bool) -> ToolFormat:
    """The format that a chat template teaches its model; Hermes when the template has none of its own."""
    if not supports_tools or template_text is None:
        return HERMES
    if MISTRAL.marker in template_text:
        return MISTRAL
    if HERMES.marker in template_text:
        return HERMES
    if LLAMA3_JSON.marker in template_text or "<|start_header_id|>" in template_text:
        return LLAMA3_JSON
    return HERMES
