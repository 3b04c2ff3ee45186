"""A database that hangs costs one request its patience, and no thread for each that comes after."""

import asyncio
import threading

import pytest

from server.storage import patience as module
from server.storage.errors import DatabaseUnavailableError
from server.storage.patience import Patience
from tests.patience import PATIENCE_SECONDS


def test_answers_and_failures_come_through() -> None:
    def fail() -> None:
        raise DatabaseUnavailableError("gone")

    async def ask() -> None:
        patience = Patience()
        assert await patience.ask(lambda: 7) == 7
        with pytest.raises(DatabaseUnavailableError, match="gone"):
            await patience.ask(fail)
        assert await patience.ask(lambda: 8) == 8

    asyncio.run(ask())


def test_a_silence_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.01)
    speaks, num_asked = threading.Event(), 0

    def question() -> int:
        nonlocal num_asked
        num_asked += 1
        speaks.wait()
        return 7

    async def ask() -> None:
        patience = Patience()
        for _ in range(5):
            with pytest.raises(DatabaseUnavailableError, match="does not answer"):
                await patience.ask(question)
        assert num_asked <= 2  # the second when the clock's grain let it
        speaks.set()
        async with asyncio.timeout(PATIENCE_SECONDS):
            while patience._asking:  # noqa: ASYNC110 - the thread ends when it ends
                await asyncio.sleep(0.001)
        assert await patience.ask(question) == 7

    asyncio.run(ask())
