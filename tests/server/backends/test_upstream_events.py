"""Bodies of upstreams: events however they are cut and whatever ends their lines, and what is no event stream."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.backends import upstream_events
from server.backends.upstream_events import DONE, Event, EventReader, read_objects
from server.errors import ServerUnavailableError, UpstreamError

STREAM = (
    "\ufeffdata: first\n\n"
    ": ping\n\n"
    "event: named\ndata: a\ndata:b\nid: 7\nretry: 10\n\n"
    "event: without data\n\n"
    "data\n\n"
    "data: näh\n\n"
)
EVENTS = [Event("", "first"), Event("named", "a\nb"), Event("", ""), Event("", "näh")]


@given(st.sampled_from(["\n", "\r\n", "\r"]), st.sets(st.integers(1, 100)))
def test_events_are_the_same_however_they_are_cut(line_end: str, cuts: set[int]) -> None:
    body = STREAM.replace("\n", line_end).encode()
    edges = [0, *sorted(cut for cut in cuts if cut < len(body)), len(body)]
    reader = EventReader()
    events = [event for a, b in itertools.pairwise(edges) for event in reader.feed(body[a:b])]
    assert events + reader.close() == EVENTS


def test_the_last_event_may_lack_its_blank_line() -> None:
    reader = EventReader()
    assert reader.feed(b"data: x\n\ndata: [DONE]") == [Event("", "x")]
    assert reader.close() == [Event("", "[DONE]")]


def test_an_endless_event_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream_events, "MAX_EVENT_BYTES", 100)
    reader = EventReader()
    assert reader.feed(b"data: " + b"x" * 60) == []
    with pytest.raises(ServerUnavailableError, match="more than 100 bytes"):
        reader.feed(b"x" * 60)
    with pytest.raises(ServerUnavailableError, match="more than 100 bytes"):
        EventReader().feed(b"data: x\n" * 200)


def objects(*parts: str) -> list[Any]:
    async def body() -> AsyncIterator[bytes]:
        for part in parts:
            yield part.encode()

    async def read() -> list[Any]:
        return [value async for value in read_objects(body(), secrets=["my-key"])]

    return asyncio.run(read())


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (['data: {"a":1}\n\n', "data: [DONE]\n\n"], [{"a": 1}, DONE]),
        (['data: {"a":1}\n\n'], [{"a": 1}]),
        (['data: {"a":1}\n\ndata: [DONE]'], [{"a": 1}, DONE]),
        (['data: {"a":1}\n\ndata: [DONE]\n\ndata: {"b":2}\n\n'], [{"a": 1}, DONE]),
        ([": OPENROUTER PROCESSING\n\n", 'event: message\r\ndata: {"a":1}\r\n\r\n'], [{"a": 1}]),
        (['data: {"a":\ndata: 1}\n\n'], [{"a": 1}]),
        (["data: \n\n", 'data:{"a":1}\n\n'], [{"a": 1}]),
        (["\n ", "", '{"a":', "1}\n"], [{"a": 1}, DONE]),
        (['data: {"a":1,"error":null}\n\n'], [{"a": 1, "error": None}]),
        ([], []),
        (["<html>Not the page you wanted</html>"], []),
    ],
)
def test_objects(parts: list[str], expected: list[Any]) -> None:
    assert objects(*parts) == expected


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (
            'data: {"error":{"message":"too long","type":"BadRequestError","param":"messages","code":400}}\n\n',
            400,
            "too",
        ),
        ('data: {"object":"error","message":"too long","code":400}\n\n', 400, "too long"),
        ('{"error":{"message":"slow down","code":429}}', 429, "slow down"),
        ('event: error\ndata: {"message":"wrong my-key","status_code":418}\n\n', 418, r"wrong \[redacted\]"),
    ],
)
def test_an_error_object_with_a_status_is_that_refusal(body: str, status: int, message: str) -> None:
    with pytest.raises(UpstreamError, match=message) as caught:
        objects(body)
    assert caught.value.status == status


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('data: {"error":{"message":"out of memory","code":"oom"}}\n\n', "out of memory"),
        ('data: {"error":"my-key is out of memory"}\n\n', r"\[redacted\] is out of memory"),
        ("event: error\ndata: boom\n\n", "boom"),
        ('data: {"a":\n\n', "not valid JSON"),
        ('data: {"a":NaN}\n\n', "not valid JSON"),
        ("data: [1]\n\n", "list where an object belongs"),
        ('{"a":1', "not valid JSON"),
    ],
)
def test_what_is_no_answer_is_a_failure(body: str, message: str) -> None:
    with pytest.raises(ServerUnavailableError, match=message):
        objects(body)


def test_an_endless_answer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream_events, "MAX_EVENT_BYTES", 100)
    with pytest.raises(ServerUnavailableError, match="more than 100 bytes"):
        objects('{"a":"', "x" * 99)
