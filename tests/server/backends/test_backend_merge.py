"""Several streams read as one, in order, and closed without a leftover task."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest

from server.backends.merge import merge
from server.engine.params import EngineOutput


class Stream:
    """A stream that waits for its reader to be let on, then yields, then perhaps fails."""

    def __init__(self, *token_ids: int, failure: Exception | None = None, endless: bool = False) -> None:
        self._token_ids = token_ids
        self._failure = failure
        self._endless = endless

    async def __aiter__(self) -> AsyncIterator[EngineOutput]:
        for token_id in self._token_ids:
            await asyncio.sleep(0)
            yield EngineOutput(token_ids=[token_id])
        if self._failure:
            raise self._failure
        if self._endless:
            await asyncio.Event().wait()

    def cancel(self) -> None:
        pass


async def collect(*streams: Stream) -> list[tuple[int, int]]:
    return [(index, output.token_ids[0]) async for index, output in merge(streams)]


@pytest.mark.parametrize("count", [1, 3])
def test_every_stream_in_its_order(count: int) -> None:
    merged = asyncio.run(collect(*(Stream(*range(4)) for _ in range(count))))
    for index in range(count):
        assert [token for stream, token in merged if stream == index] == [0, 1, 2, 3]


@pytest.mark.parametrize("others", [0, 2])
def test_a_failure_is_raised(others: int) -> None:
    with pytest.raises(ValueError, match="broken"):
        asyncio.run(collect(*(Stream(1, endless=True) for _ in range(others)), Stream(1, failure=ValueError("broken"))))


def test_closing_leaves_no_task() -> None:
    async def first_only() -> int:
        async with aclosing(merge([Stream(1, endless=True), Stream(endless=True)])) as merged:
            async for _ in merged:
                break
        return len(asyncio.all_tasks())

    assert asyncio.run(first_only()) == 1
