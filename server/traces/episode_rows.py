"""The writer's half of episodes: their rows, their sides and their merging, inside the writer's transaction.

Writers take turns (Database.write(lock="traces")), so nothing changes between what is read here and what is written.
A merged episode keeps its row, which points at the one it went into, so that its id stays good; its traces and feedback
move. When the two were on different sides, both end up held out: what was seen on that side must not be trained on.
"""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, bindparam, exists, func, insert, or_, select, update

from server.traces.record import TraceRecord
from server.traces.sides import SideDraw
from server.traces.tables import MAX_NAME_LENGTH, episodes, feedback, traces
from server.traces.text import short

# Statements of every commit are built once: building one takes longer than running it.
_ROOT = func.coalesce(episodes.c.merged_into, episodes.c.seq)
_ROOTS = select(episodes.c.id, _ROOT, exists().where(feedback.c.episode_seq == _ROOT)).where(
    episodes.c.id.in_(bindparam("ids", expanding=True))
)
_first = episodes.alias("first")
_SIDE_OF_GROUP = (  # of the first of what may be a hundred thousand episodes: one look into the index
    select(_first.c.side)
    .where(_first.c.group_digest == bindparam("wanted_group"))
    .order_by(_first.c.seq)
    .limit(1)
    .scalar_subquery()
)
_INSERT = (
    insert(episodes)
    .values(side=func.coalesce(_SIDE_OF_GROUP, bindparam("drawn")))
    .returning(episodes.c.id, episodes.c.seq)
)


def ensure_episodes(
    connection: Connection, records: Sequence[TraceRecord], draw: SideDraw
) -> tuple[dict[str, int], set[int]]:
    """The row number behind each episode id that the records name, and which of these episodes have feedback.

    Makes the missing, merges what belongs together.
    """
    wanted = {name for record in records for name in (record.episode.id, *record.episode.others)}
    known = connection.execute(_ROOTS, {"ids": list(wanted)}).all()
    roots = {row[0]: row[1] for row in known}
    judged = {row[1] for row in known if row[2]}
    fresh = {record.episode.id: record for record in reversed(records) if record.episode.id not in roots}
    if fresh:
        roots |= _insert(connection, list(reversed(fresh.values())), draw)
    for record in records:
        ref = record.episode
        for other in ref.others:
            if other not in roots or roots[other] == roots[ref.id]:
                continue
            if ref.name is not None:
                _align(connection, {roots[ref.id], roots[other]})
            else:
                kept, gone = sorted((roots[ref.id], roots[other]))
                _merge(connection, kept, gone)
                roots = {name: kept if seq == gone else seq for name, seq in roots.items()}
                if judged & {kept, gone}:
                    judged.add(kept)
                    connection.execute(update(traces).where(traces.c.episode_seq == kept).values(has_feedback=True))
    return roots, judged


def _insert(connection: Connection, firsts: Sequence[TraceRecord], draw: SideDraw) -> dict[str, int]:
    """`firsts`: the first trace of each new episode. Its side is that of its group's first one, else it is drawn."""
    groups = [draw.group_digest(record.episode.group) for record in firsts]
    rows: list[dict[str, Any]] = [
        {
            "id": record.episode.id,
            "key_id": record.key_id,
            "name": short(record.episode.name, MAX_NAME_LENGTH),
            "drawn": draw.draw(record.episode.group),
            "group_digest": group,
            "wanted_group": group,
            "created_at": record.created_at,
        }
        for record, group in zip(firsts, groups, strict=True)
    ]
    returned = connection.execute(_INSERT, rows)
    return {row[0]: row[1] for row in returned}


def _merge(connection: Connection, kept: int, gone: int) -> None:
    _align(connection, {kept, gone})
    for table in (traces, feedback):
        connection.execute(update(table).where(table.c.episode_seq == gone).values(episode_seq=kept))
    both = or_(episodes.c.seq == gone, episodes.c.merged_into == gone)
    connection.execute(update(episodes).where(both).values(merged_into=kept))


def _align(connection: Connection, roots: set[int]) -> None:
    """Different sides: held out, all of them."""
    sides = set(connection.scalars(select(episodes.c.side).where(episodes.c.seq.in_(roots))))
    if len(sides) > 1:
        everywhere = or_(episodes.c.seq.in_(roots), episodes.c.merged_into.in_(roots))
        connection.execute(update(episodes).where(everywhere).values(side="held_out"))
