"""The leaderboard's questions as requests, on a small wheel made up here; the real one is the demonstration's."""

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from finetune.dataset import bfcl
from finetune.dataset.errors import SnapshotError
from finetune.gate.expected import expected_from_bfcl
from finetune.gate.match import calls_match
from server.openai.protocol.chat import ChatRequest

SUBJECTS = ["triangle area", "train timetable", "guitar price", "poker odds", "soup recipe", "river length"]
LONG = "{} please, for the thing number {} that I have here in front of me, and be quick about it, my friend"


def function(name: str, subject: str) -> dict[str, Any]:
    properties = {
        "size": {"type": "float", "description": "How large."},
        "at": {"type": "tuple", "items": {"type": "any"}},
        "options": {"type": "dict", "properties": {"deep": {"type": "boolean"}}},
        "unit": {"type": "string", "optional": True},
    }
    schema = {"type": "dict", "properties": properties, "required": ["size", "at"]}
    return {"name": name, "description": f"About {subject}.", "parameters": schema}


def asked(number: int, text: str, *names: str) -> dict[str, Any]:
    subject = SUBJECTS[number % len(SUBJECTS)]
    messages = [{"role": "user", "content": text}]
    return {"id": f"q_{number}", "question": [messages], "function": [function(name, subject) for name in names]}


def known(number: int, name: str) -> dict[str, Any]:
    accepted = {
        "size": [2.5, 3],
        "options": [{"deep": [True], "wide": ["", 1]}],
        "unit": ["cm", ""],
        "at": ["", [1, "x"]],
    }
    return {"id": f"q_{number}", "ground_truth": [{name: accepted}]}


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    simple = [asked(n, LONG.format(SUBJECTS[n], n), f"{SUBJECTS[n].split()[0]}.of") for n in range(6)]
    twin = asked(9, LONG.format(SUBJECTS[0], 0).replace("quick", "quick!"), "other.tool", "triangle.of")
    files = {
        "BFCL_v4_simple_python.json": simple,
        "possible_answer/BFCL_v4_simple_python.json": [
            known(n, one["function"][0]["name"]) for n, one in enumerate(simple)
        ],
        "BFCL_v4_multiple.json": [twin],
        "possible_answer/BFCL_v4_multiple.json": [known(9, "triangle.of")],
    }
    path = tmp_path / bfcl.WHEEL
    with zipfile.ZipFile(path, "w") as archive:
        for name, rows in files.items():
            archive.writestr(f"bfcl_eval/data/{name}", "\n".join(map(json.dumps, rows)) + "\n")
        archive.writestr("bfcl_eval/data/BFCL_v4_live_simple.json", "not to be opened")
    return path


def test_questions_are_requests_with_a_right_answer(wheel: Path) -> None:
    questions = bfcl.read_questions(wheel)
    assert [one.set for one in questions] == ["simple_python"] * 6 + ["multiple"]
    for one in questions:
        ChatRequest.model_validate({"model": "m", "messages": one.messages, "tools": one.tools})
        assert calls_match(one.answer["tool_calls"], expected_from_bfcl(one.ground_truth), one.tools)
    (call,) = questions[0].answer["tool_calls"]
    assert call["function"]["name"] == "triangle_of"
    assert json.loads(call["function"]["arguments"]) == {"size": 2.5, "options": {"deep": True}, "at": [1, "x"]}
    assert questions[0].tools[0]["function"]["parameters"] == {
        "type": "object",
        "properties": {
            "size": {"type": "number", "description": "How large."},
            "at": {"type": "array", "items": {}},
            "options": {"type": "object", "properties": {"deep": {"type": "boolean"}}},
            "unit": {"type": "string"},
        },
        "required": ["size", "at"],
    }


def test_the_right_answer_passes_on_what_the_question_says() -> None:
    accepted = {
        "city": ["SD", "San Diego"],  # the question names the second
        "unit": ["", "cm"],  # not said: left out
        "rooms": [2, 3],
        "rate": ["", 1.5],  # said as 1.5
        "depth": ["", 5],  # only "1.5" and "15" are said
        "tags": [["a", "b"], ["new", "cheap"]],
        "deep": [True],  # never looked for
        "note": [""],  # nothing else is accepted, and the schema does not require it
    }
    text = "Something new and cheap in san diego: 3 rooms at 1.5, not 15."
    tools = [{"type": "function", "function": {"name": "find", "parameters": {"required": ["city", "tags"]}}}]
    question = bfcl.Question("q", "multiple", text, tools, [{"find": accepted}], 0)
    (call,) = question.answer["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {
        "city": "San Diego", "rooms": 3, "rate": 1.5, "tags": ["new", "cheap"], "deep": True
    }  # fmt: skip
    assert calls_match([call], expected_from_bfcl(question.ground_truth), tools)


def test_no_other_set_is_opened(wheel: Path) -> None:
    with pytest.raises(AssertionError, match="no other set"):
        bfcl.read_questions(wheel, ["live_simple"])  # type: ignore[list-item]


def test_the_split_never_parts_a_group(wheel: Path) -> None:
    questions = bfcl.read_questions(wheel)
    assert questions[0].group == questions[6].group == 0
    seen = set()
    for seed in range(20):
        learn, test = bfcl.split(questions, seed=seed)
        assert {one.group for one in learn}.isdisjoint(one.group for one in test)
        assert sorted(one.id for one in (*learn, *test)) == sorted(one.id for one in questions)
        assert 3 <= len(test) <= 4
        assert bfcl.split(questions, seed=seed) == (learn, test)
        seen.add(tuple(one.id for one in test))
    assert len(seen) > 5


def test_tools_that_have_nothing_to_do_with_the_question(wheel: Path) -> None:
    questions = bfcl.read_questions(wheel)
    found = bfcl.misfits(questions, seed=1)
    assert len(found) == len(questions)
    for one, question in zip(found, questions, strict=True):
        assert one.messages == question.messages
        subject = question.text.split()[0]
        assert not any(subject in tool["function"]["name"] for tool in one.tools)
        assert one.answer in bfcl.REFUSALS
    assert bfcl.misfits(questions[:1], seed=1) == []  # only its own tools are there
    assert found == bfcl.misfits(questions, seed=1)


def test_chats_and_seen_tools(wheel: Path) -> None:
    questions = bfcl.read_questions(wheel)
    (chat,) = bfcl.chats(["Hi!"], questions, seed=0)
    assert (chat.messages, chat.answer) == ([{"role": "user", "content": "Hi!"}], None)
    assert chat.tools in [one.tools for one in questions]
    assert bfcl.tool_names(questions[6:]) == {"other_tool", "triangle_of"}


def test_only_the_wheel_that_is_meant_is_read(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SnapshotError, match="remove it"):
        bfcl.fetch(tmp_path)
    monkeypatch.setattr(bfcl, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    assert bfcl.fetch(tmp_path) == wheel
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(SnapshotError, match="could not be downloaded"):
        bfcl.fetch(tmp_path / "empty")
