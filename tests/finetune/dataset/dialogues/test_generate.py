"""Data sets: the same bytes for the same options, whole or not there, and a report that every kind of fault fails."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.dataset.dialogues import generate as generating
from finetune.dataset.dialogues.augment import AUGMENTATIONS
from finetune.dataset.dialogues.examples import Dialogue, read_dialogues, turns
from finetune.dataset.dialogues.generate import FILES, MANIFEST, Options, digest_of, generate
from finetune.dataset.dialogues.quality import report
from finetune.dataset.errors import DialogueError
from finetune.dataset.jsonl import file_digest
from server import cli
from tests.finetune.dataset.dialogues.conftest import TINY, changed_report


def test_the_same_options_give_the_same_bytes(tiny: Path, tmp_path: Path) -> None:
    again = generate(tmp_path / "again", TINY)
    other = generate(tmp_path / "other", Options(templates=TINY.templates, seed=8, thinking=True))
    for name in (*FILES, MANIFEST):
        assert (tmp_path / "again" / name).read_bytes() == (tiny / name).read_bytes()
    assert again["digest"] == digest_of(again) != other["digest"]


def test_a_good_set_passes_every_check(tiny: Path) -> None:
    found = report(tiny)
    assert found.ok, found.body()["checks"]
    assert found.stats["parts"]["train"]["rows"] == TINY.templates * len(AUGMENTATIONS)
    assert len(found.checks) == len({check.name for check in found.checks}) >= 15


def test_every_turn_thinks_or_none_does(tiny: Path, tmp_path: Path) -> None:
    generate(tmp_path / "plain", Options(templates=100))
    for folder, expected in ((tiny, True), (tmp_path / "plain", False)):
        for one in read_dialogues(folder / "train.jsonl"):
            for message in one.messages:
                assert ("reasoning_content" in message) == (expected and message["role"] == "assistant")


def test_a_turn_is_what_comes_before_it_without_earlier_thinking(tiny_dialogues: list[Dialogue]) -> None:
    one = next(one for one in tiny_dialogues if one.kind == "multi_tool")
    found = turns(one)
    assert [len(turn.expected) for turn in found] == [1] * len(one.expected) + [0]
    assert [len(turn.request["messages"]) for turn in found] == [
        place for place, message in enumerate(one.messages) if message["role"] == "assistant"
    ]
    assert not any("reasoning_content" in message for turn in found for message in turn.request["messages"])


def test_an_existing_folder_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    with pytest.raises(DialogueError, match="is there already"):
        generate(tmp_path / "set", TINY)
    assert list(tmp_path.iterdir()) == [tmp_path / "set"]


def test_nothing_is_left_of_a_run_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(generating, "write_file", fail)
    with pytest.raises(OSError, match="disk is full"):
        generate(tmp_path / "set", Options(templates=100))
    assert list(tmp_path.iterdir()) == []


def _break_result(row: dict[str, Any]) -> None:
    tool = next(message for message in row["messages"] if message["role"] == "tool")
    tool["content"] = '{"result": -12345}'


def _break_arguments(row: dict[str, Any]) -> None:
    call = next(message for message in row["messages"] if message.get("tool_calls"))["tool_calls"][0]["function"]
    call["arguments"] = '{"no_such": 1}'


def _break_signature(row: dict[str, Any]) -> None:
    row["tools"][0]["function"]["parameters"]["required"] = []
    row["tools"][0]["function"]["parameters"]["properties"] = {}


def _call_what_is_not_offered(row: dict[str, Any]) -> None:
    call = next(message for message in row["messages"] if message.get("tool_calls"))["tool_calls"][0]["function"]
    row["tools"] = [tool for tool in row["tools"] if tool["function"]["name"] != call["name"]]


def _end_without_answer(row: dict[str, Any]) -> None:
    row["messages"].pop()


def _move_family(row: dict[str, Any]) -> None:
    row["family"] = "railway"


FAULTS: list[tuple[str, Callable[[dict[str, Any]], None], str]] = [
    ("tool results verified", _break_result, "says"),
    ("schema valid", _break_arguments, "argument"),
    ("schema valid", _break_signature, "signature"),
    ("schema valid", _call_what_is_not_offered, "not offered"),
    ("schema valid", lambda row: row["tools"][0]["function"].update(name="teleport"), "no tool 'teleport'"),
    ("schema valid", _end_without_answer, "the messages come as"),
    ("split by families", _move_family, "'railway' is of 'held_out'"),
    ("request length", lambda row: _say(row, "x" * 700), "700 characters"),
    ("ids are unique", lambda row: row.update(id="train-00000-plain"), "again"),
    ("templates distinct", lambda row: row.update(template="other", template_text="FIRST"), "is near to"),
]


def _say(row: dict[str, Any], text: str) -> None:
    next(message for message in row["messages"] if message["role"] == "user")["content"] = text


@pytest.mark.parametrize(("check", "fault", "word"), FAULTS)
def test_a_fault_fails_its_check_and_names_the_line(
    check: str, fault: Callable[[dict[str, Any]], None], word: str, tiny: Path, tmp_path: Path
) -> None:
    def change(rows: list[dict[str, Any]]) -> None:
        number = next(number for number, row in enumerate(rows) if row["kind"] == "tool_used" and number >= 5)
        fault(rows[number])
        if rows[number]["template_text"] == "FIRST":
            rows[number]["template_text"] = rows[0]["template_text"]

    found = changed_report(tiny, tmp_path, "train.jsonl", change)
    (failed,) = [one for one in found["checks"] if one["name"] == check]
    assert not found["ok"]
    assert not failed["ok"]
    assert word in failed["detail"]
    assert "train" in failed["detail"] or check == "templates distinct"


def test_what_is_held_out_must_not_be_trained_on(tiny: Path, tmp_path: Path) -> None:
    asked = next(read_dialogues(tiny / "held_out.jsonl")).request
    found = changed_report(tiny, tmp_path, "train.jsonl", lambda rows: _say(rows[3], asked))
    assert "no overlap of parts" in {one["name"] for one in found["checks"] if not one["ok"]}


def test_tools_kept_unseen_must_not_be_offered_in_training(tiny: Path, tmp_path: Path) -> None:
    unseen = next(one for one in read_dialogues(tiny / "held_out.jsonl") if one.part == "unseen_tools")
    tools = [dict(tool) for tool in unseen.tools]
    found = changed_report(tiny, tmp_path, "validation.jsonl", lambda rows: rows[0]["tools"].extend(tools))
    assert "unseen tools unseen" in {one["name"] for one in found["checks"] if not one["ok"]}


def test_names_kept_for_renamed_tools_must_not_be_offered_in_training(tiny: Path, tmp_path: Path) -> None:
    other = next(one for one in read_dialogues(tiny / "held_out.jsonl") if one.part == "renamed_tools")

    def change(rows: list[dict[str, Any]]) -> None:
        row = next(row for row in rows if not row["tools"])
        row["tools"], row["aliases"] = [dict(tool) for tool in other.tools], dict(other.aliases)

    found = changed_report(tiny, tmp_path, "train.jsonl", change)
    assert "renamed tools renamed" in {one["name"] for one in found["checks"] if not one["ok"]}


def test_a_set_that_lost_a_kind_or_a_tool_is_out_of_balance(tiny: Path, tmp_path: Path) -> None:
    def change(rows: list[dict[str, Any]]) -> None:
        rows[:] = [row for row in rows if row["kind"] != "tool_error" and "arithmetic" not in row["subject"]]

    found = changed_report(tiny, tmp_path, "train.jsonl", change)
    failed = {one["name"] for one in found["checks"] if not one["ok"]}
    assert {"kinds in balance", "as many templates as were asked for", "digests as in the manifest"} <= failed


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("\n", "the line is empty"),
        ("{\n", "Expecting property name"),
        ("[]\n", "no JSON object"),
        ("{}\n", "the key 'id' is missing"),
        ('{"id": "a"\n', "Expecting"),
    ],
)
def test_a_bad_line_gives_one_error_that_names_it(
    line: str, word: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "bad"
    shutil.copytree(tiny, folder)
    lines = (folder / "train.jsonl").read_text("utf-8").splitlines(keepends=True)
    lines[4] = line
    (folder / "train.jsonl").write_text("".join(lines), "utf-8")
    assert cli.main(["dataset", "report", str(folder)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    (said,) = captured.err.splitlines()
    assert "train.jsonl, line 5: " in said
    assert word in said


def test_files_that_are_cut_missing_or_no_set_are_named(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(tiny, folder)
    content = (folder / "train.jsonl").read_bytes()
    (folder / "train.jsonl").write_bytes(content[:-200])
    with pytest.raises(DialogueError, match=r"train.jsonl, line 600: the file breaks off"):
        report(folder)
    (folder / "train.jsonl").write_bytes(b"")
    with pytest.raises(DialogueError, match="is empty"):
        report(folder)
    (folder / "train.jsonl").unlink()
    with pytest.raises(DialogueError, match="cannot be read"):
        report(folder)
    with pytest.raises(DialogueError, match="sterna dataset generate"):
        report(tmp_path)
    (folder / MANIFEST).write_text("[]")
    with pytest.raises(DialogueError, match="keys are not those"):
        report(folder)


def test_the_command_line_makes_a_set_and_reports_on_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tmp_path / "set")
    assert cli.main(["dataset", "generate", folder, "--templates", "100", "--json"]) == 0
    manifest = json.loads(capsys.readouterr().out)
    assert manifest["files"]["train.jsonl"]["rows"] == 500
    assert manifest["files"]["train.jsonl"]["sha256"] == file_digest(tmp_path / "set" / "train.jsonl")
    assert cli.main(["dataset", "report", folder, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"]
    assert cli.main(["dataset", "report", folder]) == 0
    assert "tool results verified" in capsys.readouterr().out
    assert cli.main(["dataset", "generate", folder]) == 1
    assert "is there already" in capsys.readouterr().err
    assert cli.main(["dataset", "generate", folder + "2", "--templates", "3"]) == 1
    assert "at least 100 templates" in capsys.readouterr().err


def test_a_set_that_fails_is_told_apart_by_its_exit_code(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed_report(
        tiny, tmp_path, "train.jsonl", lambda rows: _break_result(rows[0] if rows[0]["expected"] else rows[5])
    )
    assert cli.main(["dataset", "report", str(tmp_path / "changed"), "--json"]) == 1
    captured = capsys.readouterr()
    assert not json.loads(captured.out)["ok"]
    assert "not fit to train on: " in captured.err


@pytest.mark.slow
def test_the_full_set_has_what_was_promised(tmp_path: Path) -> None:
    generate(tmp_path / "full", Options())
    found = report(tmp_path / "full")
    assert found.ok, found.body()["checks"]
    train = found.stats["parts"]["train"]
    assert train["templates"] >= 3000
    assert train["rows"] >= 15000
    shares = {kind: count / train["rows"] for kind, count in train["kinds"].items()}
    assert shares == {"tool_used": 0.40, "no_tool": 0.35, "tool_error": 0.15, "multi_tool": 0.10}
