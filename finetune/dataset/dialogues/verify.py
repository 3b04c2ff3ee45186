"""Whether one example is right in itself: its tools, its calls, what the tools said, and the order of its messages.

Signatures are checked as the server checks a request's, arguments against the schema that the example offers, and
every tool is run again on the arguments: what it says must be what the dialogue has. Not here: the set as a whole
(quality.py).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from finetune.dataset.dialogues.examples import Dialogue, read_dialogues, shown_tool
from finetune.dataset.dialogues.tool import ArgumentsError, check_arguments, run_tool
from finetune.dataset.dialogues.toolbox import TOOLS
from finetune.dataset.errors import DialogueError
from finetune.gate.expected import parse_arguments
from server.openai.protocol.chat import ChatRequest

_NUM_CALLS = {"tool_used": (1, 1), "no_tool": (0, 0), "tool_error": (1, 1), "multi_tool": (2, 4)}


def read_sound(path: Path) -> Iterator[Dialogue]:
    """Dialogues that can be asked and judged. Raises DialogueError naming the first line that cannot."""
    for number, one in enumerate(read_dialogues(path), 1):
        problem = form_problem(one)
        if problem is not None:
            raise DialogueError(f"{path}, line {number}: {problem}; `sterna dataset report {path.parent}` tells all")
        yield one


def form_problem(dialogue: Dialogue) -> str | None:
    """What is wrong with signatures, order, arguments or metadata; None: nothing."""
    try:
        ChatRequest.model_validate({"model": "-", "messages": dialogue.messages, "tools": dialogue.tools})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    for tool in dialogue.tools:
        name = tool["function"]["name"]
        try:
            signature = shown_tool(dialogue, name).signature()
        except KeyError:
            return f"there is no tool '{name}'"
        if tool != signature:
            return f"the signature of '{name}' is not the tool's"
    if not 0 <= dialogue.difficulty <= 1:
        return f"the difficulty {dialogue.difficulty} is not in [0, 1]"
    roles = [message["role"] for message in dialogue.messages]
    calls = _calls(dialogue)
    if roles != [
        *(["system"] if roles[0] == "system" else []),
        "user",
        *["assistant", "tool"] * len(calls),
        "assistant",
    ]:
        return f"the messages come as {', '.join(roles)}"
    if dialogue.messages[-1].get("tool_calls") or not dialogue.messages[-1].get("content"):
        return "the last message is no answer"
    low, high = _NUM_CALLS[dialogue.kind]
    if not low <= len(calls) <= high:
        return f"a {dialogue.kind} example with {len(calls)} calls"
    return _arguments_problem(dialogue, calls)


def _arguments_problem(dialogue: Dialogue, calls: Sequence[Mapping[str, Any]]) -> str | None:
    offered = {tool["function"]["name"]: tool["function"]["parameters"] for tool in dialogue.tools}
    found = []
    for call in calls:
        name, arguments = call["function"]["name"], parse_arguments(call["function"]["arguments"])
        if name not in offered:
            return f"'{name}' is called but not offered"
        if arguments is None:
            return f"the arguments of '{name}' are no JSON object"
        try:
            check_arguments(offered[name], arguments)
        except ArgumentsError as error:
            return f"'{name}': {error}"
        found.append({"name": name, "arguments": arguments})
    return None if found == list(dialogue.expected) else "'expected' is not what the messages call"


def result_problem(dialogue: Dialogue) -> str | None:
    """What a tool says otherwise when it is run again. For examples whose form is right."""
    contents = [message["content"] for message in dialogue.messages if message["role"] == "tool"]
    for call, content in zip(dialogue.own_calls, contents, strict=True):
        again = run_tool(TOOLS[call["name"]], call["arguments"])
        if again != content:
            return f"'{call['name']}' says {again:.80}, not {content!r:.80}"
        if ("error" in json.loads(again)) != (dialogue.kind == "tool_error"):
            return f"a {dialogue.kind} example in which the tool says {again:.80}"
    return None


def _calls(dialogue: Dialogue) -> list[Mapping[str, Any]]:
    return [call for message in dialogue.messages for call in message.get("tool_calls") or ()]
