"""Questions that a request asks the database: answered on a thread, given up soon when the database hangs.

A server that is gone fails at once; one that is stopped or whose disk is stalled answers nobody for minutes. Then one
request waits out its patience, and the next ones hear of it at once, so that neither they nor the threads pile up.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Any, TypeVar

from server.storage.errors import DatabaseUnavailableError

Answer = TypeVar("Answer")

PATIENCE_SECONDS = 3.0
"""Our queries take milliseconds; a machine that is busy with something else may take a second to begin one."""


class Patience:
    """Used on one event loop at a time."""

    def __init__(self) -> None:
        self._asking: dict[asyncio.Task[Any], float] = {}

    async def ask(self, question: Callable[[], Answer]) -> Answer:
        """Raises DatabaseUnavailableError, and whatever `question` raises."""
        now = time.monotonic()
        if any(now - since > PATIENCE_SECONDS for since in self._asking.values()):
            raise DatabaseUnavailableError("the database does not answer")
        task = asyncio.create_task(asyncio.to_thread(question))
        self._asking[task] = now
        task.add_done_callback(self._ended)
        await asyncio.wait([task], timeout=PATIENCE_SECONDS)
        if not task.done():
            raise DatabaseUnavailableError(f"the database does not answer within {PATIENCE_SECONDS:g} s")
        return task.result()

    def _ended(self, task: "asyncio.Task[Any]") -> None:
        del self._asking[task]
        if not task.cancelled():
            task.exception()  # seen: nobody may be waiting for it any more
