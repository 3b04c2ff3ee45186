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


class EngineLoader:
    """Reads on one thread, hands over on another; the event loop waits for neither."""

    def __init__(self, store: VersionStore, engine: AdapterEngine) -> None:
        self._store = store
        self._engine = engine

    async def load(self, version: Version) -> LoadedAdapter:
        """Raises AdapterError, ServerUnavailableError."""
        weights = await asyncio.to_thread(self._store.load, version)
        return await asyncio.to_thread(self._engine.load_adapter, weights)

    def unload(self, handle: LoadedAdapter) -> Awaitable[None]:
        return asyncio.wrap_future(self._engine.unload_adapter(handle))
