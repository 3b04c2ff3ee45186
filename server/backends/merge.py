"""Several token streams read as one: (index, output) in the order in which outputs come.

One stream, the usual case, is read directly: no task and no queue between the engine's wake-up and the answer.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Protocol

from server.engine.params import EngineOutput


class TokenSource(Protocol):
    """The engine's TokenStream: outputs until one has a finish reason; `cancel` frees the work and is idempotent."""

    def __aiter__(self) -> AsyncIterator[EngineOutput]: ...

    def cancel(self) -> None: ...


async def merge(streams: Sequence[TokenSource]) -> AsyncGenerator[tuple[int, EngineOutput], None]:
    """Ends when all streams have ended; the first failure of one is raised."""
    if len(streams) == 1:
        async for output in streams[0]:
            yield 0, output
        return
    queue: asyncio.Queue[tuple[int, EngineOutput | None]] = asyncio.Queue()

    async def pump(index: int, stream: TokenSource) -> None:
        try:
            async for output in stream:
                queue.put_nowait((index, output))
        finally:
            queue.put_nowait((index, None))

    tasks = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]
    num_open = len(tasks)
    try:
        while num_open:
            index, item = await queue.get()
            if item is not None:
                yield index, item
            else:
                num_open -= 1
                await tasks[index]  # raises what ended the stream, if it failed
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
