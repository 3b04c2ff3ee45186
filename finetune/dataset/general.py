"""The general set: the base's own greedy answers to everyday prompts, so that what it could before is not forgotten.

Turned into examples that are trained with KL to the base. Who asks is finetune/rounds/regression.py.
Some of the prompts are asked with tools of the training data offered: none of them fits, and the base, which does not
call them, shows what not calling looks like. Answers in which it attempts a call all the same are left out.
"""

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.dataset.errors import UnrenderableError
from finetune.dataset.near import normalized
from finetune.dataset.render import Renderer, chat_request
from finetune.dataset.rows import ExampleRow, canonical_json, class_digits
from finetune.dataset.source import last_seq, read_traces
from server.storage.database import Database
from server.tools.well_formed import judge_calls

MAX_ANSWER_TOKENS = 160
"""A base answer's style shows in its first sentences; the rest costs training time."""
TOOLS_SHARE = 0.5
MAX_TOOL_SETS = 64
MAX_LOOKED_AT = 2_000
"""Traces in which sets of tools are looked for: a second or two."""


@dataclass(frozen=True, slots=True)
class GeneralRequest:
    name: str
    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]]


def recent_tool_sets(
    database: Database, adapter: str, *, until_seq: int | None = None, max_sets: int = MAX_TOOL_SETS
) -> list[Sequence[Mapping[str, Any]]]:
    """What the newest requests to learn from offer, each set of tools once."""
    found: dict[bytes, Sequence[Mapping[str, Any]]] = {}
    until = last_seq(database) if until_seq is None else until_seq
    for trace in itertools.islice(read_traces(database, adapter, "train", until_seq=until), MAX_LOOKED_AT):
        tools = trace.request.get("tools")
        if tools and not trace.is_redacted:
            found.setdefault(canonical_json(tools), tools)
        if len(found) == max_sets:
            break
    return list(found.values())


def general_requests(
    prompts: Sequence[str],
    tool_sets: Sequence[Sequence[Mapping[str, Any]]],
    *,
    seed: int,
    tools_share: float = TOOLS_SHARE,
) -> list[GeneralRequest]:
    """`tool_sets`: what requests of the training data offer; which prompt gets which is drawn from digests."""
    found = []
    for number, prompt in enumerate(prompts):
        draw = int.from_bytes(hashlib.blake2b(f"{seed}\n{prompt}".encode(), digest_size=16).digest(), "big")
        has_tools = bool(tool_sets) and (draw % 2**32) < tools_share * 2**32
        tools = tool_sets[(draw >> 32) % len(tool_sets)] if has_tools else ()
        found.append(GeneralRequest(f"general:{number}", [{"role": "user", "content": prompt}], tools))
    return found


def general_row(renderer: Renderer, request: GeneralRequest, choice: Mapping[str, Any]) -> ExampleRow | None:
    """None for an answer that attempts a call, says nothing, or would not come back from the parsers."""
    message = choice["message"]
    if judge_calls(message, request.tools).num_calls or not (message.get("content") or "").strip():
        return None
    logged = {"messages": request.messages, "tools": request.tools or None}
    try:
        rendered = renderer.answer(chat_request(logged), message)
    except UnrenderableError:
        return None
    # An answer that was cut by its limit did not end there, and must not be taught to.
    kept = len(rendered.answer_ids) - (choice["finish_reason"] == "length")
    return ExampleRow(
        id=request.name,
        seq=0,
        cluster=request.name,
        kind="no_call" if request.tools else "chat",
        origin="base",
        source="",
        question=normalized(str(request.messages[-1]["content"])),
        tools=[tool["function"]["name"] for tool in request.tools],
        prompt_ids=rendered.prompt_ids,
        answer_ids=rendered.answer_ids[:kept],
        classes=class_digits(rendered.classes[:kept]),
    )
