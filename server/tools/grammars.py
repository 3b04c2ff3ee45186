"""Lark grammars (llguidance's dialect) for answers of a given shape: JSON, forced tool calls, tool calls amid text.

A grammar writes exactly what `ToolCallParser` reads for the same `ToolFormat`, in the layout that models were trained
on: `<tool_call>\n{"name": "f", "arguments": {...}}\n</tool_call>`, `{"name": "f", "parameters": {...}}; {...}`,
`[TOOL_CALLS][{...}, {...}]`. Markers are written as one special token where the vocabulary has one, as text elsewhere.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from server.tools.formats import ToolFormat

_ANY_TEXT = r"/(.|\n)*/"
# Text that the parser cannot take for the beginning of a bare call, which starts with a brace.
_NO_BARE_CALL = r"/([^{ \t\r\n](.|\n)*)?/"

SpecialTokenId = Callable[[str], int | None]
"""Id of the special token that is written like the given text, or None if that is ordinary text."""


@dataclass(frozen=True, slots=True)
class CallShape:
    """One tool as the grammar sees it; `schema` is an object schema that llguidance accepts."""

    name: str
    schema: dict[str, Any]


def json_grammar(schema: dict[str, Any]) -> str:
    """An answer that is one JSON value."""
    return _lark("answer", [f"answer: {_json(schema)}"])


def forced_calls_grammar(
    tools: Sequence[CallShape], form: ToolFormat, special: SpecialTokenId, *, parallel: bool
) -> str:
    """An answer that is one call, or with `parallel` one or more, and nothing else."""
    return _lark("calls", _section_rules(tools, form, special, parallel=parallel))


def free_calls_grammar(
    tools: Sequence[CallShape], form: ToolFormat, special: SpecialTokenId, *, content: dict[str, Any] | None
) -> str:
    """Text in which every call is well formed; with `content` either calls alone or one JSON value of that schema."""
    rules = _section_rules(tools, form, special, parallel=True)
    if content is not None:
        return _lark("answer", ["answer: calls | content", f"content: {_json(content)}", *rules])
    if form.starts_bare:
        return _lark("answer", ["answer: calls | TEXT", f"TEXT: {_NO_BARE_CALL}", *rules])
    rules += ["answer: (head body)* TEXT", f"TEXT: {_ANY_TEXT}"]
    if special(form.marker) is not None:
        rules.append(f"head: TEXT {_literal(form.marker, special)}")
    else:
        rules.append(f"head[lazy]: TEXT {_quoted(form.marker)}")
    return _lark("answer", rules)


def after_reasoning(grammar: str, special: SpecialTokenId) -> str:
    """The same, after the rest of a reasoning block that the prompt has opened."""
    close = "</think>"
    if special(close) is not None:
        think = f"thinking: THOUGHT {_literal(close, special)}"
    else:
        think = f"thinking[lazy]: THOUGHT {_quoted(close)}"
    header, start, rest = grammar.split("\n", 2)
    body = start.removeprefix("start: ")
    return "\n".join([header, f'start: thinking "\\n\\n" {body}', think, f"THOUGHT: {_ANY_TEXT}", rest])


def _section_rules(
    tools: Sequence[CallShape], form: ToolFormat, special: SpecialTokenId, *, parallel: bool
) -> list[str]:
    """`calls`: a whole section with its marker, or several; `body`: what follows the marker of one section."""
    call = " | ".join(f"call_{i}" for i in range(len(tools)))
    rules = [f"call: {call}"]
    for i, tool in enumerate(tools):
        head = f'{{"name": {json.dumps(tool.name)}, "{form.argument_keys[0]}": '
        rules.append(f'call_{i}: {_quoted(head)} {_json(tool.schema)} "}}"')
    marker = "" if form.starts_bare else _literal(form.marker, special)
    if form.separator:
        more = f"({_quoted(form.separator + ' ')} call)*" if parallel else ""
        opening = _quoted(form.opening) if form.opening else ""
        closing = _quoted(form.closing) if form.closing else ""
        return [f"calls: {marker} body", f"body: {opening} call {more} {closing}", *rules]
    more = '("\\n" section)*' if parallel else ""
    body = f'body: "\\n" call "\\n" {_literal(form.closing, special)}'
    return [f"calls: section {more}", f"section: {marker} body", body, *rules]


def _lark(start: str, rules: Sequence[str]) -> str:
    return "\n".join(["%llguidance {}", f"start: {start}", *rules, ""])


def _json(schema: dict[str, Any]) -> str:
    return f"%json {json.dumps(schema)}"


def _literal(text: str, special: SpecialTokenId) -> str:
    token_id = special(text)
    return _quoted(text) if token_id is None else f"<[{token_id}]>"


def _quoted(text: str) -> str:
    return json.dumps(text)
