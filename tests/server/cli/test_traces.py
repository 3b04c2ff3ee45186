"""`sterna traces`: lists, transcripts, files out and in, feedback and deletion, on the server's own database."""

import io
import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from server import cli
from server.storage.database import Database, open_database
from server.traces.feedback import Feedback, FeedbackStore, Target
from server.traces.lineage import Lineage
from server.traces.queries import TraceQueries
from server.traces.record import Answer
from server.traces.store import TraceStore
from server.traces.viewer import ADMIN
from tests.server.cli.terminal import Terminal
from tests.server.cli.test_cli import fault
from tests.server.cli.test_keys import run
from tests.server.postgres import migrated_url, postgres_url
from tests.server.traces.builders import Client, assistant, call, make_record, result, tool, user

__all__ = ["migrated_url", "postgres_url"]

VERBS = ("list", "show", "lineage", "stats", "export", "import", "feedback", "delete")


@pytest.fixture(autouse=True)
def database(migrated_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Database]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STERNA_DATABASE", migrated_url)
    opened = open_database(migrated_url)
    yield opened
    opened.close()


@pytest.fixture
def client(database: Database) -> Client:
    return Client(TraceStore(database))


def listed(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    return [one["id"] for one in json.loads(run(capsys, "traces", "list", "--json", *arguments))["data"]]


def test_a_list_for_people_fits_and_for_programs_is_the_apis(
    client: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = client.ask([user("a")], assistant("b"))
    asked = [user("c")], assistant(None, call("s", call_id="call_1"))
    worst = client.ask(
        *asked, version="tools-of-a-long-name@12345", num_prompt_tokens=1234567, num_completion_tokens=1234567
    )
    client.ask([user("c"), result("call_1", "Error: no")], assistant("d"), status="failed", endpoint="completions")
    FeedbackStore(client.store.database).add(ADMIN, Target("trace", worst.id), Feedback(source="thumbs", score=0))
    header, *rows = run(capsys, "traces", "list").splitlines()
    assert header.split() == ["time", "trace", "answered", "by", "ended", "tokens", "notes"]
    assert max(map(len, rows)) <= 120
    assert [worst.id in rows[1], plain.id in rows[2]] == [True, True]
    assert all(word in rows[1] for word in ("tools-of-a-lon…", "1234567+12…", "tool error, rated"))
    assert all(word in rows[0] for word in ("failed", "completions"))
    body = json.loads(run(capsys, "traces", "list", "--json"))
    assert (body["object"], body["next_before"], body["data"][2]["id"]) == ("list", None, plain.id)
    assert body["data"][2]["created_at"].endswith("+00:00")
    assert cli.main(["traces", "list", "--limit", "2"]) == 0
    more = capsys.readouterr().err
    assert more.startswith("older ones: --before ")
    assert listed(capsys, "--before", more.split()[-1]) == [plain.id]


def test_every_filter_is_a_flag(client: Client, capsys: pytest.CaptureFixture[str]) -> None:
    one = client.ask([user("a")], assistant("b"), user_id="eve", key_id="key-a", episode="run", adapter="tools")
    two = client.ask([user("a")], assistant(None, call("s")), status="cancelled")
    for found, flags in (
        (one, ("--user-id", "eve")),
        (one, ("--key-id", "key-a", "--episode-id", "run")),
        (one, ("--adapter", "tools", "--no-has-tool-calls", "--older-than", "1d", "--since", "2025-12-31")),
        (two, ("--has-tool-calls", "--status", "cancelled", "--purpose", "user", "--until", "2026-01-03T00:00Z")),
        (two, ("--key-id", "", "--no-has-feedback", "--no-is-audit", "--no-has-tool-error")),
        (two, ("--trace-id", two.id)),
    ):
        assert listed(capsys, *flags) == [found.id], flags
    assert listed(capsys, "--episode-id", "run") == [], "whose?"
    assert listed(capsys, "--version", "tools@1") == listed(capsys, "--since", "1h") == []


def test_a_transcript_has_everything_and_no_tricks(client: Client, capsys: pytest.CaptureFixture[str]) -> None:
    calling = assistant("look:", call("search", '{"q": "é"}', "call_1")) | {"reasoning_content": "hm"}
    asked = client.ask(
        [{"role": "user", "content": [{"type": "text", "text": text} for text in ("find \x1b[31mred \u202e", "!")]}],
        calling,
        tools=[tool("search")], tool_choice="auto", version="tools@7", adapter="tools", requested_model="tools",
        user_id="eve", session_id="s1", metadata={"k": "v"}, sampling={"temperature": 0.5},
        answers=(Answer(calling, "tool_calls"), Answer({"role": "assistant", "content": "or\nthis"}, None)),
    )  # fmt: skip
    client.ask([user("find"), result("call_1", "Error: no")], assistant("sorry"))
    feedback = FeedbackStore(client.store.database)
    given = Feedback(source="user_correction", score=0.25, label="bad", comment="no", correction=assistant("better"))
    feedback.add(ADMIN, Target("trace", asked.id), given)
    feedback.add(ADMIN, Target("episode", asked.episode.id), Feedback(source="thumbs", score=1))
    shown = run(capsys, "traces", "show", asked.id)
    for text in (
        asked.id, "tools@7, asked for as tools, base base", asked.episode.id, "user eve, session s1",
        "4 prompt (0 cached), 3 completion", "0.010 s to the first token, 0.500 s in all", '{"temperature": 0.5}',
        "tools     search", '{"k": "v"}', "[user]\nfind \\x1b[31mred \\u202e!\n", "=== answer 0 (tool_calls)",
        '(thinks) hm\nlook:\n-> search({"q": "é"})  call_1  error', "=== answer 1 (cut short)", "or\nthis",
        "user_correction  score 0.25  bad  no\n\n[assistant]\nbetter", "thumbs  on the episode  score 1",
    ):  # fmt: skip
        assert text in shown, (text, shown)
    assert "\x1b" not in shown
    assert json.loads(run(capsys, "traces", "show", asked.id, "--json"))["details"]["metadata"] == {"k": "v"}
    assert "sorry" in run(capsys, "traces", "show"), "the newest"


def test_a_completions_transcript(client: Client, capsys: pytest.CaptureFixture[str]) -> None:
    for prompt, text in (("once upon", "once upon\n"), ([1, 2], "[1, 2]\n")):
        record = make_record(None, assistant("a time"), prompt=prompt, endpoint="completions", error="gone")
        client.store.write([record])
        assert f"[prompt]\n{text}" in run(capsys, "traces", "show")
    assert "ok: gone" in run(capsys, "traces", "show")


def test_out_and_in_and_out_again_is_the_same(
    client: Client, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    history = [user("find é\u2028"), assistant(None, call("s", '{"q": 1}', "call_1")), result("call_1", "x")]
    client.ask(history, assistant("done"), tools=[tool("s")], sampling={"parallel_tool_calls": False})
    for number in range(3):
        client.ask([user(f"{number}")], assistant("b"))
    client.ask([user("no")], assistant("c"), status="failed")
    said = run(capsys, "traces", "export")
    assert [len(json.loads(line)["messages"]) for line in said.split("\n")[:-1]] == [4, 2, 2, 2]
    assert run(capsys, "traces", "export", "--output", "a.jsonl") == "4 lines in a.jsonl\n"
    assert (tmp_path / "a.jsonl").read_text("utf-8") == said
    monkeypatch.setenv("STERNA_DATABASE", f"sqlite:///{tmp_path}/other.db")
    assert run(capsys, "traces", "import", "a.jsonl", "--adapter", "tools") == "4 new traces\n"
    assert json.loads(run(capsys, "traces", "import", "a.jsonl", "--adapter", "tools", "--json")) == {"num_new": 0}
    again = json.loads(run(capsys, "traces", "export", "--output", "b.jsonl", "--adapter", "tools", "--json"))
    assert again == {"num_lines": 4}
    assert (tmp_path / "b.jsonl").read_text("utf-8") == said
    assert sorted(path.name for path in tmp_path.glob("*.jsonl*")) == ["a.jsonl", "b.jsonl"]


def test_an_import_is_redacted_like_traffic(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STERNA_REDACT", "room [0-9]+")
    monkeypatch.setenv("STERNA_UPSTREAM_API_KEY", "hunter2")
    line = json.dumps({"messages": [user("in room 101, hunter2"), assistant("hf_" + "a" * 34)]})
    Path("in.jsonl").write_bytes(b"\xef\xbb\xbf" + line.encode() + b"\n\n")
    run(capsys, "traces", "import", "in.jsonl")
    shown = run(capsys, "traces", "show")
    assert "room" not in shown
    assert "hunter2" not in shown
    assert "aaaa" not in shown
    assert "redacted" in shown


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"{", "line 1: not JSON"), (b'{"messages": []}', "line 1: messages"), (b"\n\xff\xfe", "line 2: not JSON"),
     (None, "No such file")],
)  # fmt: skip
def test_a_bad_import_is_one_line(content: bytes | None, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    if content is not None:
        Path("in.jsonl").write_bytes(content)
    code, [line] = fault(capsys, "traces", "import", "in.jsonl")
    assert code == 1
    assert reason in line


def test_an_export_that_cannot_be_written_is_one_line(client: Client, capsys: pytest.CaptureFixture[str]) -> None:
    client.ask([user("a")], assistant("b"))
    Path("folder").mkdir()
    Path("file").touch()
    for target in ("folder", "file/x", "no/such"):
        code, [line] = fault(capsys, "traces", "export", "--output", target)
        assert (code, line.startswith(f"sterna: {target} cannot be written: ")) == (1, True)
    assert not list(Path().glob("*.part"))


def test_feedback_by_trace_response_and_episode(client: Client, capsys: pytest.CaptureFixture[str]) -> None:
    record = client.ask([user("a")], assistant("b"), key_id="key-a")
    give = ("traces", "feedback")
    first = run(capsys, *give, record.id, "--score", "0", "--label", "bad")
    assert first.startswith("fb-")
    assert first.endswith(": taken\n")
    assert run(capsys, *give, record.id, "--score", "0", "--label", "bad").endswith(": given before\n")
    correction = '{"role": "assistant", "content": "c"}'
    flags = ("--source", "user_correction", "--correction", correction, "--comment", "so")
    taken = json.loads(run(capsys, *give, str(record.response_id), *flags, "--json"))
    assert (taken["trace_id"], taken["is_new"], taken["correction"]["content"]) == (record.id, True, "c")
    run(capsys, *give, record.episode.id, "--score", "1")
    assert json.loads(run(capsys, "traces", "stats", "--json"))["num_feedback"] == 2
    for arguments, code, reason in (
        (("trace-x", "--score", "1"), 1, "no trace"),
        ((record.id, "--score", "2"), 1, "between 0 and 1"),
        ((record.id, "--score", "nan"), 1, "between 0 and 1"),
        ((record.id,), 1, "needs a 'score'"),
        ((record.id, "--score", "good"), 2, "--score"),
        ((record.id, "--score", "1", "--source", "x"), 1, "known_answer"),
        ((record.id, "--correction", "{"), 2, "not JSON"),
        ((record.id, "--correction", "[]"), 2, "an object"),
        ((record.id, "--correction", "{}"), 1, "assistant message"),
    ):
        found, [line] = fault(capsys, *give, *arguments)
        assert found == code
        assert reason in line


def test_deletion_asks_a_terminal_and_says_how_many(
    client: Client, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(6):
        client.ask([user(f"{number}")], assistant("b"), user_id=f"user {number % 3}", key_id=f"key-{number % 2}")
    monkeypatch.setattr(sys, "stdin", Terminal("n\n"))
    code, lines = fault(capsys, "traces", "delete", "--user-id", "user 0")
    assert (code, lines) == (1, ["Delete 2 traces for good? [y/N] sterna: nothing was deleted"])
    monkeypatch.setattr(sys, "stdin", Terminal("y\n"))
    assert run(capsys, "traces", "delete", "--user-id", "user 0") == "2 traces deleted\n"
    assert run(capsys, "traces", "delete", "--user-id", "user 0", "--yes") == "0 traces deleted\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    deleted = json.loads(run(capsys, "traces", "delete", "--key-id", "key-0", "--json"))
    assert deleted == {"object": "traces.deleted", "num_deleted": 2, "versions": []}
    assert run(capsys, "traces", "delete", "--older-than", "30d") == "2 traces deleted\n"
    assert listed(capsys) == []
    code, [line] = fault(capsys, "traces", "delete", "--yes")
    assert (code, "say which traces" in line) == (2, True)


def test_long_work_shows_a_bar_on_a_terminal(
    client: Client, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    client.ask([user("a")], assistant("b"))
    for arguments, unit in (
        (["export", "--output", "a.jsonl"], "1 lines"),
        (["import", "a.jsonl"], "100%"),
        (["delete", "--older-than", "1s"], "100%"),
    ):
        monkeypatch.setattr(sys, "stderr", Terminal())
        assert cli.main(["traces", *arguments]) == 0
        assert unit in sys.stderr.getvalue(), arguments  # type: ignore[attr-defined]


def test_totals(client: Client, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "traces", "stats").startswith("traces")
    client.ask([user("a")], assistant("b"), version="tools@1")
    client.ask([user("c")], assistant("d"))
    client.ask([user("e")], assistant("f"))
    rows = {line[:19].strip(): line[19:].strip() for line in run(capsys, "traces", "stats").splitlines()}
    assert (rows["traces"], rows["by version"], rows["by status"]) == ("3", "base 2, tools@1 1", "ok 3")
    assert json.loads(run(capsys, "traces", "stats", "--json", "--version", "tools@1"))["num_traces"] == 1


@pytest.mark.parametrize("verb", ["list", "show", "stats", "export", "feedback x --score 1", "delete --user-id x"])
def test_without_a_database_it_says_so(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("STERNA_DATABASE")
    code, [line] = fault(capsys, "traces", *verb.split(), "--data-dir", str(tmp_path / "none"))
    assert code == 1
    assert line.startswith(f"sterna: there is no database {tmp_path}/none/sterna.db")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (["list", "--limit", "0"], 1, "1 to 1000"),
        (["list", "--limit", "ten"], 2, "--limit"),
        (["list", "--before", "9" * 30], 1, "next_before"),
        (["list", "--since", "yesterday"], 2, "--since: "),
        (["list", "--status", "good"], 2, "--status: 'status' is one of ok, cancelled, failed"),
        (["list", "--user=eve"], 2, "did you mean --user-id?"),
        (["show", "trace-x"], 1, "no trace with the id 'trace-x'"),
        (["show"], 1, "no traces yet"),
        (["export", "--json"], 2, "--output"),
        (["look"], 2, "no verb 'look'"),
    ],
)
def test_what_is_wrong_is_one_line(
    arguments: list[str], code: int, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found, [line] = fault(capsys, "traces", *arguments)
    assert found == code
    assert reason in line


@pytest.mark.parametrize("command", [*(f"traces {verb}" for verb in VERBS), "keys create", "keys list", "keys revoke"])
def test_the_example_of_the_help_runs(command: str, client: Client, capsys: pytest.CaptureFixture[str]) -> None:
    record = client.ask([user("a")], assistant("b"))
    Path("traces.jsonl").write_text(json.dumps({"messages": [user("a"), assistant("b")]}))
    key = json.loads(run(capsys, "keys", "create", "x", "--json"))
    with pytest.raises(SystemExit):
        cli.main([*command.split(), "--help"])
    shown: Any = capsys.readouterr().out
    assert shown.startswith(f"usage: sterna {command} ")
    example = shown.rpartition("example:\n")[2].strip()
    assert example.startswith(f"sterna {command}")
    words = [{"TRACE": record.id, "KEY": key["id"]}.get(word, word) for word in shlex.split(example)]
    run(capsys, *words[1:])


def test_who_saw_a_trace_also_when_it_is_gone(
    client: Client, database: Database, capsys: pytest.CaptureFixture[str]
) -> None:
    record = client.ask([user("a")], assistant("b"), user_id="eve")
    lineage = Lineage(database)
    lineage.add_snapshot("sha256:a", "tools", {"train": [TraceQueries(database).show(ADMIN, record.id).summary.seq]})
    lineage.add_version("tools", 1, "sha256:a")
    lineage.add_version("tools", 2, "sha256:a")
    run(capsys, "traces", "lineage", record.id)
    gone = run(capsys, "traces", "delete", "--user-id", "eve", "--yes")
    assert gone == "1 traces deleted\ntrained or tested on some of them: tools@1, tools@2\n"
    assert run(capsys, "traces", "lineage", record.id).split() == [
        "snapshot", "part", "versions", "sha256:a", "train", "tools@1", "tools@2",
    ]  # fmt: skip
    assert json.loads(run(capsys, "traces", "lineage", record.id, "--json")) == {
        "object": "trace.lineage",
        "trace_id": record.id,
        "data": [{"snapshot": "sha256:a", "part": "train", "versions": ["tools@1", "tools@2"]}],
    }
    code, [line] = fault(capsys, "traces", "lineage", "trace-x")
    assert (code, "no trace" in line) == (1, True)
