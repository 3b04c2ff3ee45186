"""Held-out questions with known answers, and scripts that answer them well or badly."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from finetune.dataset.rows import HeldOutRow

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "required": ["a"]}}}


def call(value: int) -> dict[str, Any]:
    function = {"name": "add", "arguments": json.dumps({"a": value})}
    return {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function", "function": function}]}


def held_out(number: int, *, expects_call: bool, **changes: Any) -> HeldOutRow:
    """Question number `number`; a right call says it."""
    row = HeldOutRow(
        id=f"trace-{number}",
        seq=number,
        created_at="2026-01-01T00:00:00+00:00",
        cluster=f"cluster-{number}",
        kind="call" if expects_call else "no_call",
        request={
            "messages": [{"role": "user", "content": f"{'add' if expects_call else 'chat'} {number}"}],
            "tools": [TOOL],
        },
        target=call(number) if expects_call else {"role": "assistant", "content": "No."},
        origin="correction",
        source="known_answer",
        is_audit=False,
        feedback=[],
        served=None,
        version=None,
        question=str(number),
        prompt_ids=[1, 2, number],
        answer_ids=[3, 4],
        classes="11",
    )
    return replace(row, **changes)


def questions(first: int = 1, num_call: int = 80, num_none: int = 40) -> list[HeldOutRow]:
    count = num_call + num_none
    return [held_out(first + index, expects_call=index % count < num_call) for index in range(count)]


def good(body: Mapping[str, Any]) -> dict[str, Any]:
    """Right to every question."""
    word, number = body["messages"][-1]["content"].split()
    return call(int(number)) if word == "add" else {"role": "assistant", "content": "No."}


def always_calling(body: Mapping[str, Any]) -> dict[str, Any]:
    return call(int(body["messages"][-1]["content"].split()[1]))


@dataclass
class Held:
    """As much of a snapshot as the gate wants."""

    rows: Sequence[HeldOutRow]

    @property
    def manifest(self) -> Any:
        return SimpleNamespace(tools=["add"])

    def held_out(self) -> Iterator[HeldOutRow]:
        return iter(self.rows)
