"""Traces out and in as JSON lines in OpenAI's fine-tuning format: {"messages": [...], "tools": [...]} a line.

The last message of a line is the answer. Export takes chat traces that ended well, one line a choice, and what the
format does not know (reasoning, annotations) stays behind. Import checks every line as strictly as a request, makes one
trace and one episode of it, and may be repeated: the id of an imported trace comes from its content. Imported traces
are never stitched to traffic, because their tool call ids are somebody else's.
"""

import hashlib
import json
import re
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json
from sqlalchemy import func, null, select

from server.errors import InvalidRequestError
from server.openai.protocol.messages import Messages
from server.openai.protocol.tools import Tools
from server.storage.clock import Clock, utc_now
from server.storage.database import Database
from server.traces.digests import read_conversation
from server.traces.filters import TraceFilter, conditions
from server.traces.record import Answer, EpisodeRef, TraceRecord
from server.traces.store import TraceStore
from server.traces.tables import feedback, trace_contents, traces
from server.traces.viewer import Viewer

BATCH = 200
_HALF_PAIR = re.compile("[\ud800-\udfff]")
"""Half a surrogate pair, which an upstream may answer and UTF-8 cannot hold."""
_LINE_KEYS = {"messages", "tools", "parallel_tool_calls"}
_MESSAGE_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", "refusal", "weight")
_MESSAGES: TypeAdapter[Any] = TypeAdapter(Messages)
_TOOLS: TypeAdapter[Any] = TypeAdapter(Tools)


def export_lines(
    database: Database, viewer: Viewer, where: TraceFilter, *, with_corrections: bool = False
) -> Iterator[str]:
    """Oldest first. `with_corrections`: the latest correction that the viewer sees takes the place of its answer."""
    latest = select(func.max(feedback.c.seq)).where(
        feedback.c.trace_seq == traces.c.seq, feedback.c.correction.is_not(None), *viewer.sees(feedback)
    )
    newest = feedback.alias()
    correction = (
        select(newest.c.correction)
        .where(newest.c.seq == latest.correlate(traces).scalar_subquery())
        .correlate(traces)
        .scalar_subquery()
    )
    query = (
        select(
            traces.c.seq,
            trace_contents.c.request,
            trace_contents.c.answers,
            (correction if with_corrections else null()).label("correction"),
        )
        .join(trace_contents)
        .where(*conditions(viewer, where), traces.c.status == "ok", traces.c.endpoint != "completions")
        .order_by(traces.c.seq)
        .limit(BATCH)
    )
    last = 0
    while True:
        with database.read() as connection:
            rows = connection.execute(query.where(traces.c.seq > last)).all()
        for row in rows:
            answers = [row.correction] if row.correction else [answer["message"] for answer in row.answers]
            for answer in answers:
                line = json.dumps(_line(row.request, answer), separators=(",", ":"), ensure_ascii=False)
                yield _HALF_PAIR.sub("\ufffd", line)
        if len(rows) < BATCH:
            return
        last = rows[-1].seq


def _line(request: Mapping[str, Any], answer: Mapping[str, Any]) -> dict[str, Any]:
    line: dict[str, Any] = {"messages": [_message(message) for message in [*request["messages"], answer]]}
    if request.get("tools"):
        line["tools"] = request["tools"]
    parallel = request.get("sampling", {}).get("parallel_tool_calls")
    if parallel is not None:
        line["parallel_tool_calls"] = parallel
    return line


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: message[key] for key in _MESSAGE_KEYS if message.get(key) is not None}
    if "tool_calls" in kept:
        kept["tool_calls"] = [{key: call[key] for key in ("id", "type", "function")} for call in kept["tool_calls"]]
    return kept


def import_lines(
    store: TraceStore,
    viewer: Viewer,
    lines: Iterable[str],
    *,
    adapter: str | None = None,
    clock: Clock = utc_now,
) -> int:
    """Returns how many new traces there are. `adapter`: whose training they are for.

    Raises InvalidRequestError that names the line; the lines before it, in batches of 200, are in.
    """
    seen: Counter[bytes] = Counter()
    num_new = 0
    batch: list[TraceRecord] = []
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            line = _checked(text)
        except InvalidRequestError as error:
            raise InvalidRequestError(f"line {number}: {error}", param=error.param) from None
        batch.append(_record(line, viewer, adapter, clock, seen))
        if len(batch) == BATCH:
            num_new += len(store.write(batch, is_retry=True))
            batch = []
    return num_new + len(store.write(batch, is_retry=True))


def _checked(text: str) -> dict[str, Any]:
    try:
        # Not json.loads, which takes NaN and half surrogate pairs: neither could be written or exported.
        line = from_json(text.encode("utf-8", "surrogateescape"), allow_inf_nan=False)
    except ValueError as error:
        raise InvalidRequestError(f"not JSON: {error}") from None
    if not isinstance(line, dict) or not isinstance(line.get("messages"), list):
        raise InvalidRequestError("expected an object with a list of 'messages'", param="messages")
    unknown = sorted(line.keys() - _LINE_KEYS)
    if unknown:
        raise InvalidRequestError(f"unknown key '{unknown[0][:40]}'; known are messages, tools, parallel_tool_calls")
    plain = [
        {key: value for key, value in message.items() if key != "weight"} if isinstance(message, dict) else message
        for message in line["messages"]
    ]
    for param, adapter, value in (("messages", _MESSAGES, plain), ("tools", _TOOLS, line.get("tools") or None)):
        try:
            if value is not None:
                adapter.validate_python(value)
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            path = ".".join(str(step) for step in (param, *problem["loc"]))
            raise InvalidRequestError(f"{path}: {problem['msg']}", param=path) from None
    if line["messages"][-1]["role"] != "assistant":
        raise InvalidRequestError("the last message must be the assistant's", param="messages")
    return line


def _record(
    line: dict[str, Any], viewer: Viewer, adapter: str | None, clock: Clock, seen: Counter[bytes]
) -> TraceRecord:
    *messages, answer = line["messages"]
    content = json.dumps([viewer.key_id, adapter, line], sort_keys=True).encode("ascii")
    digest = hashlib.blake2b(content, digest_size=16).digest()
    seen[digest] += 1
    trace_id = hashlib.blake2b(digest + str(seen[digest]).encode(), digest_size=16).hexdigest()
    conversation = read_conversation(viewer.key_id, messages, line.get("tools"))
    sampling = {"parallel_tool_calls": line["parallel_tool_calls"]} if "parallel_tool_calls" in line else {}
    return TraceRecord(
        id=f"trace-{trace_id}",
        response_id=None,
        created_at=clock(),
        endpoint="import",
        requested_model=adapter or "import",
        messages=messages,
        tools=line.get("tools") or None,
        sampling=sampling,
        answers=(Answer(answer, "tool_calls" if answer.get("tool_calls") else "stop"),),
        model="import",
        adapter=adapter,
        key_id=viewer.key_id,
        episode=EpisodeRef(
            id="ep-" + uuid.uuid4().hex,
            group=conversation.group,
            context=conversation.context,
            is_stitched=False,
        ),
    )
