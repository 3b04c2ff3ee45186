"""Replays examples of earlier snapshots that the new one does not reach any more, so that old skills are not lost.

A trace that is still in the log is judged anew: it may have a correction since, or be held out by now. Of one that went
with the log's size limit, the earlier snapshot's row is what is left of it; of one that was deleted on request or by
age, nothing is used. What the new snapshot has looked at and left out does not come back this way. Which ones are taken
is drawn from digests of their ids, so that it is a fair sample of the past; in memory are those alone.
"""

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from finetune.dataset.candidates import Candidates
from finetune.dataset.filters import Drop
from finetune.dataset.near import NearTexts
from finetune.dataset.rows import ExampleRow
from finetune.dataset.snapshot import Snapshot
from finetune.dataset.source import BATCH, existing_seqs, read_by_seq
from server.storage.database import Database

_PREFIX = "replay:"
SPARE = 2
"""Rows of traces that are gone are kept in memory for so many times what is replayed: some are near held-out ones."""


def replay_rows(
    database: Database,
    candidates: Candidates,
    near: NearTexts,
    earlier: Sequence[Snapshot],
    reached: int,
    dropped: Counter[Drop],
    *,
    until_feedback: int | None = None,
) -> list[ExampleRow]:
    """At most `max_replay`, oldest first. `reached`: the oldest trace that the new snapshot has looked at itself."""
    most = candidates.selection.max_replay
    known = _known(database, candidates, earlier, dropped)
    existing = existing_seqs(database, sorted(set(known.values())))
    known = {name: seq for name, seq in known.items() if seq < reached or seq not in existing}
    order = sorted(known, key=_draw)
    gone = _rows_of(earlier, itertools.islice((name for name in order if known[name] not in existing), SPARE * most))
    seen: set[bytes] = set()
    chosen: list[ExampleRow] = []
    for start in range(0, len(order), BATCH):
        names = order[start : start + BATCH]
        if len(chosen) == most:
            dropped[Drop.OVER_BUDGET] += len(names)
            continue
        seqs = sorted({known[name] for name in names} & existing)
        current = read_by_seq(database, seqs, until_feedback=until_feedback)
        for name in names:
            found: list[ExampleRow] | Drop
            if len(chosen) == most:
                found = Drop.OVER_BUDGET
            elif known[name] not in existing:
                row = gone.get(name)
                found = Drop.OVER_BUDGET if row is None else Drop.NEAR_HELD_OUT if near.has(row.question) else [row]
            elif (trace := current.get(known[name])) is None:  # since a moment ago
                found = Drop.DELETED
            else:
                found = Drop.HELD_OUT_NOW if trace.side == "held_out" else candidates.examples(trace, near, seen)
            if isinstance(found, Drop):
                dropped[found] += 1
            else:
                chosen += [one for one in found if one.id.removeprefix(_PREFIX) == name]
    marked = [replace(row, id=_PREFIX + row.id.removeprefix(_PREFIX)) for row in chosen]
    return sorted(marked, key=lambda row: (row.seq, row.id))


def _known(
    database: Database, candidates: Candidates, earlier: Sequence[Snapshot], dropped: Counter[Drop]
) -> dict[str, int]:
    """Sequence numbers of the traces, by the example's name."""
    known: dict[str, int] = {}
    for snapshot in earlier:
        if snapshot.is_erased:
            continue
        if snapshot.identity != candidates.renderer.identity:
            dropped[Drop.OTHER_TEMPLATE] += snapshot.manifest.files["train"]["num_rows"]
            continue
        deleted = set(snapshot.check_deleted(database))
        for row in itertools.chain(snapshot.replay(), snapshot.train()):
            if row.trace_id in deleted:
                dropped[Drop.DELETED] += 1
            else:
                known[row.id.removeprefix(_PREFIX)] = row.seq
    return known


def _rows_of(earlier: Sequence[Snapshot], names: Iterator[str]) -> Mapping[str, ExampleRow]:
    """As the newest of the snapshots has them."""
    wanted = set(names)
    found: dict[str, ExampleRow] = {}
    for snapshot in earlier if wanted else ():
        if not snapshot.is_erased:
            for row in itertools.chain(snapshot.replay(), snapshot.train()):
                if (name := row.id.removeprefix(_PREFIX)) in wanted:
                    found[name] = row
    return found


def _draw(name: str) -> bytes:
    return hashlib.blake2b(name.encode(), digest_size=16, person=b"replay").digest()
