"""Watches canaries and live versions with a hold-back: collects their episodes, and does what the watch says.

A look reads the registry, takes the episodes that have ended since, stores the watch, and only then acts: promote a
canary that has shown no harm, reject one that did harm, roll back a live version that does. What was decided and not
done when a kill came is done at the next look, because the registry does not say it yet. When somebody changes a
share, the draw is another one: the watch goes on with the episodes that begin afterwards. Not here: the tests
(finetune/watch), and which tools an episode had (episodes.py).
"""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import ColumnElement, select, update

from finetune.rounds.episodes import Arms, ended_episodes, newest_trace
from finetune.rounds.gating import decision_of
from finetune.rounds.lease import Lease, check_lease
from finetune.rounds.promotion import agree, reject
from finetune.rounds.store import RoundStore
from finetune.rounds.tables import watches
from finetune.serving.api import ServerApi
from finetune.watch.settings import WatchSettings, settings_after
from finetune.watch.watch import Evidence, Phase, Verdict, Watch
from server.adapters.version import VersionRef
from server.storage.clock import Clock, utc_now
from server.storage.database import Database

logger = logging.getLogger(__name__)

LOCK = "finetune_watches"


@dataclass(frozen=True, slots=True)
class Era:
    """Episodes that begin after trace `since_seq` are drawn with these arms."""

    arms: Arms
    since_seq: int


@dataclass(frozen=True, slots=True)
class Watched:
    """For metrics and reports."""

    version: str
    phase: str
    num_episodes: tuple[int, int]
    """Old, new."""
    e_value: float
    evidence: tuple[Evidence, ...]


class Watcher:
    """Of one adapter, under its lease `watch <adapter>`. Synchronous."""

    def __init__(
        self,
        database: Database,
        api: ServerApi,
        *,
        hold_back_share: float,
        idle: timedelta,
        clock: Clock = utc_now,
        on_look: Callable[[Watched], None] = lambda watched: None,
    ) -> None:
        self._database = database
        self._api = api
        self._rounds = RoundStore(database, clock=clock)
        self._hold_back_share = hold_back_share
        self._idle = idle
        self._clock = clock
        self._on_look = on_look

    def look(self, lease: Lease, name: str) -> None:
        """Raises LeaseLostError, RefusedError, ServerDownError."""
        adapter = self._api.adapter(name)
        roles = {one: adapter[role] for role in ("canary", "live") if (one := adapter[role]) is not None}
        watched = [ref for text in roles if (ref := VersionRef.parse(text)) and self._arms(adapter, ref) is not None]
        for ref in watched:
            self._look_at(lease, adapter, ref)
        self._end_others(lease, name, {ref.number for ref in watched})

    def _look_at(self, lease: Lease, adapter: dict[str, Any], ref: VersionRef) -> None:
        arms = self._arms(adapter, ref)
        assert arms is not None
        watch, era = self._restore(ref, is_live=adapter["live"] == str(ref))
        if era is None or era.arms != arms:
            era = Era(arms, newest_trace(self._database))
        after = max(era.since_seq, watch.position)
        now = self._clock()
        for episode in ended_episodes(self._database, arms, after_seq=after, idle=self._idle, now=now):
            if watch.take(episode) is not Verdict.GO_ON:
                break
        self._store(lease, ref, watch, era)
        self._on_look(
            Watched(
                str(ref),
                str(watch.phase),
                (watch.num_episodes[0], watch.num_episodes[1]),
                watch.e_value,
                tuple(watch.evidence()),
            )
        )
        self._act(lease, ref, watch)

    def _arms(self, adapter: dict[str, Any], ref: VersionRef) -> Arms | None:
        """None: there is nothing to compare it with. The draws of canary and hold-back are independent."""
        held = adapter["hold_back_share"] if adapter["live"] is not None else 0.0
        if adapter["canary"] == str(ref):
            share = adapter["canary_share"]
            rest = (1 - share) * (1 - held)
            arms = Arms(ref.adapter, str(ref), adapter["live"], share / (share + rest) if share else 0.0)
        else:
            arms = Arms(ref.adapter, str(ref), adapter["previous"], 1 - held)
        return arms if 0 < arms.share_new < 1 else None

    def _restore(self, ref: VersionRef, *, is_live: bool) -> tuple[Watch, Era | None]:
        this = (watches.c.adapter == ref.adapter) & (watches.c.version == ref.number)
        with self._database.read() as connection:
            row = connection.execute(select(watches).where(this)).one_or_none()
        if row is None or row.is_over:  # over, and back: by a human, who knows better than the old evidence
            return Watch(str(ref), self._settings(ref), phase=Phase.LIVE if is_live else Phase.CANARY), None
        watch = Watch.from_json(json.dumps(row.state["watch"]))
        if is_live and watch.phase is Phase.CANARY:  # a human was faster
            watch.phase = Phase.LIVE
        era = row.state["era"]
        return watch, Era(Arms(**era["arms"]), era["since_seq"])

    def _settings(self, ref: VersionRef) -> WatchSettings:
        round = self._rounds.of_version(*ref)
        if round is None or round.decision is None:
            return WatchSettings()
        decision = decision_of(round)
        return settings_after(decision) if decision.is_tested else WatchSettings()

    def _store(self, lease: Lease, ref: VersionRef, watch: Watch, era: Era) -> None:
        arms = era.arms
        told = {"adapter": arms.adapter, "new": arms.new, "old": arms.old, "share_new": arms.share_new}
        state = {"watch": json.loads(watch.to_json()), "era": {"arms": told, "since_seq": era.since_seq}}
        values = {"state": state, "is_over": False, "updated_at": self._clock()}
        with self._database.write(lock=LOCK) as connection:
            check_lease(connection, lease)
            row = self._database.insert(watches).values(adapter=ref.adapter, version=ref.number, **values)
            connection.execute(row.on_conflict_do_update(index_elements=["adapter", "version"], set_=values))

    def _end_others(self, lease: Lease, name: str, numbers: set[int]) -> None:
        self._end(lease, (watches.c.adapter == name) & ~watches.c.version.in_(numbers) & watches.c.is_over.is_(False))

    def _end(self, lease: Lease, which: ColumnElement[bool]) -> None:
        with self._database.write(lock=LOCK) as connection:
            check_lease(connection, lease)
            connection.execute(update(watches).where(which).values(is_over=True))

    def _act(self, lease: Lease, ref: VersionRef, watch: Watch) -> None:
        """What the watch's phase says and the registry does not say yet. Once taken back it is over: who brings the
        version back before the next look has overruled this evidence."""
        match watch.phase:
            case Phase.LIVE:
                agree(lambda: self._promote(ref, watch))
            case Phase.ENDED:
                agree(lambda: self._take_back(ref, watch))
                self._end(lease, (watches.c.adapter == ref.adapter) & (watches.c.version == ref.number))

    def _promote(self, ref: VersionRef, watch: Watch) -> None:
        adapter = self._api.adapter(ref.adapter)
        if adapter["canary"] != str(ref):
            return
        reason = f"no harm in {watch.num_episodes[1]} episodes as canary, beside {watch.num_episodes[0]} of the rest"
        logger.info("%s goes live: %s", ref, reason)
        self._api.promote(ref, hold_back_share=self._hold_back_share, reason=reason, expected_change=adapter["change"])

    def _take_back(self, ref: VersionRef, watch: Watch) -> None:
        reason = f"harm, e-value {watch.e_value:.3g}: {worst_of(watch.evidence())}"
        adapter = self._api.adapter(ref.adapter)
        if adapter["live"] == str(ref):
            logger.warning("%s is rolled back: %s", ref, reason)
            self._api.roll_back(ref.adapter, reason=reason, expected_change=adapter["change"])
        elif adapter["canary"] == str(ref):
            logger.warning("%s is rejected: %s", ref, reason)
            reject(self._api, ref, reason)


def worst_of(evidence: list[Evidence]) -> str:
    """The test of harm that says most."""
    harm = [one for one in evidence if "excluded" not in one.what]
    worst = max(harm, key=lambda one: one.e_value / one.needed)
    means = [("?" if mean is None else f"{mean:.3g}") for mean in (worst.old_mean, worst.new_mean)]
    return f"{worst.metric.replace('_', ' ')} {worst.what} from {means[0]} to {means[1]}"


def stored_watches(database: Database, adapter: str) -> list[dict[str, Any]]:
    """For reports: state, version and whether it is over, the newest version first."""
    query = select(watches).where(watches.c.adapter == adapter).order_by(watches.c.version.desc())
    with database.read() as connection:
        return [
            {
                "version": f"{adapter}@{row.version}",
                "is_over": row.is_over,
                "phase": row.state["watch"]["phase"],
                "num_episodes": row.state["watch"]["num_episodes"],
            }
            for row in connection.execute(query)
        ]
