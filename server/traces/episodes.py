"""Finds the episode that a request belongs to, when it arrives and before it is answered.

1. X-Sterna-Episode: the client's own name for it (per key), or an id that we returned.
2. A *proof* (see digests.py) that the request continues a trace of the same key. Of several episodes with the very same
   past, one that nobody continued yet is taken. Proofs of different episodes join them (the writer merges).
3. A *hint*, when there is no proof and all hints point to one episode.
4. Otherwise it is a new episode. A shared system prompt or first message alone never joins.

What this process answered lately is kept in memory, so that most requests need no query, and that a follow-up finds its
trace although it is not committed yet (relaxed durability). Used on the event loop only; queries run on a thread.
"""

import hashlib
import re
import uuid
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

from sqlalchemy import exists, select

from server.storage.database import Database
from server.storage.errors import DatabaseUnavailableError
from server.storage.patience import Patience
from server.traces.digests import Anchor, Conversation, anchors_of_turn
from server.traces.record import EpisodeRef, Purpose, TraceRecord
from server.traces.tables import episode_anchors, episodes, traces

EPISODE_HEADER = "X-Sterna-Episode"

MAX_ANCHORS = 256
"""The latest of a request's anchors that are looked up: about a hundred turns, and one query."""
MEMORY_ANCHORS = 32_768
"""About 10 MB."""

_OWN_ID = re.compile(r"ep-[0-9a-f]{32}")
Candidates = Mapping[bytes, Sequence[str]]
"""Episode ids by anchor digest, the best one last."""


class Episodes:
    def __init__(self, database: Database) -> None:
        self._database = database
        self._patience = Patience()
        self._memory: OrderedDict[bytes, list[str]] = OrderedDict()

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
            known = self._memory.setdefault(anchor.digest, [])
            self._memory.move_to_end(anchor.digest)
            if record.episode.id not in known:
                known.append(record.episode.id)
                del known[:-8]  # a phrase said in more episodes than that tells nothing
        while len(self._memory) > MEMORY_ANCHORS:
            self._memory.popitem(last=False)

    async def _find(self, anchors: Sequence[Anchor]) -> list[str]:
        proofs = [anchor.digest for anchor in anchors if anchor.is_proof]
        hints = [anchor.digest for anchor in anchors if not anchor.is_proof]
        if not proofs:
            return []
        found = self._choose_remembered(proofs)
        if found:
            return found
        try:
            found = choose(proofs, await self._patience.ask(partial(self._query_proofs, proofs)))
            if not found and hints:
                hinted = {episode for digest in hints for episode in self._memory.get(digest, ())}
                if len(hinted) < 2:
                    hinted |= await self._patience.ask(partial(self._query_hints, hints))
                found = list(hinted) if len(hinted) == 1 else []
        except DatabaseUnavailableError:
            return []  # the log itself reports the fault
        return found

    def _choose_remembered(self, proofs: Sequence[bytes]) -> list[str]:
        found = choose(proofs, self._memory)
        for digest in proofs:  # the next request with the same past takes another one
            known = self._memory.get(digest, [])
            if len(known) > 1 and known[-1] in found:
                known.insert(0, known.pop())
        return found

    def _query_proofs(self, digests: Sequence[bytes]) -> dict[bytes, list[str]]:
        later = traces.alias()
        is_continued = exists().where(later.c.episode_seq == traces.c.episode_seq, later.c.seq > traces.c.seq)
        query = (
            select(episode_anchors.c.digest, episodes.c.id, is_continued, traces.c.seq)
            .select_from(episode_anchors.join(traces).join(episodes))
            .where(episode_anchors.c.digest.in_(digests))
            .limit(4 * MAX_ANCHORS)
        )
        with self._database.read() as connection:
            rows = connection.execute(query).all()
        candidates: dict[bytes, list[str]] = {}
        for digest, episode, _, _ in sorted(rows, key=lambda row: (not row[2], row[3])):
            candidates.setdefault(digest, []).append(episode)
        return candidates

    def _query_hints(self, digests: Sequence[bytes]) -> set[str]:
        """At most two: more do not matter."""
        query = (
            select(episodes.c.id)
            .distinct()
            .select_from(episode_anchors.join(traces).join(episodes))
            .where(episode_anchors.c.digest.in_(digests))
            .limit(2)
        )
        with self._database.read() as connection:
            return set(connection.scalars(query))

    async def _is_own(self, key_id: str, episode: str) -> bool:
        query = select(episodes.c.seq).where(episodes.c.id == episode, episodes.c.key_id == key_id)

        def ask() -> bool:
            with self._database.read() as connection:
                return connection.scalar(query) is not None

        try:
            return await self._patience.ask(ask)
        except DatabaseUnavailableError:
            return False


def choose(proofs: Sequence[bytes], candidates: Candidates) -> list[str]:
    """The fewest episodes that explain every proof, the one of the latest turn first."""
    chosen: list[str] = []
    for digest in reversed(proofs):
        known = candidates.get(digest)
        if known and not any(episode in chosen for episode in known):
            chosen.append(known[-1])
    return chosen


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
