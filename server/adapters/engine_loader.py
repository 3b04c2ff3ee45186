"""Moves versions between the store and the embedded engine; what residency.py loads and unloads with."""

import asyncio
from collections.abc import Awaitable
from concurrent.futures import Future
from typing import Protocol

from server.adapters.store import VersionStore
from server.adapters.version import Version
from server.engine.adapters import LoadedAdapter
from server.engine.lora_types import LoraWeights


class AdapterEngine(Protocol):
    """What is needed of server.engine.engine.Engine."""

    def load_adapter(self, weights: LoraWeights) -> LoadedAdapter: ...

    def unload_adapter(self, adapter: LoadedAdapter) -> "Future[None]": ...


LOADS_AT_ONCE = 2
"""Reading, checking and packing is 30 ms of a core for a 20 MB version. A burst of cold versions on every thread there
is would take the cores from the streams that run."""


class EngineLoader:
    """Reads, checks and packs on a thread; the event loop does not wait, and the engine only to take the result."""

    def __init__(self, store: VersionStore, engine: AdapterEngine) -> None:
        self._store = store
        self._engine = engine
        self._places = asyncio.Semaphore(LOADS_AT_ONCE)

    async def load(self, version: Version) -> LoadedAdapter:
        """Raises AdapterError, ServerUnavailableError."""
        async with self._places:
            return await asyncio.to_thread(self._load, version)

    def unload(self, handle: LoadedAdapter) -> Awaitable[None]:
        return asyncio.wrap_future(self._engine.unload_adapter(handle))

    def _load(self, version: Version) -> LoadedAdapter:
        return self._engine.load_adapter(self._store.load(version))
