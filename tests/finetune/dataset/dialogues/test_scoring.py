"""Scores: right answers get all of them, and each baseline reaches what its rule allows and no more."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from finetune.dataset.dialogues.baselines import NearestTemplate, always_call, call_message, never_call
from finetune.dataset.dialogues.evaluate import evaluate
from finetune.dataset.dialogues.examples import Dialogue, read_dialogues, turns
from finetune.dataset.dialogues.scoring import (
    METRICS,
    NO_CALL,
    RIGHT_ARGUMENTS,
    RIGHT_TOOL,
    STOPS,
    WELL_FORMED,
    judge,
    score,
)
from finetune.dataset.dialogues.scoring import body as scores_body
from finetune.dataset.errors import DialogueError
from finetune.dataset.rows import canonical_json
from finetune.serving.api import ServerApi
from finetune.serving.http import Http
from server import cli
from server.config import Remote
from tests.finetune.dataset.dialogues.conftest import changed_copy


@pytest.fixture(scope="module")
def held_out(tiny: Path) -> list[Dialogue]:
    return list(read_dialogues(tiny / "held_out.jsonl"))


def test_right_answers_score_one(held_out: list[Dialogue]) -> None:
    scores = score(held_out, lambda turn: turn.message)
    assert {"families", "unseen_tools", "fresh_values", "families/no_tool"} <= set(scores)
    assert [share.value for share in scores["families"].values()] == [1.0] * len(METRICS)
    assert scores["unseen_tools"][NO_CALL].value is None
    num_calls = sum(len(one.expected) for one in held_out if one.part == "families")
    assert scores["families"][RIGHT_TOOL].num == num_calls
    body = scores_body(scores)["families"][RIGHT_TOOL]
    assert (body["share"], body["num"], body["upper"]) == (1.0, num_calls, 1.0)
    assert body["num_templates"] < num_calls
    assert 0.5 < body["lower"] < 1


def test_never_and_always_calling_win_one_side_each(held_out: list[Dialogue]) -> None:
    never, always = score(held_out, never_call)["families"], score(held_out, always_call)["families"]
    assert (never[NO_CALL].value, never[STOPS].value, never[RIGHT_TOOL].value, never[WELL_FORMED].value) == (1, 1, 0, 0)
    assert always[STOPS].value == 0
    for metric in (RIGHT_TOOL, RIGHT_ARGUMENTS, WELL_FORMED):
        assert 0.1 < (always[metric].value or 0) < 0.95


def test_the_nearest_example_is_found_and_its_call_copied(tiny: Path, held_out: list[Dialogue]) -> None:
    training = list(read_dialogues(tiny / "train.jsonl"))
    nearest = NearestTemplate(training)
    on_training = score(training, nearest)["train"]
    assert (on_training[RIGHT_TOOL].value or 0) > 0.98  # itself, but where two say the same words
    assert (on_training[STOPS].value or 0) > 0.98
    apart = score(held_out, nearest)["families"]
    assert (apart[RIGHT_ARGUMENTS].value or 0) < 0.2 < (apart[RIGHT_TOOL].value or 0) + 0.2


def test_a_call_is_judged_by_tool_arguments_and_form(held_out: list[Dialogue]) -> None:
    one = next(one for one in held_out if one.kind == "tool_used" and one.expected[0]["name"] == "percent_of")
    turn = turns(one)[0]
    arguments = dict(one.expected[0]["arguments"])
    assert judge(turn, call_message("percent_of", arguments)) == _all(True, True, True)
    assert judge(turn, call_message("percent_of", {**arguments, "percent": 99.5})) == _all(True, False, True)
    assert judge(turn, call_message("percent_of", {"percent": 5})) == _all(True, False, False)
    assert judge(turn, call_message("no_such_tool", {})) == _all(False, False, False)
    assert judge(turn, {"role": "assistant", "content": '<tool_call>{"name": '}) == _all(False, False, False)


def _all(tool: bool, arguments: bool, form: bool) -> dict[str, bool]:
    return {RIGHT_TOOL: tool, RIGHT_ARGUMENTS: arguments, WELL_FORMED: form}


def test_a_server_is_asked_every_turn_and_stands_beside_the_baselines(tiny: Path, held_out: list[Dialogue]) -> None:
    right = {canonical_json(turn.request): turn.message for one in held_out for turn in turns(one)}
    asked = []

    def answer(request: httpx.Request) -> httpx.Response:
        assert request.headers["x-sterna-log"] == "off"
        body = json.loads(request.content)
        asked.append(body)
        assert (body["temperature"], body.get("tool_choice")) == (0, None)
        message = right[canonical_json({key: body[key] for key in ("messages", "tools")})]
        choice = {"message": message, "finish_reason": "stop"}
        return httpx.Response(200, json={"choices": [choice], "system_fingerprint": "fp_1"})

    http = Http(Remote("http://127.0.0.1:1", None), patience_seconds=0, transport=httpx.MockTransport(answer))
    body = evaluate(tiny, ServerApi(http), model="nano", limit=10, concurrency=3)
    assert {one["model"] for one in asked} == {"nano"}
    assert body["system_fingerprints"] == ["fp_1"]
    assert body["num_dialogues"] == 40
    assert {part.split("/")[0] for part in body["scores"]["model"]} == {
        "families", "unseen_tools", "renamed_tools", "fresh_values",
    }  # fmt: skip
    assert all(one["share"] == 1 for by_metric in body["scores"]["model"].values() for one in by_metric.values())
    assert body["scores"]["never_call"]["families"]["right_tool"]["share"] == 0
    assert body["scores"].keys() == {"model", "always_call", "never_call", "nearest"}


@pytest.mark.parametrize("name", ["held_out.jsonl", "train.jsonl"])
def test_a_set_that_cannot_be_judged_is_refused_by_its_line_before_anything_is_asked(
    tiny: Path, tmp_path: Path, name: str
) -> None:
    def without_request(rows: list[dict[str, Any]]) -> None:
        rows[2]["messages"] = [one for one in rows[2]["messages"] if one["role"] != "user"]

    folder = changed_copy(tiny, tmp_path, name, without_request)
    said = rf"{name}, line 3: the messages come as .*`sterna dataset report {folder}`"
    with pytest.raises(DialogueError, match=said):
        evaluate(folder, ServerApi(Http(Remote("http://127.0.0.1:9", None), patience_seconds=0)))


def test_the_command_prints_a_table_and_names_a_server_that_is_away(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("server.commands.dataset.PATIENCE_SECONDS", 0.0)
    assert cli.main(["dataset", "score", str(tiny), "--url", "http://127.0.0.1:9", "--model", "nano"]) == 1
    assert "http://127.0.0.1:9 has been away" in capsys.readouterr().err
    assert cli.main(["dataset", "score", str(tiny), "--limit", "0"]) == 2
    assert "--limit is at least 1" in capsys.readouterr().err

    def answer(api: ServerApi, model: str, request: dict[str, Any], *, max_tokens: int) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": "Done."}, "system_fingerprint": "fp_1"}

    monkeypatch.setattr(ServerApi, "answer", answer)
    assert cli.main(["dataset", "score", str(tiny), "--limit", "5", "--model", "nano"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "NEVER CALL" in lines[0]
    assert any(line.split()[:3] == ["families", "no", "call"] and "100.0%" in line for line in lines)
