"""Feedback: what somebody found out later about a trace or a whole episode, any number of times.

Idempotent: the same idempotency key (of the same API key), or without one the same feedback on the same target, is the
same row. An idempotency key with another body is a conflict. Late is fine; a trace that was deleted, does not exist or
belongs to another key is not found, and the three look alike. Not here: HTTP, and what training makes of a score.
"""

import hashlib
import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import Any, Literal, get_args

from pydantic import ValidationError
from sqlalchemy import Connection, select, update

from server.errors import InvalidRequestError
from server.openai.protocol.messages import AssistantMessage
from server.storage.clock import Clock, utc_now
from server.storage.database import Database
from server.traces.errors import FeedbackConflictError, TraceNotFoundError
from server.traces.filters import episode_seq
from server.traces.redaction import Redactor
from server.traces.store import LOCK
from server.traces.tables import MAX_NAME_LENGTH, episodes, feedback, traces
from server.traces.text import short
from server.traces.viewer import Viewer

Source = Literal["known_answer", "audit_sample", "user_correction", "thumbs"]
TargetKind = Literal["trace", "response", "episode"]
MAX_COMMENT_LENGTH = 16_384
MAX_BATCH = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Feedback:
    """At least one of `score`, `correction`, `label`, `comment` is set."""

    source: Source
    score: float | None = None
    """0 (wrong) to 1 (right)."""
    correction: Mapping[str, Any] | None = None
    """The assistant message that should have been the answer. Not for episodes."""
    label: str | None = None
    comment: str | None = None
    idempotency_key: str | None = None


@dataclass(frozen=True, slots=True)
class Target:
    kind: TargetKind
    id: str
    """An episode may also go by the viewer's own name for it."""


@dataclass(frozen=True, slots=True)
class StoredFeedback:
    id: str
    trace_id: str | None
    episode_id: str | None
    key_id: str
    created_at: datetime
    feedback: Feedback
    is_new: bool = False
    """False: it had been given before."""
    answered_by: tuple[str | None, ...] = ()
    """Of new feedback: the versions that answered its trace or episode, for users; None is the base."""


class FeedbackStore:
    """Synchronous: call it from a thread."""

    def __init__(self, database: Database, *, redactor: Redactor | None = None, clock: Clock = utc_now) -> None:
        self._database = database
        self._redactor = redactor or Redactor()
        self._clock = clock

    def add(self, viewer: Viewer, target: Target, given: Feedback) -> StoredFeedback:
        """Raises InvalidRequestError, TraceNotFoundError, FeedbackConflictError."""
        return self._add_all(viewer, {"": (target, given)})[0]

    def add_many(self, viewer: Viewer, items: Sequence[tuple[Target, Feedback]]) -> list[StoredFeedback]:
        """All or none; the error's `param` says which item it was: `items[2].score`."""
        if len(items) > MAX_BATCH:
            raise InvalidRequestError(f"at most {MAX_BATCH} items of feedback at once, got {len(items)}", param="items")
        return self._add_all(viewer, {f"items[{index}]": item for index, item in enumerate(items)})

    def _add_all(self, viewer: Viewer, items: Mapping[str, tuple[Target, Feedback]]) -> list[StoredFeedback]:
        """`items` by where they stand, for the error."""
        for where, (target, given) in items.items():
            _check(target, given, where)
        stored = []
        with self._database.write(lock=LOCK) as connection:
            for where, (target, given) in items.items():
                try:
                    stored.append(self._add(connection, viewer, target, given))
                except (TraceNotFoundError, FeedbackConflictError) as error:
                    error.param = where or None
                    raise
        return stored

    def list_for_trace(self, viewer: Viewer, trace_id: str) -> list[StoredFeedback]:
        """Its own and its episode's, as far as the viewer sees them, oldest first. Raises TraceNotFoundError."""
        with self._database.read() as connection:
            trace = _find(connection, viewer, Target("trace", trace_id))
            mine = (feedback.c.trace_seq == trace.trace_seq) | (feedback.c.episode_seq == trace.episode_seq)
            query = select(feedback, traces.c.id.label("trace_id"), episodes.c.id.label("episode_id"))
            query = query.outerjoin(traces, feedback.c.trace_seq == traces.c.seq)
            query = query.outerjoin(episodes, feedback.c.episode_seq == episodes.c.seq)
            query = query.where(mine, *viewer.sees(feedback)).order_by(feedback.c.seq)
            return [_stored(row) for row in connection.execute(query)]

    def _add(self, connection: Connection, viewer: Viewer, target: Target, given: Feedback) -> StoredFeedback:
        found = _find(connection, viewer, target)
        is_for_episode = target.kind == "episode"
        # However it was addressed: a trace also goes by its response's id, an episode by its name.
        place = (None, found.episode_seq) if is_for_episode else (found.trace_seq, None)
        body = _digest("body", asdict(replace(given, idempotency_key=None)))
        claim = _digest("claim", viewer.key_id, given.idempotency_key or [*place, body.hex()])
        query = select(feedback).where(feedback.c.claim_digest == claim)
        known = connection.execute(query).one_or_none()
        if known is not None:
            if bytes(known.body_digest) != body or (known.trace_seq, known.episode_seq) != place:
                raise FeedbackConflictError("This idempotency key was used before, with other feedback.")
            return StoredFeedback(known.id, found.trace_id, found.episode_id, known.key_id, known.created_at, given)
        (comment, label, correction), _ = self._redactor.redact([given.comment, given.label, given.correction])
        row = {
            "id": "fb-" + uuid.uuid4().hex,
            "trace_seq": place[0],
            "episode_seq": place[1],
            "key_id": viewer.key_id,
            "created_at": self._clock(),
            "source": given.source,
            "score": given.score,
            "label": short(label, MAX_NAME_LENGTH),
            "comment": short(comment, MAX_COMMENT_LENGTH),
            "correction": correction,
            "claim_digest": claim,
            "body_digest": body,
        }
        connection.execute(feedback.insert().values(row))
        of_target = traces.c.episode_seq == found.episode_seq if is_for_episode else traces.c.seq == found.trace_seq
        connection.execute(update(traces).where(of_target).values(has_feedback=True))
        answered = select(traces.c.version).where(of_target, traces.c.purpose == "user", traces.c.endpoint != "import")
        return StoredFeedback(
            row["id"],
            found.trace_id,
            found.episode_id,
            viewer.key_id,
            row["created_at"],
            given,
            is_new=True,
            answered_by=tuple(connection.scalars(answered.distinct())),
        )


@dataclass(frozen=True, slots=True)
class _Found:
    episode_seq: int
    episode_id: str
    trace_seq: int | None = None
    trace_id: str | None = None


def _find(connection: Connection, viewer: Viewer, target: Target) -> _Found:
    """Raises TraceNotFoundError."""
    if target.kind == "episode":
        query = select(episodes.c.seq, episodes.c.id).where(episodes.c.seq == episode_seq(viewer, target.id))
        row = connection.execute(query).one_or_none()
        if row is not None:
            return _Found(*row)
    else:
        column = traces.c.id if target.kind == "trace" else traces.c.response_id
        query4 = (
            select(episodes.c.seq, episodes.c.id, traces.c.seq, traces.c.id)
            .select_from(traces.join(episodes))
            .where(column == short(target.id, MAX_NAME_LENGTH), *viewer.sees(traces))
            .order_by(traces.c.seq.desc())  # an upstream's response ids may repeat: the latest
            .limit(1)
        )
        row4 = connection.execute(query4).one_or_none()
        if row4 is not None:
            return _Found(*row4)
    raise TraceNotFoundError(f"There is no {target.kind} with the id '{target.id[:80]}'.")


def _check(target: Target, given: Feedback, where: str) -> None:
    """The types are right (the routes see to that); the values may not be."""

    def refuse(message: str, param: str) -> InvalidRequestError:
        return InvalidRequestError(message, param=f"{where}.{param}".lstrip("."), code="invalid_value")

    if given.source not in get_args(Source):
        raise refuse(f"'source' is one of {', '.join(get_args(Source))}, not {given.source[:40]!r}", "source")
    if given.score is not None and not 0 <= given.score <= 1:  # also NaN
        raise refuse(f"'score' lies between 0 and 1, not {given.score}", "score")
    if given.score is None and given.correction is None and given.label is None and given.comment is None:
        raise refuse("feedback needs a 'score', a 'correction', a 'label' or a 'comment'", "score")
    if given.correction is not None:
        if target.kind == "episode":
            raise refuse("a 'correction' belongs to one trace, not to an episode", "correction")
        try:
            AssistantMessage.model_validate(given.correction)
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            path = ".".join(str(step) for step in ("correction", *problem["loc"]))
            raise refuse(f"'correction' must be an assistant message: {problem['msg']}", path) from None
    for text, limit, param in (
        (given.label, MAX_NAME_LENGTH, "label"),
        (given.comment, MAX_COMMENT_LENGTH, "comment"),
        (given.idempotency_key, MAX_NAME_LENGTH, "idempotency_key"),
    ):
        if text is not None and not 0 < len(text) <= limit:
            raise refuse(f"'{param}' has 1 to {limit} characters, not {len(text)}", param)


def _stored(row: Any) -> StoredFeedback:
    given = Feedback(
        source=row.source, score=row.score, correction=row.correction, label=row.label, comment=row.comment
    )
    return StoredFeedback(row.id, row.trace_id, row.episode_id, row.key_id, row.created_at, given)


def _digest(kind: str, *parts: Any) -> bytes:
    text = json.dumps(parts, sort_keys=True)
    return hashlib.blake2b(text.encode("ascii"), digest_size=16, person=kind.encode()).digest()
