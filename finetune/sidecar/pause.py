"""Steps back for serving: called between micro-batches, it waits while requests are under way.

While serving is busy, training computes `busy_share` of the time: after a micro-batch of 0.4 s it waits 0.4 s at a
share of one half, less when serving falls idle meanwhile. The number of threads never changes, so that a round's
result does not depend on the load. A server that does not answer needs no room.
"""

import time
from collections.abc import Callable

LOOK_SECONDS = 0.25
"""Between two looks at the load: a scrape costs the server a few milliseconds."""
LONGEST_WAIT_SECONDS = 30.0
"""After a micro-batch that took minutes, training must not stand still for as long."""


class Pause:
    """The training loop's `pause`."""

    def __init__(
        self,
        num_requests: Callable[[], int | None],
        *,
        busy_requests: int,
        busy_share: float,
        check: Callable[[], None] = lambda: None,
        on_paused: Callable[[float], None] = lambda seconds: None,
        sleep: Callable[[float], object] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`num_requests`: running and waiting now. `check` may raise, to cut the training off."""
        self._num_requests = num_requests
        self._busy_requests = busy_requests
        self._idle_for_work = (1 - busy_share) / busy_share
        self._check = check
        self._on_paused = on_paused
        self._sleep = sleep
        self._clock = clock
        self._resumed: float | None = None
        self._looked = -float("inf")
        self._is_busy = False

    def __call__(self) -> None:
        self._check()
        now = self._clock()
        worked = 0.0 if self._resumed is None else now - self._resumed
        until = now + min(worked * self._idle_for_work, LONGEST_WAIT_SECONDS)
        while self._looks_busy() and (left := until - self._clock()) > 0:
            self._sleep(min(left, LOOK_SECONDS))
            self._check()
        self._resumed = self._clock()
        if self._resumed > now:
            self._on_paused(self._resumed - now)

    def _looks_busy(self) -> bool:
        now = self._clock()
        if now - self._looked >= LOOK_SECONDS:
            self._looked = now
            found = self._num_requests()
            self._is_busy = found is not None and found >= self._busy_requests
        return self._is_busy
