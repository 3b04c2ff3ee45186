"""Fine-tuning files out and in, and what an imported line must be."""

import json
from typing import Any

import pytest

from server.errors import InvalidRequestError
from server.storage.database import Database
from server.traces.deletion import TraceDeletion
from server.traces.exchange import export_lines, import_lines
from server.traces.feedback import Feedback, FeedbackStore, Target
from server.traces.filters import TraceFilter
from server.traces.queries import TraceQueries
from server.traces.record import Answer
from server.traces.store import TraceStore
from server.traces.viewer import ADMIN, Viewer
from tests.server.traces.builders import Client, assistant, call, make_record, result, system, tool, user

CALLS = [system("be brief"), user("find é"), assistant(None, call("s", '{"q": 1}', "call_1")), result("call_1", "x")]
LINES: list[dict[str, Any]] = [
    {"messages": [user("a"), assistant("b")]},
    {"messages": [*CALLS, assistant("done") | {"weight": 1}], "tools": [tool("s")], "parallel_tool_calls": False},
    {"messages": [user("a"), assistant("b") | {"weight": 0}, user("c"), assistant("d")]},
]


def exported(database: Database, where: TraceFilter | None = None, **options: bool) -> list[dict[str, Any]]:
    return [json.loads(line) for line in export_lines(database, ADMIN, where or TraceFilter(), **options)]


def plain(line: dict[str, Any]) -> dict[str, Any]:
    """Without nulls, which a line may have or leave out."""
    messages = [{key: value for key, value in message.items() if value is not None} for message in line["messages"]]
    return line | {"messages": messages}


def test_what_is_imported_comes_out_again(store: TraceStore, database: Database) -> None:
    lines = [json.dumps(line) for line in LINES]
    assert import_lines(store, ADMIN, [*lines, "\n"], adapter="tools") == 3
    assert exported(database) == [plain(line) for line in LINES]
    assert import_lines(store, ADMIN, lines, adapter="tools") == 0, "again is the same"
    assert import_lines(store, ADMIN, [lines[0], lines[0]], adapter="tools") == 1, "a line may stand there twice"
    listed = TraceQueries(database).list(ADMIN, TraceFilter(adapter="tools")).traces
    assert len(listed) == 4
    assert {(one.endpoint, one.version, one.purpose) for one in listed} == {("import", None, "user")}
    assert len({one.episode_id for one in listed}) == 4


def test_what_was_deleted_is_not_imported_again(store: TraceStore, database: Database) -> None:
    lines = [json.dumps(line) for line in LINES]
    import_lines(store, ADMIN, lines, adapter="tools")
    for _ in range(2):
        TraceDeletion(database).delete(ADMIN, TraceFilter(adapter="tools"))
        assert import_lines(store, ADMIN, lines, adapter="tools") == 0
        assert exported(database) == []


def test_many_lines_go_in_and_out_in_batches(store: TraceStore, database: Database) -> None:
    lines = (json.dumps({"messages": [user(str(number)), assistant("x")]}) for number in range(450))
    assert import_lines(store, ADMIN, lines) == 450
    assert [line["messages"][0]["content"] for line in exported(database)] == [str(number) for number in range(450)]


def test_imports_are_not_stitched(store: TraceStore, client: Client, database: Database) -> None:
    import_lines(store, Viewer(), [json.dumps({"messages": CALLS[:3]})])
    client.ask([*CALLS[1:], user("go on")], assistant("y"))
    assert len({episode for episode, _ in client.rows().values()}) == 2
    listed = TraceQueries(database).list(ADMIN, TraceFilter(has_tool_calls=True)).traces
    assert TraceQueries(database).show(ADMIN, listed[0].id).tool_calls[0].outcome is None


def test_what_is_exported(client: Client, database: Database) -> None:
    thinking = assistant("b") | {"reasoning_content": "hm", "refusal": None, "annotations": []}
    good = client.ask([user("a")], thinking, adapter="tools")
    client.ask([user("c")], assistant("d"), status="failed")
    two = client.ask(
        [user("e")], assistant("f"), answers=(Answer(assistant("f"), "stop"), Answer(assistant("g"), "stop"))
    )
    client.store.write([make_record(messages=None, prompt="x", endpoint="completions")])
    assert exported(database) == [
        {"messages": [user("a"), assistant("b")]},
        {"messages": [user("e"), assistant("f")]},
        {"messages": [user("e"), assistant("g")]},
    ]
    feedback = FeedbackStore(database)
    for text in ("B", "BB"):
        correction = assistant(text, call("s", call_id="c"))
        feedback.add(ADMIN, Target("trace", good.id), Feedback(source="user_correction", correction=correction))
    feedback.add(ADMIN, Target("trace", good.id), Feedback(source="thumbs", score=0))
    assert exported(database, TraceFilter(adapter="tools"), with_corrections=True) == [
        {"messages": [user("a"), assistant("BB", call("s", call_id="c"))]}
    ]
    assert exported(database, TraceFilter(episode_id=two.episode.id), with_corrections=True)[0]["messages"][1] == (
        assistant("f")
    )
    assert list(export_lines(database, Viewer("key-x"), TraceFilter())) == []


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ("[]", "'messages'"),
        ('{"messages": [], "tools": NaN}', "not JSON"),
        ('{"messages": [], "tools": "\\ud800"}', "not JSON"),
        ('{"messages": [], "tools": "\udcff"}', "not JSON"),
        ('{"messages": {}}', "'messages'"),
        ('{"messages": []}', "messages"),
        ('{"messages": ["x"]}', "messages"),
        (json.dumps({"messages": [user("a")]}), "last message"),
        (json.dumps({"messages": [user("a"), assistant("b")], "functions": []}), "unknown key 'functions'"),
        (json.dumps({"messages": [{"role": "robot", "content": "a"}, assistant("b")]}), "unknown role"),
        (json.dumps({"messages": [user("a"), assistant("b")], "tools": [{}]}), "tools"),
    ],
)
def test_a_bad_line_is_named(store: TraceStore, line: str, reason: str) -> None:
    good = json.dumps(LINES[0])
    with pytest.raises(InvalidRequestError, match="line 3: ") as caught:
        import_lines(store, ADMIN, [good, "", line])
    assert reason in str(caught.value)
