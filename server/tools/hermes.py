"""Folds tools into plain messages, for chat templates that know nothing of tools: the Hermes convention.

The offered tools become part of the system message (`<tools>`, one JSON signature a line, and how to answer), the
assistant's earlier calls become `<tool_call>` blocks in its text, and tool results become user turns of
`<tool_response>` blocks, consecutive ones in one turn, because such templates have no tool role. The result holds only
`role` and `content` (and `name`, where a message had one). `parser.py` reads the answer back.

Messages come normalized: `content` is a string, calls' `arguments` are objects. Not covered: templates that support
tools themselves; those get messages and tools as they are.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

_INSTRUCTIONS = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{signatures}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


def fold_tools(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
) -> list[dict[str, Any]]:
    """Messages with roles system, user and assistant only. Without tools, the history is still folded."""
    folded: list[dict[str, Any]] = []
    after_tool_result = False
    for message in messages:
        is_tool_result = message["role"] == "tool"
        if not is_tool_result:
            folded.append(_plain(message))
        elif after_tool_result:
            folded[-1]["content"] += "\n" + _response(message)
        else:
            folded.append({"role": "user", "content": _response(message)})
        after_tool_result = is_tool_result
    return _with_signatures(folded, tools) if tools else folded


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    blocks = [message["content"]] if message.get("content") else []
    blocks += [_call(call) for call in message.get("tool_calls") or ()]
    kept = {key: message[key] for key in ("role", "name") if message.get(key) is not None}
    return {**kept, "content": "\n".join(blocks)}


def _call(call: Mapping[str, Any]) -> str:
    function = call["function"]
    return f"<tool_call>\n{_dumps({'name': function['name'], 'arguments': function['arguments']})}\n</tool_call>"


def _response(message: Mapping[str, Any]) -> str:
    return f"<tool_response>\n{message.get('content') or ''}\n</tool_response>"


def _with_signatures(messages: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    text = _INSTRUCTIONS.format(signatures="\n".join(_dumps(_signature(tool)) for tool in tools))
    if not messages or messages[0]["role"] != "system":
        return [{"role": "system", "content": text}, *messages]
    system = messages[0]
    own = system["content"]
    return [{**system, "content": f"{own}\n\n{text}" if own else text}, *messages[1:]]


def _signature(tool: Mapping[str, Any]) -> dict[str, Any]:
    """What the model is told: `strict` is an order to the server, not a part of the signature."""
    function = {key: value for key, value in tool["function"].items() if key != "strict" and value is not None}
    return {"type": "function", "function": function}


def _dumps(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
