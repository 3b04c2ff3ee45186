"""The writer's half of episodes: their rows, their sides and their merging, inside the writer's transaction.

Writers take turns (Database.write(lock="traces")), so nothing changes between what is read here and what is written.
A merged episode keeps its row, which points at the one it went into, so that its id stays good; its traces and feedback
move. When the two were on different sides, both end up held out: what was seen on that side must not be trained on.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import Connection, bindparam, func, insert, or_, select, update

from server.traces.record import Side, TraceRecord
from server.traces.sides import SideDraw
from server.traces.tables import MAX_NAME_LENGTH, episodes, feedback, traces
from server.traces.text import short

# Statements of every commit are built once: building one takes longer than running it.
_ROOTS = select(episodes.c.id, func.coalesce(episodes.c.merged_into, episodes.c.seq)).where(
    episodes.c.id.in_(bindparam("ids", expanding=True))
)
_FIRST_OF_GROUP = (
    select(func.min(episodes.c.seq))
    .where(episodes.c.group_digest.in_(bindparam("groups", expanding=True)))
    .group_by(episodes.c.group_digest)
)
_KNOWN_SIDES = select(episodes.c.group_digest, episodes.c.side).where(episodes.c.seq.in_(_FIRST_OF_GROUP))
_INSERT = insert(episodes).returning(episodes.c.id, episodes.c.seq)


def ensure_episodes(connection: Connection, records: Sequence[TraceRecord], draw: SideDraw) -> dict[str, int]:
    """The row number behind each episode id that the records name; makes the missing, merges what belongs together."""
    wanted = {name for record in records for name in (record.episode.id, *record.episode.others)}
    roots = _roots(connection, wanted)
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
    return roots


def _roots(connection: Connection, ids: Iterable[str]) -> dict[str, int]:
    return {row[0]: row[1] for row in connection.execute(_ROOTS, {"ids": list(ids)})}


def _insert(connection: Connection, firsts: Sequence[TraceRecord], draw: SideDraw) -> dict[str, int]:
    """`firsts`: the first trace of each new episode."""
    groups = {record.episode.group: draw.group_digest(record.episode.group) for record in firsts}
    sides = _known_sides(connection, groups.values())
    rows: list[dict[str, Any]] = [
        {
            "id": record.episode.id,
            "key_id": record.key_id,
            "name": short(record.episode.name, MAX_NAME_LENGTH),
            "side": sides.get(groups[record.episode.group]) or draw.draw(record.episode.group),
            "group_digest": groups[record.episode.group],
            "created_at": record.created_at,
        }
        for record in firsts
    ]
    returned = connection.execute(_INSERT, rows)
    return {row[0]: row[1] for row in returned}


def _known_sides(connection: Connection, groups: Iterable[bytes]) -> dict[bytes, Side]:
    """The side of the first episode of each group that has one."""
    return {bytes(group): side for group, side in connection.execute(_KNOWN_SIDES, {"groups": list(groups)})}


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
