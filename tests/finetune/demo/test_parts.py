"""The demonstration's parts that need no server: traffic, table, picture, view."""

import json
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from finetune.dataset.bfcl import Question
from finetune.demo.live import Answered, Traffic, view, watch_until
from finetune.demo.picture import picture
from finetune.demo.results import Row, mean_of_runs, missed, table
from finetune.demo.summary import summary
from finetune.demo.traffic import call_requests, no_call_requests
from finetune.gate.intervals import Estimate
from tests.finetune.demo.test_end_to_end import GOODS, question


def questions() -> list[Question]:
    return [question(number, goods) for number, goods in enumerate(GOODS)]


def estimate(value: float) -> Estimate:
    return Estimate(value, max(value - 0.1, 0.0), min(value + 0.1, 1.0), 40, 40)


def rows(right: float = 0.72, no_call: float = 0.9) -> list[Row]:
    plain = estimate(0.6)
    return [
        Row("gold", "exactly_right", estimate(0.0), estimate(right), plain),
        Row("gold", "right_tool", estimate(0.0), estimate(0.98), plain),
        Row("gold", "no_call", estimate(1.0), estimate(no_call), estimate(0.0)),
        Row("gold, tools unseen", "exactly_right", estimate(0.0), estimate(0.7), None),
    ]


def answers() -> list[Answered]:
    return [Answered(0.5 * n, "base" if n < 20 or n % 3 else "tools@1", 0.4, 0.1, None) for n in range(60)]


def test_one_question_is_one_episode_with_whatever_tools() -> None:
    asked = questions()
    calls, others = call_requests(asked), no_call_requests(asked, {"made_0"}, ["Hello!"], share=1.0, seed=0)
    assert {one.episode for one in others if one.name.startswith("misfit_")} <= {one.episode for one in calls}
    assert all((one.accepted is None) == (one in others) for one in (*calls, *others))


def test_tools_of_the_untouched_side_are_not_seen_on_the_other() -> None:
    asked = questions()
    held_out = {one.id for one in asked[::3]}
    others = no_call_requests(asked, held_out, ["Hello!", "How are you?"], share=1.0, seed=0)
    untouched = [one for one in others if one.name.removeprefix("misfit_") in held_out]
    learned = [one for one in others if one not in untouched]
    own = {one.tools[0]["function"]["name"] for one in asked if one.id in held_out}
    assert untouched
    assert {one.tools[0]["function"]["name"] for one in untouched} <= own
    assert not {one.tools[0]["function"]["name"] for one in learned} & own


def test_the_table_has_the_intervals_and_the_targets_are_held() -> None:
    text = table(rows())
    assert "72.0% [62.0%, 82.0%]" in text
    assert "tools unseen" in text
    assert missed(rows()) == []
    assert missed(rows(right=0.5, no_call=0.2)) == [
        "exactly right is 50.0%, the target is 70%",
        "no call where none fits is 20.0%, the target is 85%",
    ]


def test_runs_are_told_as_mean_and_range() -> None:
    text = mean_of_runs([rows(right=0.7), rows(right=0.8)])
    assert "**75.0% (70.0% to 80.0%)**" in text


def test_results_of_several_seeds_become_one_table(tmp_path: Path) -> None:
    for seed in (0, 1):
        result: dict[str, Any] = {"seed": seed, "result": "canary", "is_live": True, "plain_result": "rejected"}
        result["rows"] = [asdict(row) for row in rows(right=0.7 + 0.1 * seed)]
        (tmp_path / f"{seed}.json").write_text(json.dumps(result))
    text = summary(sorted(tmp_path.iterdir()))
    assert "**75.0% (70.0% to 80.0%)**" in text
    assert "seed 1: plain recipe rejected" in text


def test_the_picture_is_a_drawing_of_everything() -> None:
    text = picture(rows(), [(1.0, 2.0), (2.0, 1.0)], answers(), [(5.0, "tools@1 canary"), (20.0, "tools@1 live")])
    root = ET.fromstring(text)
    words = [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "tools@1 live" in words
    assert "The swap under traffic: 60 answers, 0 failed" in words
    assert "72" in words


def test_the_picture_of_a_round_that_was_rejected() -> None:
    assert "0 answers" in picture(rows(), [], [], [])


def test_the_view_shows_who_answers_and_what_failed() -> None:
    traffic = Traffic(answered=_late(answers()))
    assert "failed 0" in view(traffic)
    traffic.answered.append(replace(traffic.answered[-1], fault="503: down"))
    shown = view(traffic)
    assert "failed 1" in shown
    assert "tools@1" in shown
    assert json.dumps(traffic.as_json())


def _late(given: Sequence[Answered]) -> list[Answered]:
    """As if they had just come."""
    return [replace(one, at_seconds=0.0) for one in given]


def test_the_view_ends_when_what_is_looked_for_is_there() -> None:
    traffic = Traffic()
    assert watch_until(traffic, lambda: "tools@1 live", lambda state: "live" in state, limit_seconds=60.0)
    assert [what for _, what in traffic.events] == ["tools@1 live"]
    assert not watch_until(traffic, lambda: "tools@1 canary", lambda state: False, limit_seconds=0.0)
