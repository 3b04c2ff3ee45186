"""The pause between micro-batches: as long as it takes to leave serving its share, and no longer."""

import pytest

from finetune.rounds.errors import StoppedError
from finetune.sidecar.pause import LONGEST_WAIT_SECONDS, Pause


class Machine:
    """Time passes by working and by sleeping; requests come and go at set times."""

    def __init__(self, busy: tuple[float, float] | None, share: float = 0.5) -> None:
        self.now = 0.0
        self.busy = busy
        self.num_looks = 0
        self.paused: list[float] = []
        self.pause = Pause(
            self.num_requests,
            busy_requests=1,
            busy_share=share,
            on_paused=self.paused.append,
            sleep=self.sleep,
            clock=lambda: self.now,
        )

    def num_requests(self) -> int | None:
        self.num_looks += 1
        return None if self.busy is None else int(self.busy[0] <= self.now < self.busy[1])

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def work(self, num: int, seconds: float = 0.4) -> None:
        for _ in range(num):
            self.pause()
            self.now += seconds


def test_nobody_there_is_no_reason_to_wait() -> None:
    for busy in (None, (1e9, 1e9)):
        machine = Machine(busy)
        machine.work(10)
        assert machine.now == pytest.approx(4.0)
        assert machine.paused == []


@pytest.mark.parametrize("share", [0.25, 0.5, 0.8])
def test_while_serving_is_busy_training_has_its_share(share: float) -> None:
    machine = Machine((0, 1e9), share)
    machine.work(101)
    assert 100 * 0.4 / (machine.now - 0.4) == pytest.approx(share, rel=0.01)
    assert sum(machine.paused) == pytest.approx(machine.now - 101 * 0.4)


def test_it_goes_on_as_soon_as_serving_is_idle() -> None:
    machine = Machine((0, 10.5))
    machine.work(2, seconds=10.0)
    assert machine.now == pytest.approx(20.5, abs=0.3)


def test_a_long_micro_batch_does_not_make_a_long_pause() -> None:
    machine = Machine((0, 1e9), 0.1)
    machine.work(2, seconds=100.0)
    assert machine.now == pytest.approx(200 + LONGEST_WAIT_SECONDS)


def test_looks_are_rare() -> None:
    machine = Machine((0, 1e9))
    machine.work(100, seconds=0.01)
    assert machine.num_looks <= machine.now / 0.25 + 2


def test_it_stops_in_the_middle_of_a_pause() -> None:
    machine = Machine((0, 1e9))
    is_over = False

    def check() -> None:
        if is_over:
            raise StoppedError

    def sleep(seconds: float) -> None:
        nonlocal is_over
        machine.now += seconds
        is_over = True

    pause = Pause(
        machine.num_requests, busy_requests=1, busy_share=0.5, check=check, sleep=sleep, clock=lambda: machine.now
    )
    pause()
    machine.now += 5
    with pytest.raises(StoppedError):
        pause()
    assert machine.now < 6
