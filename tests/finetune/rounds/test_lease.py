"""Leases: one holder at a time, taken over when it is gone or silent, and no write of one who lost it."""

import subprocess
import sys

import pytest

from finetune.rounds import lease as leases
from finetune.rounds.errors import LeaseHeldError, LeaseLostError
from finetune.rounds.lease import Held, Lease, beat, describe, held, is_gone, release, take, this_process, try_take
from finetune.rounds.store import RoundStore
from server.storage.database import Database
from tests.patience import until

ALIVE = "elsewhere boot pid:[1] 7 100 abcd"


def test_the_second_waits_until_the_first_is_done(database: Database) -> None:
    first = try_take(database, "tools", ALIVE)
    assert isinstance(first, Lease)
    with pytest.raises(LeaseHeldError, match="process 7 on elsewhere works on tools"):
        take(database, "tools", is_waiting=False)
    heard: list[str] = []

    def sleep(seconds: float) -> None:
        release(database, first)

    second = take(database, "tools", on_wait=heard.append, sleep=sleep)
    assert heard == ["process 7 on elsewhere"]
    assert second.token == first.token + 1
    assert isinstance(try_take(database, "other", "somebody"), Lease), "another adapter is another lease"


def test_who_falls_silent_is_taken_over_and_writes_nothing_more(database: Database) -> None:
    first = try_take(database, "tools", ALIVE)
    assert isinstance(first, Lease)
    now = 0.0
    num_beats = 0

    def sleep(seconds: float) -> None:
        nonlocal now, num_beats
        now += seconds
        if num_beats < 40:  # it lives for a while: longer than the patience, and is waited for
            beat(database, first)
            num_beats += 1

    second = take(database, "tools", sleep=sleep, clock=lambda: now)
    assert now == pytest.approx(40 + leases.LEASE_SECONDS, abs=2)
    with pytest.raises(LeaseLostError):
        beat(database, first)
    with pytest.raises(LeaseLostError):
        first.check()
    with pytest.raises(LeaseLostError):
        RoundStore(database).begin(first, cause="test", base_digest="sha256:0", settings={})
    release(database, first)  # not its to give back
    assert isinstance(try_take(database, "tools", "third"), Held)
    beat(database, second)


def test_a_process_that_is_gone_is_not_waited_for(database: Database) -> None:
    code = "from finetune.rounds.lease import this_process; print(this_process())"
    gone = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    assert is_gone(gone)
    assert not is_gone(this_process())
    assert not is_gone(ALIVE), "another machine's processes are not ours to judge"
    assert isinstance(try_take(database, "tools", gone), Lease)
    assert isinstance(try_take(database, "tools", this_process()), Lease)
    assert describe("whatever") == "whatever"


def test_a_held_lease_beats_and_is_given_back(database: Database) -> None:
    def has_beaten() -> bool:
        found = try_take(database, "tools", "other")
        assert isinstance(found, Held)
        return found.beat > 0

    with held(database, "tools", beat_seconds=0.001) as mine:
        until(has_beaten, "a lease that is held beats")
        mine.check()
    assert isinstance(try_take(database, "tools", "other"), Lease)
