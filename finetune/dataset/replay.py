"""Replays examples of earlier snapshots that the new one does not reach any more, so that old skills are not lost.

A trace that is still in the log is judged anew: it may have a correction since, or be held out by now. Of one that went
with the log's size limit, the earlier snapshot's row is what is left of it; of one that was deleted on request or by
age, nothing is used. Which ones are taken is drawn from digests of their ids, so that it is a fair sample of the past.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import replace

from finetune.dataset.candidates import Candidates
from finetune.dataset.filters import Drop
from finetune.dataset.near import NearTexts
from finetune.dataset.rows import ExampleRow
from finetune.dataset.snapshot import Snapshot
from finetune.dataset.source import read_by_seq
from server.storage.database import Database


def replay_rows(
    database: Database,
    candidates: Candidates,
    near: NearTexts,
    earlier: Sequence[Snapshot],
    taken: Set[int],
    dropped: Counter[Drop],
) -> list[ExampleRow]:
    """At most `max_replay`, oldest first. `taken`: sequence numbers of the traces that the new snapshot trains on."""
    known: dict[str, ExampleRow] = {}
    for snapshot in earlier:
        if snapshot.is_erased:
            continue
        if snapshot.identity != candidates.renderer.identity:
            dropped[Drop.OTHER_TEMPLATE] += snapshot.manifest.files["train"]["num_rows"]
            continue
        deleted = set(snapshot.check_deleted(database))
        for row in (*snapshot.replay(), *snapshot.train()):
            if row.trace_id in deleted:
                dropped[Drop.DELETED] += 1
            elif row.seq not in taken:
                known[row.id.removeprefix("replay:")] = row
    current = read_by_seq(database, sorted({row.seq for row in known.values()}))
    seen: set[bytes] = set()
    chosen: list[ExampleRow] = []
    for name in sorted(known, key=_draw):
        row = known[name]
        trace = current.get(row.seq)
        if len(chosen) == candidates.selection.max_replay:
            dropped[Drop.OVER_BUDGET] += 1
        elif trace is None:
            if near.has(row.question):
                dropped[Drop.NEAR_HELD_OUT] += 1
            else:
                chosen.append(row)
        elif trace.side == "held_out":
            dropped[Drop.HELD_OUT_NOW] += 1
        else:
            rows = candidates.examples(trace, near, seen)
            if isinstance(rows, Drop):
                dropped[rows] += 1
            else:
                chosen += [one for one in rows if one.id == name]
    marked = [replace(row, id="replay:" + row.id.removeprefix("replay:")) for row in chosen]
    return sorted(marked, key=lambda row: (row.seq, row.id))


def _draw(name: str) -> bytes:
    return hashlib.blake2b(name.encode(), digest_size=16, person=b"replay").digest()
