"""A log of a million traces: what the next commit and every kind of list take, beside a log that is nearly empty.

Measures, on SQLite (default) or on PostgreSQL (a private server): the time of a commit of one trace and of 32, with a
thousand traces in the log and with all, and of one that begins as every fifth episode does; the time of the first page
of each list (50 traces) under each filter, alone and in combinations that match much, little or nothing, for admin, for
an API key with half of the traffic and for one with little. Traces are written by bulk insert: 300 prompt tokens, two
anchors, a tool call in three, episodes of five, 20 keys, 12 versions, 5,000 users.

usage: python -m benchmarks.million_traces [--num-traces 1000000] [--database sqlite|postgres] [--json]
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

from sqlalchemy import Connection, insert, select

from server.storage.database import Database, open_database
from server.storage.types import pack_json, pack_token_ids
from server.traces.filters import TraceFilter
from server.traces.queries import TraceQueries
from server.traces.sides import SideDraw
from server.traces.store import TraceStore
from server.traces.tables import episode_anchors, episodes, tool_calls, trace_contents, traces
from server.traces.viewer import ADMIN, Viewer
from tests.server.postgres import Cluster
from tests.server.traces.builders import START, Message, make_record, user

NEARLY_EMPTY = 1000
BATCH = 10_000
EPISODE_LENGTH, NUM_KEYS, NUM_VERSIONS, NUM_USERS = 5, 20, 12, 5000
TOKEN_IDS = list(range(300))
LIMIT_MS = 100.0
CRON = (user("It is time. " * 30),)
"""What an agent is told that a timer starts."""


def fill(database: Database, num_have: int, num_wanted: int) -> None:
    draw = random.Random(num_have)
    group = SideDraw(database.secret("episode_sides")).group_digest(make_record(CRON).episode.group)
    for start in range(num_have, num_wanted, BATCH):
        with database.write() as connection:
            _insert_batch(connection, draw, group, start, min(BATCH, num_wanted - start))
        if sys.stderr.isatty():
            print(f"\r{start} of {num_wanted}", end="", file=sys.stderr)


def _insert_batch(connection: Connection, draw: random.Random, group: bytes, start: int, count: int) -> None:
    packed_ids = pack_token_ids(TOKEN_IDS)
    said = {"messages": [{"role": "system", "content": os.urandom(200).hex()}, {"role": "user", "content": "q" * 50}]}
    content = {
        "request": pack_json(said),
        "answers": pack_json([{"message": {"role": "assistant", "content": "hello there " * 5}, "num_tokens": 20}]),
        "details": pack_json({"model": "base", "model_digest": "sha256:" + "a" * 64}),
        "prompt_token_ids": packed_ids,
        "completion_token_ids": packed_ids,
    }
    first = start // EPISODE_LENGTH
    starts = [_episode(draw, group, first + number) for number in range(-(-count // EPISODE_LENGTH))]
    episode_seqs = connection.scalars(insert(episodes).returning(episodes.c.seq), starts).all()
    rows = [
        _trace(draw, start + n, episode_seqs[n // EPISODE_LENGTH], first + n // EPISODE_LENGTH) for n in range(count)
    ]
    seqs = connection.scalars(insert(traces).returning(traces.c.seq), rows).all()
    connection.execute(insert(trace_contents), [{"trace_seq": seq, **content} for seq in seqs])
    anchors = [{"trace_seq": seq, "digest": os.urandom(16)} for seq in seqs for _ in range(2)]
    connection.execute(insert(episode_anchors), anchors)
    calls = [
        {"trace_seq": seq, "position": 0, "call_id": f"call_{draw.getrandbits(128):032x}", "name": "s"}
        for seq in seqs[::3]
    ]
    connection.execute(insert(tool_calls), calls)


def _episode(draw: random.Random, group: bytes, number: int) -> dict[str, Any]:
    return {
        "id": f"ep-{number:032x}", "key_id": _key(number), "side": "train",
        "group_digest": draw.randbytes(16) if number % 5 else group, "created_at": START,
    }  # fmt: skip


def _key(episode: int) -> str:
    """Half of all episodes are one key's."""
    return f"key-{episode % NUM_KEYS if episode % 2 else 0}"


def _trace(draw: random.Random, number: int, episode_seq: int, episode: int) -> dict[str, Any]:
    version = draw.randrange(NUM_VERSIONS)
    return {
        "id": f"trace-{draw.getrandbits(128):032x}", "response_id": f"chatcmpl-{draw.getrandbits(128):032x}",
        "episode_seq": episode_seq, "created_at": START + timedelta(seconds=number), "endpoint": "chat",
        "purpose": "user" if draw.random() < 0.97 else "evaluation",
        "status": "ok" if draw.random() < 0.99 else draw.choice(["failed", "cancelled"]), "finish_reason": "stop",
        "requested_model": "tools", "adapter": "tools" if version else None,
        "version": f"tools@{version}" if version > 1 else None, "key_id": _key(episode),
        "user_id": f"user-{draw.randrange(NUM_USERS)}" if draw.random() < 0.5 else None, "session_id": None,
        "has_tools": True, "has_tool_calls": draw.random() < 0.3, "has_tool_error": draw.random() < 0.02,
        "was_constrained": False, "has_feedback": draw.random() < 0.05, "is_audit": draw.random() < 0.01,
        "is_redacted": False, "num_prompt_tokens": 300, "num_completion_tokens": 20, "num_cached_tokens": 0,
        "ttft_seconds": 0.1, "duration_seconds": 0.5, "num_bytes": 1500,
    }  # fmt: skip


def commit_ms(
    database: Database, size: int, count: int, messages: Sequence[Message] = (user("what is it? " * 30),)
) -> float:
    """Median of a commit of `size` traces as the server makes them, each an episode of its own."""
    store, seconds = TraceStore(database), []
    for _ in range(count):
        records = [make_record(messages, None, prompt_token_ids=TOKEN_IDS) for _ in range(size)]
        seconds.append(_seconds(lambda records=records: store.write(records)))  # type: ignore[misc]
    return statistics.median(seconds) * 1e3


def filters(num_traces: int, episode_id: str) -> list[dict[str, Any]]:
    """Much, little and nothing of everything that can be asked for."""
    middle, end = START + timedelta(seconds=num_traces // 2), START + timedelta(seconds=num_traces)
    hour, lately = timedelta(hours=1), end - timedelta(minutes=5)
    return [
        {}, {"adapter": "tools"}, {"adapter": "none"}, {"version": "tools@2"}, {"version": "tools@99"},
        {"key_id": "key-3"}, {"key_id": "key-99"}, {"user_id": "user-7"}, {"user_id": "nobody"},
        {"episode_id": episode_id}, {"purpose": "evaluation"}, {"purpose": "user"}, {"status": "failed"},
        {"status": "ok"}, {"has_tool_calls": True}, {"has_tool_calls": False}, {"has_tool_error": True},
        {"has_feedback": True}, {"is_audit": True}, {"since": middle}, {"until": middle}, {"until": START + hour},
        {"since": middle, "until": middle + hour}, {"since": end + 24 * hour},
        {"version": "tools@2", "status": "failed"}, {"version": "tools@2", "has_tool_calls": True},
        {"version": "tools@2", "has_feedback": True}, {"key_id": "key-3", "version": "tools@2"},
        {"key_id": "key-99", "version": "tools@2"}, {"user_id": "user-7", "version": "tools@2"},
        {"key_id": "key-3", "has_tool_error": True, "version": "tools@5"},
        {"adapter": "tools", "purpose": "user", "status": "ok", "has_tool_calls": True},
        {"version": "tools@2", "since": START, "until": START + (end - START) / 10},
        {"key_id": "key-3", "status": "failed", "has_feedback": True, "has_tool_error": True, "is_audit": True},
        {"adapter": "none", "version": "tools@2"}, {"since": lately}, {"adapter": "tools", "since": lately},
        {"version": "tools@2", "since": lately}, {"has_tool_calls": False, "since": lately},
        {"adapter": "tools", "since": end + hour}, {"adapter": "tools", "since": middle, "until": middle + hour},
        {"adapter": "none", "since": middle}, {"adapter": "tools", "status": "failed", "since": lately},
    ]  # fmt: skip


def list_ms(database: Database, num_traces: int) -> list[tuple[float, str]]:
    """The median of five, slowest first, with what was asked for."""
    queries, found = TraceQueries(database), []
    with database.read() as connection:
        episode_id = connection.scalar(select(episodes.c.id).order_by(episodes.c.seq).limit(1).offset(100))
    for where in filters(num_traces, str(episode_id)):
        for viewer in (ADMIN, Viewer("key-0"), Viewer("key-3")):
            wanted = TraceFilter(**where)
            ask: Callable[[], object] = lambda wanted=wanted, viewer=viewer: queries.list(viewer, wanted)  # type: ignore[misc]  # noqa: E731
            seconds = statistics.median(_seconds(ask) for _ in range(5))
            text = " ".join(f"{name}={value}" for name, value in where.items()) or "everything"
            found.append((seconds * 1e3, f"{text} ({'admin' if viewer.is_admin else viewer.key_id})"))
    return sorted(found, reverse=True)


def _seconds(act: Callable[[], object]) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def tidy(database: Database) -> None:
    """As the server's own housekeeping, or PostgreSQL's autovacuum, would have by then."""
    if database.dialect == "sqlite":
        database.tidy()
    else:
        with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("VACUUM ANALYZE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-traces", type=int, default=1_000_000)
    parser.add_argument("--database", choices=("sqlite", "postgres"), default="sqlite")
    parser.add_argument("--json", action="store_true", help="only the line of JSON")
    args = parser.parse_args()
    with ExitStack() as stack:
        if args.database == "sqlite":
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="sterna-bench-"))
            url = f"sqlite:///{folder}/sterna.db"
        else:
            cluster = Cluster()
            stack.callback(cluster.remove)
            url = cluster.url(cluster.create_database())
        database = open_database(url)
        fill(database, 0, NEARLY_EMPTY)
        result: dict[str, object] = {"few_commit_1_ms": commit_ms(database, 1, 50)}
        result["few_commit_32_ms"] = commit_ms(database, 32, 20)
        start = time.perf_counter()
        fill(database, NEARLY_EMPTY, args.num_traces)
        result["fill_seconds"] = time.perf_counter() - start
        tidy(database)
        database.close()
        database = open_database(url)
        result["commit_1_ms"] = commit_ms(database, 1, 50)
        result["commit_32_ms"] = commit_ms(database, 32, 20)
        result["commit_common_first_message_ms"] = commit_ms(database, 1, 50, CRON)
        lists = list_ms(database, args.num_traces)
        database.close()
    result |= {
        "lists": len(lists),
        "lists_median_ms": statistics.median(milliseconds for milliseconds, _ in lists),
        "lists_max_ms": lists[0][0],
        "lists_over_100_ms": sum(milliseconds > LIMIT_MS for milliseconds, _ in lists),
    }
    result = {key: round(value, 1) if isinstance(value, float) else value for key, value in result.items()}
    if not args.json:
        print("\n".join(f"{milliseconds:10.1f} ms  {text}" for milliseconds, text in lists[:10]))
        print("\n".join(f"{key:<20} {value:>10}" for key, value in result.items()))
    about = {"benchmark": "million_traces", "database": args.database, "num_traces": args.num_traces}
    print(json.dumps({**about, **result}))


if __name__ == "__main__":
    main()
