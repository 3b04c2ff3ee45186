"""Finds the episode that a request belongs to, when it arrives and before it is answered.

1. X-Sterna-Episode: the client's own name for it (per key), or an id that we returned.
2. The calls that the request shows (see digests.py): each is of one episode alone, and several episodes are joined (the
   writer merges).
3. The latest turn after these. Agents with the very same past share it: then an episode that nobody continued yet is
   taken, and the only one that there is also when it was continued. What cannot be told apart begins a new episode.
4. A *hint*, when neither is known and all hints point to one episode.
5. Otherwise it is a new episode. A shared system prompt or first message alone never joins.

What this process answered lately is kept in memory: calls that are known here need no query, and a follow-up finds its
trace although it is not committed yet (relaxed durability). Turns are asked of the database too, for other servers
answer equal ones. Used on the event loop only; queries run on a thread.
"""

import hashlib
import re
import uuid
from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

from sqlalchemy import bindparam, exists, select

from server.storage.database import Database
from server.storage.errors import DatabaseUnavailableError
from server.storage.patience import Patience
from server.traces.digests import Anchor, Conversation, anchors_of_turn
from server.traces.record import EpisodeRef, Purpose, TraceRecord
from server.traces.tables import episode_anchors, episodes, traces

EPISODE_HEADER = "X-Sterna-Episode"

MAX_ANCHORS = 256
"""The latest of a request's anchors that are looked up: about a hundred turns."""
MEMORY_ANCHORS = 32_768
"""About 12 MB."""
MAX_TWINS = 64
"""Episodes with the very same past of which a request takes one: the newest, for there is no telling how many."""

_OWN_ID = re.compile(r"ep-[0-9a-f]{32}")
Twins = dict[str, bool]
"""The episodes in which one anchor was answered, and whether somebody continued from there."""

# Built once: building a statement takes longer than running it.
_root, _later = episodes.alias(), traces.alias()
_anchored = episode_anchors.join(traces).join(episodes)
_CALLS = (
    select(episode_anchors.c.digest, episodes.c.id)
    .select_from(_anchored)
    .where(episode_anchors.c.digest.in_(bindparam("digests", expanding=True)))
)
_TWINS = (
    select(episodes.c.id, exists().where(_later.c.episode_seq == traces.c.episode_seq, _later.c.seq > traces.c.seq))
    .select_from(_anchored)
    .where(episode_anchors.c.digest == bindparam("digest"))
    .order_by(episode_anchors.c.trace_seq.desc())
    .limit(MAX_TWINS)
)
_MERGED = (
    select(episodes.c.id, _root.c.id)
    .join(_root, _root.c.seq == episodes.c.merged_into)
    .where(episodes.c.id.in_(bindparam("ids", expanding=True)))
)
_HINTED = (  # at most two: more do not matter
    select(episodes.c.id)
    .distinct()
    .select_from(_anchored)
    .where(episode_anchors.c.digest.in_(bindparam("digests", expanding=True)))
    .limit(2)
)


@dataclass(slots=True)
class Known:
    """What is known of a request's anchors: of its calls, and of the latest turn after them that was found."""

    twins: dict[bytes, Twins]
    merged: dict[str, str] = field(default_factory=dict)
    """What became of episodes that the memory names."""
    is_complete: bool = False
    """No other episode has the turn."""


class Episodes:
    def __init__(self, database: Database) -> None:
        self._database = database
        self._patience = Patience()
        self._memory: OrderedDict[bytes, Twins] = OrderedDict()

    async def resolve(
        self, key_id: str, conversation: Conversation, *, name: str | None = None, purpose: Purpose = "user"
    ) -> EpisodeRef:
        """`name`: the value of X-Sterna-Episode. Never fails: without the database the episode is a new one."""
        if purpose != "user":
            return _ref(named_id(purpose + key_id, name) if name else _new_id(), conversation, is_stitched=False)
        found = await self._find(conversation.anchors[-MAX_ANCHORS:])
        if name:
            if not (_OWN_ID.fullmatch(name) and await self._is_own(key_id, name)):
                return _ref(named_id(key_id, name), conversation, name=name, others=found)
            # Named by an id of ours: it is that episode, and what else the request shows is put on its side.
            return _ref(name, conversation, name=name, others=[other for other in found if other != name])
        if not found:
            return _ref(_new_id(), conversation)
        return _ref(found[0], conversation, others=found[1:])

    def remember(self, record: TraceRecord) -> None:
        """From now on the record's answers are recognized."""
        if not record.episode.is_stitched:
            return
        for anchor in answer_anchors(record):
            self._note(anchor.digest, record.episode.id, is_continued=False)

    def _note(self, digest: bytes, episode: str, *, is_continued: bool) -> None:
        twins = self._memory.setdefault(digest, {})
        twins[episode] = is_continued
        self._memory.move_to_end(digest)
        if len(twins) > MAX_TWINS:
            del twins[next(iter(twins))]
        while len(self._memory) > MEMORY_ANCHORS:
            self._memory.popitem(last=False)

    async def _find(self, anchors: Sequence[Anchor]) -> list[str]:
        """The request's episodes, the one of its latest turn first."""
        if all(anchor.kind == "hint" for anchor in anchors):
            return []
        known = Known({one.digest: dict(self._memory[one.digest]) for one in anchors if one.digest in self._memory})
        try:
            if not _is_enough(anchors, known):
                known = await self._patience.ask(partial(self._query, anchors, known))
                self._refresh(anchors, known)
            found, turn = choose(anchors, known)
            if not found and turn is None:
                return await self._hinted([anchor.digest for anchor in anchors if anchor.kind == "hint"])
        except DatabaseUnavailableError:  # the log itself reports the fault
            found, turn = choose(anchors, known)
        turn = turn or next((anchor.digest for anchor in reversed(anchors) if anchor.kind == "turn"), None)
        if turn is not None and found and found[0] in known.twins.get(turn, ()):
            self._note(turn, found[0], is_continued=True)  # the next request with the same past takes another one
        return found

    def _refresh(self, anchors: Sequence[Anchor], known: Known) -> None:
        """What the memory learned while the database was asked, and the other way round."""
        for anchor in anchors:
            for episode, is_continued in self._memory.get(anchor.digest, {}).items():
                root, twins = known.merged.get(episode, episode), known.twins.setdefault(anchor.digest, {})
                twins[root] = twins.get(root, False) or is_continued
            if anchor.kind == "call" and anchor.digest not in self._memory:
                for episode in known.twins.get(anchor.digest, ()):
                    self._note(anchor.digest, episode, is_continued=False)

    def _query(self, anchors: Sequence[Anchor], own: Known) -> Known:
        calls = [anchor.digest for anchor in anchors if anchor.kind == "call"]
        remembered = {episode for twins in own.twins.values() for episode in twins}
        found, is_complete = {}, True
        with self._database.read() as connection:
            for digest, episode in connection.execute(_CALLS, {"digests": calls}) if calls else ():
                found[digest] = {episode: False}
            for turn in _later_turns(anchors, found.keys() | own.twins.keys()):
                rows = connection.execute(_TWINS, {"digest": turn}).all()
                if rows or turn in own.twins:
                    found[turn] = {row[0]: row[1] for row in reversed(rows)}
                    is_complete = len(rows) < MAX_TWINS
                    break
            merged = connection.execute(_MERGED, {"ids": list(remembered)}).all() if remembered else []
        return Known(found, {row[0]: row[1] for row in merged}, is_complete)

    async def _hinted(self, hints: Sequence[bytes]) -> list[str]:
        found = {episode for digest in hints for episode in self._memory.get(digest, ())}
        if hints and len(found) < 2:
            found |= await self._patience.ask(partial(self._query_hints, hints))
        return list(found) if len(found) == 1 else []

    def _query_hints(self, digests: Sequence[bytes]) -> set[str]:
        with self._database.read() as connection:
            return set(connection.scalars(_HINTED, {"digests": digests}))

    async def _is_own(self, key_id: str, episode: str) -> bool:
        query = select(episodes.c.seq).where(episodes.c.id == episode, episodes.c.key_id == key_id)

        def ask() -> bool:
            with self._database.read() as connection:
                return connection.scalar(query) is not None

        try:
            return await self._patience.ask(ask)
        except DatabaseUnavailableError:
            return False


def choose(anchors: Sequence[Anchor], known: Known) -> tuple[list[str], bytes | None]:
    """The episodes that the request continues, and the turn by which (None: by its calls, or none)."""
    calls = {anchor.digest for anchor in anchors if anchor.kind == "call" and anchor.digest in known.twins}
    in_order = [anchor.digest for anchor in reversed(anchors) if anchor.digest in calls]
    found = list(dict.fromkeys(episode for digest in in_order for episode in known.twins[digest]))
    turn = next((digest for digest in _later_turns(anchors, calls) if known.twins.get(digest)), None)
    twins = known.twins[turn] if turn is not None else {}
    if not any(episode in found for episode in twins):
        fresh = [episode for episode, is_continued in twins.items() if not is_continued]  # the newest last
        if len(twins) == 1 and known.is_complete:
            found = [*twins, *found]
        elif not found:
            found = fresh[-1:]
    return found, turn


def _is_enough(anchors: Sequence[Anchor], known: Known) -> bool:
    """Every call is known, and a turn after them is of an episode of theirs."""
    calls = {anchor.digest for anchor in anchors if anchor.kind == "call"}
    if not calls or not calls <= known.twins.keys():
        return False
    later = _later_turns(anchors, calls)[:1]
    return all(known.twins.get(turn, {}).keys() & set(choose(anchors, known)[0]) for turn in later)


def _later_turns(anchors: Sequence[Anchor], calls: Collection[bytes]) -> list[bytes]:
    """The turns after the last of these calls, the latest first. Whoever made that call was shown what came before."""
    turns = []
    for anchor in reversed(anchors):
        if anchor.kind == "call" and anchor.digest in calls:
            break
        if anchor.kind == "turn":
            turns.append(anchor.digest)
    return turns


def answer_anchors(record: TraceRecord) -> Iterable[Anchor]:
    """By which later requests recognize this trace's answers. A cut-off answer counts: clients keep what they got."""
    for answer in record.answers if record.endpoint == "chat" else ():
        yield from anchors_of_turn(record.key_id, answer.message, record.episode.context)


def _ref(
    episode: str,
    conversation: Conversation,
    *,
    name: str | None = None,
    others: Iterable[str] = (),
    is_stitched: bool = True,
) -> EpisodeRef:
    return EpisodeRef(
        id=episode,
        group=conversation.group,
        context=conversation.context,
        name=name,
        others=tuple(others),
        tool_results=conversation.tool_results,
        is_stitched=is_stitched,
    )


def _new_id() -> str:
    return "ep-" + uuid.uuid4().hex


def named_id(key_id: str, name: str) -> str:
    """A client's name leads to the same id on every server, and never into another key's episodes."""
    text = f"{key_id}\n{name}".encode("utf-8", "surrogatepass")
    return "ep-" + hashlib.blake2b(text, digest_size=16, person=b"episode").hexdigest()
