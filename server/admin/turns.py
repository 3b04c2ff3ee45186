"""What asks the database on the event loop's threads takes turns: only so many of one kind at a time.

There are six of these threads on two cores, and they also verify keys, find episodes and load versions, which answers
wait for: a few totals over a large log must not hold all of them. Not here: the work on versions (adapter_work.py).
"""

import asyncio
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


class Turns:
    """One application's; shared by the requests of one kind."""

    def __init__(self, num_at_once: int) -> None:
        self._turn = asyncio.Semaphore(num_at_once)

    async def run(self, act: Callable[[], Result]) -> Result:
        """On a thread, in turn. Whoever gives up waiting leaves the thread at its work, and the turn with it."""
        await self._turn.acquire()
        work = asyncio.ensure_future(asyncio.to_thread(act))
        work.add_done_callback(lambda _: self._turn.release())
        return await asyncio.shield(work)
