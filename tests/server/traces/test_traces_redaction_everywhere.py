"""No way around redaction: mixed lists, calls, names of models and episodes, prompts of token ids, settings."""

import json
from dataclasses import replace

import pytest
from sqlalchemy import select

from server.config import Settings
from server.storage.database import Database
from server.traces.queries import TraceQueries
from server.traces.record import Answer
from server.traces.redaction import RedactionRule, Redactor
from server.traces.store import TraceStore
from server.traces.tables import episodes
from server.traces.tables import tool_calls as tool_call_rows
from server.traces.viewer import ADMIN
from tests.server.traces.builders import Client, assistant, call, make_record, result, tool, user

SECRET = "ghp_" + "a" * 36
CLEAN = "[redacted:github_token]"


def test_a_list_that_begins_with_a_number_is_read_like_any_other() -> None:
    value = {"enum": [1, SECRET, True, {"x": [0.5, [None, SECRET]]}], "ids": [1, 2], "flags": [True, SECRET]}
    wanted = {"enum": [1, CLEAN, True, {"x": [0.5, [None, CLEAN]]}], "ids": [1, 2], "flags": [True, CLEAN]}
    assert Redactor().redact(value) == (wanted, True)


def test_mixed_lists_in_tools_and_formats_are_cleaned(store: TraceStore) -> None:
    parameters = {"type": "object", "properties": {"a": {"enum": [1, SECRET]}}}
    offered = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    record = make_record(
        tools=[offered],
        response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": [2, SECRET]}}},
        sampling={"chat_template_kwargs": {"mixed": [3, SECRET]}},
    )
    store.write([record])
    full = TraceQueries(store.database).show(ADMIN, record.id)
    assert SECRET not in json.dumps(full.request)
    assert full.summary.is_redacted


def test_a_calls_name_and_id_are_cleaned_and_its_result_still_finds_it(client: Client, database: Database) -> None:
    named, other = call(SECRET, call_id=f"call-{SECRET}"), call("f", call_id=f"also-{SECRET}")
    first = client.ask([user("x")], assistant(None, named, other))
    client.ask(
        [user("x"), assistant(None, named, other), result(f"also-{SECRET}", "Error: no such file")], assistant("y")
    )
    with database.read() as connection:
        rows = connection.execute(select(tool_call_rows)).all()
    assert SECRET not in str(rows)
    assert rows[0].name == CLEAN
    outcomes = [one.outcome for one in TraceQueries(database).show(ADMIN, first.id).tool_calls]
    assert outcomes == [None, "error"], "two ids with a secret are two ids"


def test_a_rule_that_matches_our_own_call_ids_loses_no_outcome(database: Database) -> None:
    client = Client(TraceStore(database, redactor=Redactor([RedactionRule("[0-9a-f]{16}")])))
    asked = call("f")
    first = client.ask([user("x")], assistant(None, asked), tools=[tool("f")])
    client.ask([user("x"), assistant(None, asked), result(asked["id"], "fine")], assistant("y"), tools=[tool("f")])
    assert TraceQueries(database).show(ADMIN, first.id).tool_calls[0].outcome == "ok"


def test_names_of_episodes_and_models_are_cleaned(client: Client, database: Database) -> None:
    record = client.ask([user("x")], assistant("y"), episode=f"run {SECRET}", requested_model=f"m {SECRET}")
    with database.read() as connection:
        assert connection.scalars(select(episodes.c.name)).all() == [f"run {CLEAN}"]
    summary = TraceQueries(database).show(ADMIN, record.id).summary
    assert (summary.requested_model, summary.is_redacted) == (f"m {CLEAN}", True)
    again = client.ask([user("z")], assistant("y"), episode=f"run {SECRET}")
    assert client.episode_of(again) == client.episode_of(record), "the name still leads there"


@pytest.mark.parametrize(
    ("prompt", "kept"),
    [
        ([1, 2, 3], "[redacted:token_ids]"),
        ([[1, 2], [3]], ["[redacted:token_ids]", "[redacted:token_ids]"]),
        (["a", SECRET], ["a", CLEAN]),
        ("a", "a"),
    ],
)
def test_a_prompt_of_token_ids_goes_with_the_other_ids(store: TraceStore, prompt: object, kept: object) -> None:
    """With `echo`, what the ids say is in the answer."""
    record = make_record(endpoint="completions", prompt=prompt, answers=(Answer(assistant(SECRET), "stop", [1]),))
    record = replace(record, messages=None)
    store.write([record])
    assert TraceQueries(store.database).show(ADMIN, record.id).request == {"prompt": kept}


def test_the_settings_know_what_is_secret() -> None:
    def secrets(**fields: str) -> tuple[str, ...]:
        return Settings.model_validate({"backend": "openai", **fields}).secrets

    assert Settings().secrets == ()
    assert secrets(upstream="http://me:p%40ss:w@host/v1", upstream_api_key="hunter2") == ("hunter2", "p@ss:w")
    assert secrets(upstream="http://me@host:80/a:b@c") == ()
