"""The watch over a log: episodes of canaries and live versions, and what it does with what it finds."""

import random
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from finetune.rounds.episodes import Arms, ended_episodes
from finetune.rounds.errors import LeaseLostError
from finetune.rounds.lease import Lease, take, try_take
from finetune.rounds.watching import Watched, Watcher, stored_watches
from server.adapters.states import State
from server.adapters.version import NewVersion, VersionRef
from server.storage.database import Database
from server.traces.deletion import TraceDeletion
from server.traces.feedback import Feedback, FeedbackStore, Target
from server.traces.filters import TraceFilter
from server.traces.record import Answer, TraceRecord
from server.traces.store import TraceStore
from server.traces.viewer import ADMIN
from tests.finetune.fake_server import FakeServer
from tests.server.traces.builders import START, assistant, call, make_record, result, tool, user

IDLE = timedelta(minutes=10)
NEW, OLD = VersionRef("tools", 2), VersionRef("tools", 1)


class Bench:
    """A live version, a canary beside it, and traffic."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.server = FakeServer(database)
        self.registry = self.server.registry
        self.store = TraceStore(database)
        self.now = START + timedelta(hours=1)
        self.looks: list[Watched] = []
        self.watcher = Watcher(
            database,
            self.server.api(),
            hold_back_share=0.1,
            idle=IDLE,
            clock=lambda: self.now,
            on_look=self.looks.append,
        )
        self.lease = take(database, "watch tools")
        self.dice = random.Random(7)
        for number in (1, 2):
            directory = f"tools/{number}"
            self.registry.begin_import(directory)
            new = NewVersion("tools", f"sha256:{number}", "sha256:0", 4, 1, 1, "test", None, directory)
            self.registry.add_version(new, asked_by="test", reason="test")
        self.registry.promote(OLD, override=True, asked_by="test", reason="test")
        self.registry.start_canary(NEW, share=0.5, asked_by="test", reason="test")

    def look(self) -> Watched:
        self.watcher.look(self.lease, "tools")
        return self.looks[-1]

    def record(self, version: VersionRef | None, *, is_broken: bool = False, **changes: Any) -> TraceRecord:
        arguments = "{" if is_broken else "{}"
        options: dict[str, Any] = {
            "requested_model": "tools",
            "adapter": "tools",
            "version": None if version is None else str(version),
            "tools": [tool("add")],
            "answers": (Answer(assistant(None, call("add", arguments)), "tool_calls"),),
            "duration_seconds": 0.5,
        }
        return make_record([user(f"add {self.dice.random()}")], **(options | changes))

    def traffic(
        self, num: int, *, share: float = 0.5, is_new_broken: bool = False, pair: tuple[Any, Any] = (NEW, OLD)
    ) -> None:
        records = []
        for _ in range(num):
            is_new = self.dice.random() < share
            records.append(self.record(pair[0] if is_new else pair[1], is_broken=is_new and is_new_broken))
        self.store.write(records)

    def state(self, ref: VersionRef = NEW) -> State:
        return self.registry.version(ref).state


@pytest.fixture
def bench(database: Database) -> Bench:
    made = Bench(database)
    made.look()
    return made


def test_a_canary_that_does_harm_is_rejected(bench: Bench) -> None:
    bench.traffic(60, is_new_broken=True)
    found = bench.look()
    assert found.e_value > 100
    assert bench.state() is State.REJECTED
    assert bench.state(OLD) is State.LIVE
    assert "malformed rise from 0 to 1" in bench.registry.history("tools")[0].reason
    bench.watcher.look(bench.lease, "tools")
    assert stored_watches(bench.database, "tools")[0]["is_over"]


def test_a_canary_that_does_none_goes_live_and_is_watched_on(bench: Bench) -> None:
    bench.traffic(700)
    found = bench.look()
    assert sum(found.num_episodes) > 100
    assert bench.state() is State.LIVE
    adapter = bench.registry.adapter("tools")
    assert adapter.hold_back_share == 0.1
    assert adapter.previous is not None
    assert adapter.previous.ref == OLD
    assert "no harm in" in bench.registry.history("tools")[0].reason
    assert bench.look().phase == "live"
    bench.traffic(200, share=0.9, is_new_broken=True)
    bench.look()
    assert bench.state() is State.RETIRED
    assert bench.state(OLD) is State.LIVE
    assert bench.registry.history("tools")[0].reason.startswith("harm, e-value ")


def test_what_was_decided_before_a_kill_is_done_after_it(bench: Bench) -> None:
    bench.traffic(60, is_new_broken=True)
    reject, bench.watcher._act = bench.watcher._act, lambda lease, ref, watch: None  # type: ignore[method-assign]
    bench.look()
    assert bench.state() is State.CANARY, "killed between the decision and the act"
    bench.watcher._act = reject  # type: ignore[method-assign]
    bench.look()
    assert bench.state() is State.REJECTED


@pytest.mark.parametrize("has_looked", [True, False])
def test_a_human_knows_better(bench: Bench, has_looked: bool) -> None:
    """Taken back, then promoted by a named human: the old evidence does not take it back again, and not before
    anybody has looked either."""
    bench.registry.promote(NEW, hold_back_share=0.1, asked_by="a human", reason="now")
    assert bench.look().phase == "live"
    bench.traffic(300, share=0.9, is_new_broken=True)
    bench.look()
    assert bench.state() is State.RETIRED
    if has_looked:
        bench.watcher.look(bench.lease, "tools")
    bench.registry.rollback("tools", to=2, asked_by="a human", reason="we want it")
    bench.registry.set_share("tools", State.LIVE, 0.1, asked_by="a human", reason="compare")
    bench.look()
    assert bench.state() is State.LIVE


def test_another_share_is_another_draw(bench: Bench) -> None:
    bench.traffic(30)
    num_before = sum(bench.look().num_episodes)
    assert num_before == 30
    bench.registry.set_share("tools", State.CANARY, 0.2, asked_by="test", reason="test")
    bench.traffic(10)  # began before anybody knew of the change
    assert sum(bench.look().num_episodes) == num_before
    bench.traffic(10)
    assert sum(bench.look().num_episodes) == num_before + 10


def test_who_lost_the_lease_watches_no_more(bench: Bench) -> None:
    other = try_take(bench.database, "watch tools", bench.lease.holder)
    assert isinstance(other, Lease)
    with pytest.raises(LeaseLostError):
        bench.look()


# -- episodes ---------------------------------------------------------------------------------------------------------


def episodes(bench: Bench, *, after: int = 0, share: float = 0.5) -> list[Any]:
    arms = Arms("tools", str(NEW), str(OLD), share)
    return list(ended_episodes(bench.database, arms, after_seq=after, idle=IDLE, now=bench.now))


def test_what_an_episode_shows(bench: Bench) -> None:
    first = bench.record(NEW, answers=(Answer(assistant(None, call("add", "{}", "c1")), "tool_calls"),))
    history = [user("add"), assistant(None, call("add", "{}", "c1")), result("c1", "Error: no")]
    episode = first.episode
    second = make_record(
        history,
        requested_model="tools",
        adapter="tools",
        version=str(NEW),
        tools=[tool("add")],
        answers=(Answer(assistant(None, call("add", "{}", "c2")), "tool_calls"),),
        duration_seconds=1.5,
        episode=replace(episode, tool_results=(("c1", True),)),
    )
    third = make_record(
        [user("thanks")],
        assistant("you are welcome"),
        requested_model="tools",
        adapter="tools",
        version=str(NEW),
        tools=[tool("add")],
        duration_seconds=1.0,
        episode=episode,
    )
    for record in (first, second, third):
        bench.store.write([record])
    FeedbackStore(bench.database).add(ADMIN, Target("trace", first.id), Feedback(source="thumbs", score=0.25))
    FeedbackStore(bench.database).add(ADMIN, Target("episode", episode.id), Feedback(source="thumbs", score=0.75))
    (found,) = episodes(bench)
    assert found.is_new
    assert found.stratum == "add"
    assert found.call_rate == pytest.approx(2 / 3)
    assert found.tool_errors == pytest.approx(1 / 3)
    assert found.retries == pytest.approx(1 / 3)
    assert found.malformed == 0
    assert found.feedback == pytest.approx(0.5)
    assert found.latency_seconds == pytest.approx(1.0)


def test_which_episodes_count(bench: Bench) -> None:
    bench.store.write(
        [
            bench.record(NEW),
            bench.record(OLD),
            bench.record(NEW, requested_model="tools@2"),
            bench.record(NEW, purpose="evaluation"),
            bench.record(None),
            bench.record(VersionRef("tools", 9)),
            bench.record(OLD, tools=None, answers=(Answer(assistant("hi"), "stop"),)),
        ]
    )
    found = episodes(bench)
    assert [(one.is_new, one.stratum) for one in found] == [(True, "add"), (False, "add"), (False, "no tools")]
    assert found[2].call_rate is None
    assert [one.position for one in episodes(bench, after=found[0].position)] == [one.position for one in found[1:]]


def test_an_episode_that_is_deleted_while_others_are_read(bench: Bench) -> None:
    bench.store.write([bench.record(NEW), bench.record(NEW, user_id="eve"), bench.record(OLD)])
    arms = Arms("tools", str(NEW), str(OLD), 0.5)
    found = ended_episodes(bench.database, arms, after_seq=0, idle=IDLE, now=bench.now)
    assert next(found).is_new
    assert len(TraceDeletion(bench.database).delete(ADMIN, TraceFilter(user_id="eve"))) == 1
    assert [one.is_new for one in found] == [False]


def test_an_open_episode_holds_back_those_after_it(bench: Bench) -> None:
    open_one = bench.record(NEW, created_at=bench.now - IDLE / 2)
    bench.store.write([bench.record(NEW), open_one, bench.record(OLD)])
    assert len(episodes(bench)) == 1
    bench.now += IDLE / 2
    assert len(episodes(bench)) == 3


def test_an_episode_that_never_ends_is_taken_all_the_same(bench: Bench) -> None:
    first = bench.record(NEW, created_at=bench.now - 6 * IDLE)
    last = make_record(
        [user("more")], episode=first.episode, created_at=bench.now, requested_model="tools", adapter="tools"
    )
    bench.store.write([first])
    bench.store.write([last])
    assert len(episodes(bench)) == 1
