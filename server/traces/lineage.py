"""Which snapshots hold a trace, which versions learned from it, and which of a snapshot's traces are gone.

Written when a snapshot is frozen and when a version has been trained; kept after the traces themselves are deleted, by
their sequence numbers, which are never used again. Not here: the snapshots' files (finetune/dataset/snapshot.py).
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from sqlalchemy import insert, select, union

from server.storage.clock import Clock, utc_now
from server.storage.database import Database
from server.traces.deletion import BATCH, Reason
from server.traces.errors import TraceNotFoundError
from server.traces.tables import snapshot_traces, snapshot_versions, snapshots, trace_tombstones, traces

Part = Literal["train", "replay", "held_out"]
FORGOTTEN: tuple[Reason, ...] = ("requested", "age")
"""Deletions after which a trace may not be learned from. Retention by size only wants the disk back."""


@dataclass(frozen=True, slots=True)
class Sighting:
    """A snapshot that holds a trace. `versions`, as `tools@7`, learned from it (of "held_out": were tested on it)."""

    snapshot: str
    part: str
    versions: tuple[str, ...]


class Lineage:
    """Synchronous: call it from a thread."""

    def __init__(self, database: Database, *, clock: Clock = utc_now) -> None:
        self._database = database
        self._clock = clock

    def add_snapshot(self, digest: str, adapter: str, parts: Mapping[Part, Iterable[int]]) -> None:
        """`parts`: the traces' sequence numbers. A snapshot that is known already stays as it is."""
        with self._database.write(lock="snapshots") as connection:
            if connection.scalar(select(snapshots.c.seq).where(snapshots.c.digest == digest)) is not None:
                return
            row = insert(snapshots).values(digest=digest, adapter=adapter, created_at=self._clock())
            snapshot = connection.scalar(row.returning(snapshots.c.seq))
            # A trace that is replayed and trained on in one snapshot counts as trained on.
            of_trace: dict[int, Part] = {}
            for part in ("held_out", "replay", "train"):
                of_trace |= dict.fromkeys(parts.get(part, ()), part)
            rows = [{"trace_seq": seq, "snapshot_seq": snapshot, "part": part} for seq, part in of_trace.items()]
            if rows:
                connection.execute(insert(snapshot_traces), rows)

    def add_version(self, adapter: str, number: int, snapshot: str, *, parent: int | None = None) -> None:
        """`parent`: the version of the same adapter whose weights the training began with."""
        own = select(snapshots.c.seq).where(snapshots.c.digest == snapshot)
        of_parent = select(snapshot_versions.c.snapshot_seq).where(
            snapshot_versions.c.adapter == adapter, snapshot_versions.c.number == parent
        )
        with self._database.write(lock="snapshots") as connection:
            seqs = connection.scalars(own if parent is None else union(own, of_parent)).all()
            assert seqs, f"snapshot {snapshot} was never added"
            rows = [{"adapter": adapter, "number": number, "snapshot_seq": seq} for seq in seqs]
            connection.execute(self._database.insert(snapshot_versions).on_conflict_do_nothing(), rows)

    def sightings(self, trace_id: str) -> list[Sighting]:
        """Also for a deleted trace; oldest first. Raises TraceNotFoundError for one that never was."""
        known = union(
            select(traces.c.seq).where(traces.c.id == trace_id),
            select(trace_tombstones.c.seq).where(trace_tombstones.c.id == trace_id),
        )
        with self._database.read() as connection:
            seqs = connection.scalars(known).all()
            if not seqs:
                raise TraceNotFoundError(f"There is no trace with the id '{trace_id[:80]}'.")
            held = (
                select(snapshots.c.seq, snapshots.c.digest, snapshot_traces.c.part)
                .join(snapshot_traces)
                .where(snapshot_traces.c.trace_seq.in_(seqs))
                .order_by(snapshots.c.seq)
            )
            found = []
            for snapshot, digest, part in connection.execute(held):
                learned = select(snapshot_versions.c.adapter, snapshot_versions.c.number)
                learned = learned.where(snapshot_versions.c.snapshot_seq == snapshot)
                versions = connection.execute(learned.order_by(*learned.selected_columns)).all()
                found.append(Sighting(digest, part, tuple(f"{adapter}@{number}" for adapter, number in versions)))
        return found

    def versions_that_saw(self, trace_ids: Sequence[str]) -> list[str]:
        """As `tools@7`, sorted: those that were trained or tested on one of these traces, which may be deleted."""
        found: set[tuple[str, int]] = set()
        for start in range(0, len(trace_ids), BATCH):
            batch = trace_ids[start : start + BATCH]
            seqs = union(
                select(traces.c.seq).where(traces.c.id.in_(batch)),
                select(trace_tombstones.c.seq).where(trace_tombstones.c.id.in_(batch)),
            )
            saw = (
                select(snapshot_versions.c.adapter, snapshot_versions.c.number)
                .join(snapshot_traces, snapshot_traces.c.snapshot_seq == snapshot_versions.c.snapshot_seq)
                .where(snapshot_traces.c.trace_seq.in_(seqs))
            )
            with self._database.read() as connection:
                found.update((adapter, number) for adapter, number in connection.execute(saw.distinct()))
        return [f"{adapter}@{number}" for adapter, number in sorted(found)]

    def deleted_from(self, snapshot: str, reasons: Collection[Reason] = FORGOTTEN) -> list[str]:
        """Ids of the snapshot's traces that were deleted since."""
        query = (
            select(trace_tombstones.c.id)
            .join(snapshot_traces, snapshot_traces.c.trace_seq == trace_tombstones.c.seq)
            .join(snapshots)
            .where(snapshots.c.digest == snapshot, trace_tombstones.c.reason.in_(reasons))
            .order_by(trace_tombstones.c.seq)
        )
        with self._database.read() as connection:
            return list(connection.scalars(query))
