"""Filters as texts: what a query string and a flag may say."""

from dataclasses import fields
from datetime import UTC, datetime, timedelta, timezone

import pytest

from server.errors import InvalidRequestError
from server.traces.filter_text import FILTER_TEXTS, read_filter
from server.traces.filters import TraceFilter
from tests.server.traces.builders import START


def test_every_field_can_be_said() -> None:
    assert set(FILTER_TEXTS) == {field.name for field in fields(TraceFilter)}
    said = dict.fromkeys(FILTER_TEXTS, "x") | {
        "purpose": "evaluation", "status": "failed", "since": "2026-01-01", "until": "2026-02-01",
        "has_tool_calls": "true", "has_tool_error": "false", "has_feedback": "true", "is_audit": "false",
    }  # fmt: skip
    found = read_filter(said)
    assert (found.adapter, found.key_id, found.purpose, found.status) == ("x", "x", "evaluation", "failed")
    flags = (found.has_tool_calls, found.has_tool_error, found.has_feedback, found.is_audit)
    assert flags == (True, False, True, False)
    assert read_filter({}) == TraceFilter()
    assert read_filter({"key_id": ""}).key_id == "", "no key was needed"


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2026-01-01", START),
        ("2026-01-01T00:00:00Z", START),
        ("2026-01-01 03:00:00+03:00", START),
        ("20260101T000000", START),
        ("1d", START - timedelta(days=1)),
        ("90m", START - timedelta(minutes=90)),
        ("0s", START),
        ("2w", START - timedelta(days=14)),
    ],
)
def test_a_time_or_an_age(text: str, moment: datetime) -> None:
    assert read_filter({"since": text}, clock=lambda: START).since == moment


def test_a_time_without_a_zone_is_in_the_callers() -> None:
    east = timezone(timedelta(hours=2))
    assert read_filter({"until": "2026-01-01T02:00"}, zone=east).until == START
    assert read_filter({"until": "2026-01-01"}, zone=None).until == datetime(2026, 1, 1).astimezone(UTC)


@pytest.mark.parametrize("name", ["since", "until"])
@pytest.mark.parametrize(
    "text",
    ["", "now", "1", "d", "-1d", "1y", "999999999d", "0001-01-01T00:00+14:00", "9999-12-31T23:00-14:00",
     "2026-13-01", "1e9s", "\0", "2026-01-01T00:00:00 00:00"],
)  # fmt: skip
def test_what_is_no_time(name: str, text: str) -> None:
    with pytest.raises(InvalidRequestError, match="2026-01-31T12:00:00Z") as caught:
        read_filter({name: text})
    assert caught.value.param == name


@pytest.mark.parametrize(
    ("name", "text"), [("status", "good"), ("purpose", ""), ("has_feedback", "1"), ("is_audit", "True")]
)
def test_one_of_a_few(name: str, text: str) -> None:
    with pytest.raises(InvalidRequestError, match="is one of") as caught:
        read_filter({name: text})
    assert caught.value.param == name
