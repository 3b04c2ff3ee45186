"""Rounds in the database: begun, moved from phase to phase, begun anew, finished. Every write is fenced by the lease.

A round is in one row; what is too large for it (snapshot, checkpoints, answers) is in its directory. A phase's results
and the step to the next phase are one transaction; so are a round's begin and the end of the request for it.
Synchronous: call it from a thread.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, delete, func, insert, select, update

from finetune.rounds.errors import LeaseHeldError, RoundNotFoundError
from finetune.rounds.lease import Lease, check_lease
from finetune.rounds.round import DECISIONS, PHASES, Phase, Result, Round, RoundRef
from finetune.rounds.tables import requests, rounds
from server.adapters.version import check_adapter_name
from server.storage.clock import Clock, utc_now
from server.storage.database import Database
from server.traces.tables import feedback, traces

LOCK = "rounds"


@dataclass(frozen=True, slots=True)
class Request:
    """Somebody asked for a round that has not begun."""

    adapter: str
    parent: int | None


class RoundStore:
    def __init__(self, database: Database, *, clock: Clock = utc_now) -> None:
        self._database = database
        self._clock = clock

    # -- reading ------------------------------------------------------------------------------------------------------

    def get(self, ref: RoundRef) -> Round:
        """Raises RoundNotFoundError."""
        query = select(rounds).where(rounds.c.adapter == ref.adapter, rounds.c.number == ref.number)
        with self._database.read() as connection:
            row = connection.execute(query).one_or_none()
        if row is None:
            raise RoundNotFoundError(f"there is no round {ref}")
        return _round(row)

    def list(self, adapter: str | None = None, *, limit: int | None = 1000) -> Sequence[Round]:
        """Newest first; of one adapter: also what the gate has decided about it. `limit`: None: all."""
        query = select(rounds).order_by(rounds.c.created_at.desc(), rounds.c.number.desc()).limit(limit)
        if adapter is not None:
            query = query.where(rounds.c.adapter == adapter)
        with self._database.read() as connection:
            return [_round(row) for row in connection.execute(query)]

    def unfinished(self, adapter: str) -> Round | None:
        query = select(rounds).where(rounds.c.adapter == adapter, rounds.c.result.is_(None))
        with self._database.read() as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else _round(row)

    def of_version(self, adapter: str, version: int) -> Round | None:
        """The newest round that made this version."""
        query = select(rounds).where(rounds.c.adapter == adapter, rounds.c.version == version)
        with self._database.read() as connection:
            row = connection.execute(query.order_by(rounds.c.number.desc()).limit(1)).one_or_none()
        return None if row is None else _round(row)

    def requests(self) -> Sequence[Request]:
        """Oldest first."""
        query = select(requests).order_by(requests.c.created_at, requests.c.adapter)
        with self._database.read() as connection:
            return [Request(row.adapter, row.parent) for row in connection.execute(query)]

    # -- writing ------------------------------------------------------------------------------------------------------

    def request(self, adapter: str, parent: int | None) -> None:
        """A round of it is to begin; in place of an earlier request."""
        row = {"adapter": check_adapter_name(adapter), "parent": parent, "created_at": self._clock()}
        with self._database.write(lock=LOCK) as connection:
            connection.execute(delete(requests).where(requests.c.adapter == adapter))
            connection.execute(insert(requests).values(row))

    def begin_requested(
        self, lease: Lease, *, cause: str, base_digest: str, settings: Mapping[str, Any]
    ) -> Round | None:
        """None: nobody asks for one (any more). Raises LeaseLostError."""
        with self._fenced(lease) as connection:
            mine = requests.c.adapter == lease.name
            row = connection.execute(select(requests).where(mine)).one_or_none()
            if row is None:
                return None
            connection.execute(delete(requests).where(mine))
            ref = self._insert(connection, lease, cause, base_digest, settings, row.parent)
        return self.get(ref)

    def begin(
        self, lease: Lease, *, cause: str, base_digest: str, settings: Mapping[str, Any], parent: int | None = None
    ) -> Round:
        """The next round of the lease's adapter, with the traces that there are now. Raises LeaseLostError."""
        with self._fenced(lease) as connection:
            ref = self._insert(connection, lease, cause, base_digest, settings, parent)
        return self.get(ref)

    def advance(self, lease: Lease, round: Round, facts: Mapping[str, Any], **columns: Any) -> Round:
        """The phase is done. `columns`: snapshot, version, decision. Raises LeaseLostError."""
        phase = PHASES[PHASES.index(round.phase) + 1]
        return self._write(lease, round, phase=phase, facts=_joined(round, facts), **columns)

    def note(self, lease: Lease, round: Round, facts: Mapping[str, Any], **columns: Any) -> Round:
        """Something that a phase must find again if it is cut off. Raises LeaseLostError."""
        return self._write(lease, round, facts=_joined(round, facts), **columns)

    def finish(
        self, lease: Lease, round: Round, result: Result, reason: str, facts: Mapping[str, Any] | None = None
    ) -> Round:
        """Raises LeaseLostError."""
        return self._write(lease, round, result=result, reason=reason, facts=_joined(round, facts or {}))

    def restart(self, lease: Lease, round: Round, reason: str) -> Round:
        """From the snapshot on, with the same traces but for the deleted ones. What its gate has decided stays in the
        history: the same traces must not be asked for another decision. Raises LeaseLostError."""
        begin = dict(round.facts["begin"])
        if round.decision is not None:
            begin[DECISIONS] = [*begin.get(DECISIONS, []), round.decision]
        return self._write(
            lease,
            round,
            phase=PHASES[0],
            reason=reason,
            snapshot=None,
            version=None,
            decision=None,
            facts={"begin": begin},
            num_restarts=round.num_restarts + 1,
        )

    def _write(self, lease: Lease, round: Round, **columns: Any) -> Round:
        ref = round.ref
        assert lease.name == ref.adapter
        this = (rounds.c.adapter == ref.adapter) & (rounds.c.number == ref.number) & rounds.c.result.is_(None)
        with self._fenced(lease) as connection:
            done = connection.execute(update(rounds).where(this).values(updated_at=self._clock(), **columns))
            assert done.rowcount == 1, f"{ref} is finished"
        return self.get(ref)

    def _insert(
        self,
        connection: Connection,
        lease: Lease,
        cause: str,
        base_digest: str,
        settings: Mapping[str, Any],
        parent: int | None,
    ) -> RoundRef:
        adapter = check_adapter_name(lease.name)
        now = self._clock()
        mine = rounds.c.adapter == adapter
        if connection.scalar(select(rounds.c.number).where(mine, rounds.c.result.is_(None))) is not None:
            raise LeaseHeldError(f"a round of {adapter} is unfinished")
        number = 1 + (connection.scalar(select(func.max(rounds.c.number)).where(mine)) or 0)
        row = {
            "adapter": adapter,
            "number": number,
            "phase": PHASES[0],
            "reason": "",
            "cause": cause,
            "parent": parent,
            "base_digest": base_digest,
            "settings": dict(settings),
            "last_seq": connection.scalar(select(func.max(traces.c.seq))) or 0,
            "facts": {"begin": {"last_feedback_seq": connection.scalar(select(func.max(feedback.c.seq))) or 0}},
            "num_restarts": 0,
            "created_at": now,
            "updated_at": now,
        }
        connection.execute(insert(rounds).values(row))
        return RoundRef(adapter, number)

    @contextmanager
    def _fenced(self, lease: Lease) -> Iterator[Connection]:
        with self._database.write(lock=LOCK) as connection:
            check_lease(connection, lease)
            yield connection


def _joined(round: Round, facts: Mapping[str, Any]) -> dict[str, Any]:
    """A phase's facts are under its name."""
    known = dict(round.facts)
    if facts:
        known[round.phase] = dict(known.get(round.phase, {})) | dict(facts)
    return known


def _round(row: Row[Any]) -> Round:
    return Round(
        ref=RoundRef(row.adapter, row.number),
        phase=Phase(row.phase),
        result=None if row.result is None else Result(row.result),
        reason=row.reason,
        cause=row.cause,
        parent=row.parent,
        base_digest=row.base_digest,
        settings=row.settings,
        last_seq=row.last_seq,
        snapshot=row.snapshot,
        version=row.version,
        facts=row.facts,
        decision=row.decision,
        num_restarts=row.num_restarts,
        created_at=row.created_at,
        updated_at=row.updated_at,
    )
