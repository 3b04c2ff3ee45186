"""Lines and manifests that cannot be what the generator wrote: the report fails the set, or names the file and line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.dataset.dialogues.generate import FILES, MANIFEST
from finetune.dataset.dialogues.quality import read_manifest, report
from finetune.dataset.errors import DialogueError
from tests.finetune.dataset.dialogues.conftest import changed_report

UNUSABLE: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (
        lambda row: row.update(messages=[one for one in row["messages"] if one["role"] != "user"]),
        "the messages come as",
    ),
    (lambda row: row["messages"][0].pop("role"), "messages.0: Unable to extract tag using discriminator 'role'"),
    (lambda row: row["messages"].clear(), "messages: List should have at least 1 item"),
    (lambda row: row["messages"][-1].update(content=5), "content: expected a string"),
    (lambda row: row["messages"][-1].update(tool_calls=[{}]), "tool_calls.0.id: Field required"),
]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(("fault", "word"), UNUSABLE)
def test_a_line_without_a_usable_request_fails_the_set(
    name: str, fault: Callable[[dict[str, Any]], Any], word: str, tiny: Path, tmp_path: Path
) -> None:
    found = changed_report(tiny, tmp_path, name, lambda rows: fault(rows[0]))
    (failed,) = [one for one in found["checks"] if one["name"] == "schema valid"]
    assert (failed["num_bad"], found["ok"]) == (1, False)
    assert f"{name}, line 1: " in failed["detail"]
    assert word in failed["detail"]


def test_a_set_of_nothing_but_bad_lines_fails(tiny: Path, tmp_path: Path) -> None:
    def change(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            row["messages"].clear()

    found = changed_report(tiny, tmp_path, "validation.jsonl", change)
    assert not found["ok"]
    assert found["parts"]["validation"]["request_characters"]["max"] == 0


def test_arguments_that_a_tool_cannot_take_fail_the_set(tiny: Path, tmp_path: Path) -> None:
    """The message and what is expected alike, a number as the schema wants it."""

    def change(rows: list[dict[str, Any]]) -> None:
        row = next(row for row in rows if row["subject"].startswith("convert_"))
        call = next(message for message in row["messages"] if message.get("tool_calls"))["tool_calls"][0]["function"]
        arguments = row["expected"][0]["arguments"]
        arguments[next(name for name, value in arguments.items() if not isinstance(value, str))] = 10**400
        call["arguments"] = json.dumps(arguments)

    found = changed_report(tiny, tmp_path, "train.jsonl", change)
    (failed,) = [one for one in found["checks"] if one["name"] == "tool results verified"]
    assert failed["num_bad"] == 1
    assert "a tool cannot take its arguments: int too large" in failed["detail"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"id": [1]}, r"'id' must be a string, not \[1\]"),
        ({"family": [1]}, r"'family' must be a string, not \[1\]"),
        ({"template_text": 5}, "'template_text' must be a string, not 5"),
        ({"aliases": {"plus": 5}}, "'aliases' must be an object of objects"),
        ({"aliases": {"plus": {"tool": "add", "arguments": {"a": [1]}, "description": ""}}}, "'aliases' must be"),
        ({"difficulty": float("inf")}, "'difficulty' must be a number, not inf"),
        (
            {"messages": [{"role": "user", "content": "\ud800"}]},
            r"the text has '\\ud800', which is half of a character",
        ),
    ],
)
def test_a_field_of_the_wrong_type_is_named_with_its_line(
    changed: dict[str, Any], message: str, tiny: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "bad"
    shutil.copytree(tiny, folder)
    first, *others = (folder / "train.jsonl").read_bytes().splitlines(keepends=True)
    line = json.dumps(json.loads(first) | changed).encode() + b"\n"
    (folder / "train.jsonl").write_bytes(b"".join([line, *others]))
    with pytest.raises(DialogueError, match=rf"train\.jsonl, line 1: {message}"):
        report(folder)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"files": {}}, "'files' must give the 'rows' and 'sha256' of 'train.jsonl'"),
        ({"files": {name: {"rows": 1, "sha256": 5} for name in FILES}}, "'files' must give the 'rows' and 'sha256'"),
        ({"files": []}, "'files' must be an object"),
        ({"templates": 5}, "'templates' must be an object"),
        ({"options": None}, "'options' must be an object"),
        ({"digest": 5}, "'digest' must be a string"),
    ],
)
def test_a_manifest_with_other_content_is_named(
    changed: dict[str, Any], message: str, tiny: Path, tmp_path: Path
) -> None:
    manifest = json.loads((tiny / MANIFEST).read_bytes()) | changed
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(DialogueError, match=rf"manifest\.json cannot be read: {message}"):
        read_manifest(tmp_path)
