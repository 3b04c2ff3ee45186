"""What is written is what is read: contents, tool calls and their outcomes, redaction, odd text, audit marks."""

import json
from dataclasses import replace

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import IntegrityError

from server.errors import ConfigError
from server.storage.database import Database
from server.traces.digests import read_prompt
from server.traces.filters import TraceFilter
from server.traces.queries import TraceQueries
from server.traces.record import Answer
from server.traces.redaction import RedactionRule, Redactor
from server.traces.store import TraceStore
from server.traces.tables import trace_contents, traces
from server.traces.viewer import ADMIN
from tests.server.traces.builders import Client, assistant, call, make_record, result, tool, user

SECRETS = {
    "sk-sterna-" + "a1B2" * 10: "api_key",
    "sk-ant-api03-" + "x" * 40: "api_key",
    "AKIAIOSFODNN7EXAMPLE": "aws_key",
    "ghp_" + "a" * 36: "github_token",
    "xoxb-1234567890-abcdefghij": "slack_token",
    "AIza" + "b" * 35: "google_key",
    "hf_" + "c" * 34: "huggingface_token",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N": "jwt",
    "-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----": "private_key",
    "-----BEGIN PRIVATE KEY-----\\nMIIE cut off": "private_key",
}


def test_everything_comes_back(store: TraceStore) -> None:
    asked = call("search", '{"q": "x"}')
    answers = (
        Answer(assistant(None, asked) | {"reasoning_content": "let me see"}, "tool_calls", [5, 6]),
        Answer(assistant("or not"), "stop", [7]),
    )
    record = make_record(
        [user("nul \0 and é")],
        answers=answers,
        tools=[tool("search")],
        tool_choice="auto",
        response_format={"type": "text"},
        sampling={"temperature": 0.5},
        was_constrained=True,
        model_digest="sha256:m",
        template_digest="sha256:t",
        tokenizer_digest="sha256:k",
        adapter="tools",
        version="tools@7",
        version_digest="sha256:v",
        user_id="u\0ser",
        session_id="s" * 300,
        metadata={"k": "v"},
    )
    store.write([record])
    full = TraceQueries(store.database).show(ADMIN, record.id)
    assert full.request == {
        "messages": [user("nul \0 and é")],
        "tools": [tool("search")],
        "tool_choice": "auto",
        "response_format": {"type": "text"},
        "sampling": {"temperature": 0.5},
    }
    assert full.answers == [
        {"message": answers[0].message, "finish_reason": "tool_calls", "num_tokens": 2},
        {"message": answers[1].message, "finish_reason": "stop", "num_tokens": 1},
    ]
    assert full.prompt_token_ids == [1, 2, 3, 4]
    assert full.completion_token_ids == [[5, 6], [7]]
    assert full.details["version_digest"] == "sha256:v"
    assert full.details["template_digest"] == "sha256:t"
    assert full.details["metadata"] == {"k": "v"}
    summary = full.summary
    assert (summary.id, summary.response_id, summary.created_at) == (record.id, record.response_id, record.created_at)
    assert (summary.adapter, summary.version, summary.was_constrained) == ("tools", "tools@7", True)
    assert (summary.user_id, summary.session_id) == ("u\ufffdser", "s" * 256)
    assert summary.has_tools
    assert summary.has_tool_calls
    assert [(one.call_id, one.name, one.outcome) for one in full.tool_calls] == [(asked["id"], "search", None)]


def test_a_completion_a_failure_and_a_cancellation(store: TraceStore) -> None:
    conversation = read_prompt([1, 2, 3])
    base = make_record()
    episode = replace(base.episode, group=conversation.group, context=conversation.context)
    done = make_record(
        messages=None, prompt=[1, 2, 3], endpoint="completions", answers=(Answer(assistant("x"), "length"),),
        prompt_token_ids=None, episode=episode,
    )  # fmt: skip
    failed = make_record(status="failed", error="the engine broke", answers=())
    cancelled = make_record(status="cancelled", answers=(Answer(assistant("hal"), None, [1]),))
    store.write([done, failed, cancelled])
    queries = TraceQueries(store.database)
    assert queries.show(ADMIN, done.id).request == {"prompt": [1, 2, 3]}
    assert queries.show(ADMIN, done.id).prompt_token_ids is None
    assert queries.show(ADMIN, done.id).completion_token_ids is None
    assert queries.show(ADMIN, failed.id).details["error"] == "the engine broke"
    assert queries.show(ADMIN, cancelled.id).answers == [{"message": assistant("hal"), "num_tokens": 1}]
    assert [page.id for page in queries.list(ADMIN, TraceFilter(status="cancelled")).traces] == [cancelled.id]


def test_all_or_none(store: TraceStore, database: Database) -> None:
    good, bad = make_record(), make_record(sampling={"temperature": float("nan")})
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.write([good, bad])
    store.write([good])
    with pytest.raises(IntegrityError, match=r"(?i)unique") as caught:
        store.write([make_record(user_id="private"), good])
    assert "private" not in str(caught.value), "errors are logged"
    with database.read() as connection:
        assert connection.scalars(select(traces.c.id)).all() == [good.id]
        assert connection.execute(text("SELECT count(*) FROM episodes")).scalar() == 1


def test_a_retry_writes_only_what_is_missing(store: TraceStore) -> None:
    """A connection that breaks during COMMIT leaves open whether it was done."""
    first, second = make_record(), make_record()
    assert store.write([first]) == [first.id]
    assert store.write([first, second], is_retry=True) == [second.id]
    assert len(TraceQueries(store.database).list(ADMIN, TraceFilter()).traces) == 2


def test_the_first_result_of_a_call_is_its_outcome(database: Database) -> None:
    seen: list[tuple[str | None, str | None, bool]] = []
    store = TraceStore(database, on_tool_outcome=lambda *outcome: seen.append(outcome))
    client = Client(store)
    good, bad, open_ = call("read"), call("write"), call("think")
    first = client.ask([user("x")], assistant(None, good, bad, open_), adapter="tools", version="tools@3")
    history = [user("x"), assistant(None, good, bad, open_)]
    results = [result(good["id"], "42"), result(bad["id"], '{"error": "disk full"}')]
    second = client.ask([*history, *results], assistant("hm"), version="tools@4")
    client.ask([*history, result(bad["id"], "fine now"), assistant("hm"), user("y")], assistant("z"))
    queries = TraceQueries(database)
    calls = queries.show(ADMIN, first.id).tool_calls
    assert [(one.name, one.outcome) for one in calls] == [("read", "ok"), ("write", "error"), ("think", None)]
    assert sorted(seen) == [("tools", "tools@3", False), ("tools", "tools@3", True)]
    failed = queries.list(ADMIN, TraceFilter(has_tool_error=True)).traces
    assert [one.id for one in failed] == [first.id]
    assert second.id in {one.id for one in queries.list(ADMIN, TraceFilter(has_tool_error=False)).traces}


def test_another_keys_result_is_no_outcome(client: Client) -> None:
    asked = call("read")
    first = client.ask([user("x")], assistant(None, asked), key_id="key-a")
    client.ask([result(asked["id"], "Error: x")], assistant("y"), key_id="key-b")
    client.ask([result(asked["id"], "Error: x")], assistant("y"), key_id="key-a", purpose="evaluation")
    assert TraceQueries(client.store.database).show(ADMIN, first.id).tool_calls[0].outcome is None


def test_secrets_never_reach_the_database(database: Database) -> None:
    rules = [RedactionRule(r"\b\d{4}-\d{4}\b", r"<card \1>")]
    store = TraceStore(database, redactor=Redactor(rules, secrets=["hunter2 upstream"]))
    every = [*SECRETS, "hunter2 upstream", "1234-5678"]
    for secret in every:
        arguments = json.dumps({"key": secret})
        record = make_record(
            [user(f"my key: {secret}"), user("fine")],
            assistant(f"noted {secret}", call("save", arguments)),
            user_id=secret[:200],
            error=f"bad key {secret}",
            metadata={"key": secret},
        )
        store.write([record])
        full = TraceQueries(database).show(ADMIN, record.id)
        assert secret not in json.dumps([full.request, full.answers, full.details])
        assert json.dumps(secret)[1:-1] not in json.dumps([full.request, full.answers, full.details])
        assert secret[:200] not in str(full.summary.user_id)
        assert full.summary.is_redacted
        assert full.request["messages"][1] == user("fine")
        assert full.prompt_token_ids is None, "the ids would spell it"
        assert full.completion_token_ids is None


def test_what_is_no_secret_stays() -> None:
    redactor = Redactor([RedactionRule("bad")])
    value = {"a": ["sk-short", "ask-me", "https://example.org/a@b", {"n": 1, "x": None, "ids": [1, 2]}], "b": True}
    assert redactor.redact(value) == (value, False)
    assert redactor.redact(["a bad b", "ok"]) == (["a [redacted] b", "ok"], True)
    assert redactor.redact("postgres://me:pw@host/db") == ("postgres://[redacted:url_password]@host/db", True)
    for secret, name in SECRETS.items():
        assert redactor.redact(f"x {secret} y")[0].startswith(f"x [redacted:{name}]")


def test_a_rule_that_is_no_expression_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"'\('"):
        Redactor([RedactionRule("(")])


def test_audit_marks_a_share_whatever_was_answered(database: Database) -> None:
    store = TraceStore(database, audit_share=0.5)
    store.write([make_record() for _ in range(200)])
    store.write([make_record(purpose="evaluation") for _ in range(20)])
    queries = TraceQueries(database)
    marked = queries.list(ADMIN, TraceFilter(is_audit=True), limit=1000).traces
    assert 60 < len(marked) < 140
    assert {one.purpose for one in marked} == {"user"}


def test_sequence_numbers_never_come_back(store: TraceStore, database: Database) -> None:
    """Who has read up to a number misses nothing, also when the newest rows were deleted."""
    store.write([make_record(), make_record()])
    with database.write() as connection:
        before = connection.scalars(select(traces.c.seq).order_by(traces.c.seq)).all()
        connection.execute(traces.delete())
        assert connection.execute(select(trace_contents)).all() == []
    store.write([make_record()])
    with database.read() as connection:
        assert connection.scalars(select(traces.c.seq)).one() > before[-1] > before[0]
