"""How long tests wait for another process, thread or server before they call it a bug: one number, and one way to poll.

Not here: anything that asserts how fast something is. Speed is measured in benchmarks/.
"""

import time
from collections.abc import Callable

PATIENCE_SECONDS = 240.0
"""CI runs on a fresh machine of two cores with cold caches and a slow disk: there a child that imports a web server, or
a PostgreSQL that recovers, can take minutes where a warm machine takes a second. Only what hangs waits this long."""
POLL_SECONDS = 0.02


def until(condition: Callable[[], object], what: str | Callable[[], str]) -> None:
    """Polls: another process has nothing else to wait for. `what`: said when it does not come true."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"not within {PATIENCE_SECONDS:g} s: {what if isinstance(what, str) else what()}")
        time.sleep(POLL_SECONDS)
