"""The slow acts of /v1/adapters: take a version in, give one out, compare two. Each on a thread, two at a time.

What an upload is called in messages and in the registry is what its sender calls it, never our path of it.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

from starlette.requests import Request

from server.adapters.checks import cause_of, check_not_deleted, check_text
from server.adapters.compare import ProjectionDiff, compare_configs, compare_weights
from server.adapters.gguf import export_gguf
from server.adapters.service import AdapterService
from server.adapters.store import VersionStore
from server.adapters.version import Version, VersionRef, check_adapter_name
from server.admin.adapter_transfer import receive_zip
from server.errors import AdapterError, ServerUnavailableError

Result = TypeVar("Result")

NUM_AT_ONCE = 2
"""The event loop's threads also verify keys and follow the registry; checking weights may take seconds of one."""


class AdapterWork:
    """One application's; the limit is shared by all requests."""

    def __init__(self) -> None:
        self._turn = asyncio.Semaphore(NUM_AT_ONCE)

    async def take_in(
        self,
        http: Request,
        store: VersionStore,
        service: AdapterService[Any],
        *,
        adapter: str,
        origin: str,
        reason: str,
        asked_by: str,
        **facts: Any,
    ) -> tuple[Version, bool]:
        """The version that the request's body is now, and whether it is new. `facts`: base_digest, parent."""
        check_adapter_name(adapter)
        cause_of(asked_by, reason)  # refuse before a gigabyte is sent
        check_text(origin, "origin")
        async with _staging(store) as folder:
            upload = folder / "upload.zip"
            await receive_zip(http, upload, max_version_bytes=store.max_version_bytes)
            act = partial(
                store.import_version, upload, adapter, origin=origin, reason=reason, asked_by=asked_by, **facts
            )
            async with self._turn:
                try:
                    return await service.change(act)
                except AdapterError as error:
                    raise AdapterError(str(error).replace(str(upload), origin)) from error

    async def give_out(self, store: VersionStore, ref: VersionRef, *, as_gguf: bool = False) -> tuple[IO[bytes], int]:
        """An open file without a name, and its size: a zip file, or llama.cpp's. Raises InvalidRequestError."""
        return await self._run(ref, partial(_export, store, ref, as_gguf))

    async def compare(
        self, store: VersionStore, left: VersionRef, right: VersionRef
    ) -> tuple[Version, Version, dict[str, tuple[Any, Any]], list[ProjectionDiff]]:
        """Both versions, the keys of their configurations that differ, and every matrix that either adapts."""
        return await self._run(left, partial(_compare, store, left, right))

    async def _run(self, ref: VersionRef, act: Callable[[], Result]) -> Result:
        async with self._turn:
            try:
                return await asyncio.to_thread(act)
            except AdapterError as error:  # whoever asks is not to blame for what is in our store
                raise ServerUnavailableError(f"{ref} cannot be read: {error}") from error


@asynccontextmanager
async def _staging(store: VersionStore) -> AsyncIterator[Path]:
    """Made and removed on a thread: to unlink a gigabyte takes the disk a while."""
    folder = store.staging()
    path = await asyncio.to_thread(folder.__enter__)
    try:
        yield path
    finally:
        await asyncio.to_thread(folder.__exit__, None, None, None)


def _export(store: VersionStore, ref: VersionRef, as_gguf: bool) -> tuple[IO[bytes], int]:
    version = store.registry.version(ref)
    check_not_deleted(version)
    with store.staging() as folder:
        path = folder / f"{ref}.{'gguf' if as_gguf else 'zip'}"
        try:
            if as_gguf:
                export_gguf(store, version, path)
            else:
                store.export(ref, path)
        except AdapterError as error:
            raise AdapterError(str(error).removeprefix(f"{path}: ")) from error
        return path.open("rb"), path.stat().st_size


def _compare(
    store: VersionStore, *refs: VersionRef
) -> tuple[Version, Version, dict[str, tuple[Any, Any]], list[ProjectionDiff]]:
    left, right = (store.registry.version(ref) for ref in refs)
    for version in (left, right):
        check_not_deleted(version)
    rows = compare_weights(store.load(left), store.load(right))
    return left, right, compare_configs(store.path(left), store.path(right)), rows
