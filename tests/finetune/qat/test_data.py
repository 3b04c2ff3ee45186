"""Lines of both forms are read, and a broken one is named with what is wrong before anything renders it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.dataset.dialogues.examples import MAX_NESTING, Dialogue
from finetune.dataset.errors import DialogueError
from finetune.qat.data import Source

Row = dict[str, Any]
QUESTION: Row = {"role": "user", "content": "what is 2 + 3?"}
ANSWER: Row = {"role": "assistant", "content": "5"}
TOOL: Row = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def plain() -> Row:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 3}'}}
    messages = [
        QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "5"},
        ANSWER,
    ]
    copied: Row = json.loads(json.dumps({"messages": messages, "tools": [TOOL]}))
    return copied


def generated() -> Row:
    return plain() | {
        "id": "train-0",
        "part": "train",
        "kind": "tool_used",
        "category": "math",
        "family": "bakery",
        "template": "t-0",
        "template_text": "what is {a} + {b}?",
        "subject": "add",
        "augmentation": "plain",
        "difficulty": 0.5,
        "expected": [{"name": "add", "arguments": {"a": 2, "b": 3}}],
    }


def read(path: Path, *lines: bytes) -> list[Dialogue]:
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    source = Source(path)
    return [one for _, one in [*source.train(), *source.held_out()]]


def encoded(row: Row) -> bytes:
    return json.dumps(row).encode()


@pytest.mark.parametrize("form", [plain, generated])
def test_both_forms_are_read(form: Callable[[], Row], tmp_path: Path) -> None:
    (found,) = read(tmp_path / "all.jsonl", encoded(form()))
    assert (found.messages, found.tools) == (plain()["messages"], plain()["tools"])
    assert (found.kind, found.part) == ("tool_used", "train")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [QUESTION, ANSWER | {"weight": 0}, QUESTION, ANSWER | {"weight": 1}]},
        {"messages": [QUESTION, ANSWER], "tools": None, "parallel_tool_calls": False},
        {"messages": [{"role": "developer", "content": "Be brief."}, QUESTION, ANSWER, QUESTION], "tools": []},
        {"messages": [QUESTION | {"content": [{"type": "text", "text": "\N{BIRD}"}]}, ANSWER]},
    ],
)
def test_what_openai_accepts_is_read(row: Row, tmp_path: Path) -> None:
    (found,) = read(tmp_path / "all.jsonl", encoded(row))
    assert found.messages == row["messages"]


def _call(row: Row) -> Row:
    found: Row = row["messages"][1]["tool_calls"][0]
    return found


MESSAGE_FAULTS: list[tuple[Callable[[Row], Any], str]] = [
    (lambda row: row["messages"][0].pop("role"), r"messages\.0: .*'role'"),
    (lambda row: row["messages"][0].update(role=[1]), r"messages\.0: unknown role"),
    (lambda row: row["messages"][0].update(content=5), r"messages\.0\.user\.content: expected a string"),
    (lambda row: row["messages"][0].update(content="\ud800"), r"the text has '\\ud800', which is half of a character"),
    (lambda row: row["messages"][1].update(tool_calls="x"), r"messages\.1\.assistant\.tool_calls: .*list"),
    (lambda row: _call(row).pop("function"), r"messages\.1\.assistant\.tool_calls\.0\.function: Field required"),
    (lambda row: _call(row)["function"].update(arguments={}), r"tool_calls\.0\.function\.arguments: .*string"),
    (lambda row: _call(row)["function"].update(arguments="{"), "the arguments of 'add' are no JSON object"),
    (lambda row: _call(row)["function"].update(arguments="[]"), "the arguments of 'add' are no JSON object"),
    (lambda row: _call(row)["function"].update(arguments='{"a": "\\ud800"}'), "half of a character"),
    (
        lambda row: _call(row)["function"].update(arguments='{"a":' * 400 + "1" + "}" * 400),
        f"nested more than {MAX_NESTING} deep",
    ),
    (lambda row: row["tools"][0].pop("function"), r"tools\.0\.function: Field required"),
    (lambda row: row["tools"].append(TOOL), "'tools' defines the function 'add' more than once"),
    (lambda row: row.update(messages=[QUESTION]), "'messages' has no assistant message to learn"),
    (lambda row: row.update(messages=5), "'messages' must be a list of objects"),
]
KEY_FAULTS: list[tuple[Callable[[Row], Any], str]] = [
    *((lambda row, name=name: row.update({name: [1]}), rf"'{name}' must be a string, not \[1\]")
      for name in ("id", "family", "template", "template_text", "subject", "augmentation")),
    (lambda row: row.update(part=[1]), "'part' must be one of"),
    (lambda row: row.update(difficulty=10**400), "'difficulty' must be a number"),
    (lambda row: row.update(difficulty=float("nan")), "'difficulty' must be a number, not nan"),
    (lambda row: row.update(aliases={"plus": 5}), "'aliases' must be an object of objects"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("form", "fault", "message"),
    [
        *((form, *one) for form in (plain, generated) for one in MESSAGE_FAULTS),
        *((generated, *one) for one in KEY_FAULTS),
    ],
)
def test_a_broken_line_is_named(
    form: Callable[[], Row], fault: Callable[[Row], Any], message: str, tmp_path: Path
) -> None:
    row = form()
    fault(row)
    with pytest.raises(DialogueError, match=rf"all\.jsonl, line 3: .*{message}"):
        read(tmp_path / "all.jsonl", encoded(form()), encoded(form()), encoded(row))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"[" * 200_000, "recursion"),
        (b"[]", "the line is no JSON object"),
        (b"", "the line is empty"),
        (b"\xff", "can't decode"),
        (b'{"messages": [{"role": "user", "content": "\xed\xa0\x80"}]}', "half of a character"),
    ],
)
def test_a_line_that_is_no_json_is_named(line: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(DialogueError, match=rf"all\.jsonl, line 3: .*{message}"):
        read(tmp_path / "all.jsonl", encoded(plain()), encoded(plain()), line)
