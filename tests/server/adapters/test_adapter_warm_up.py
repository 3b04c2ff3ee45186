"""The token that a version computes before it serves: sound versions pass once, those that overflow never serve."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from server.adapters.residency import Residency
from server.adapters.service import AdapterService
from server.adapters.version import VersionRef
from server.adapters.warm_up import WarmUp
from server.engine.adapters import LoadedAdapter
from server.engine.engine import Engine
from server.engine.lora_types import LoraProjection, LoraWeights
from server.engine.params import SamplingParams
from server.engine.stream import TokenStream
from server.errors import AdapterError, QueueFullError, ServerUnavailableError
from server.storage.database import Database
from tests.server.adapters.fake_engine import settle, until
from tests.server.adapters.make import WHO, put_live, version
from tests.server.adapters.test_adapter_swap import SHAPE, TWIN, World, write_version
from tests.server.engine.fake_core import FakeCore

PROMPT = [1, 2, 3]


def weights(value: float, *names: str) -> LoraWeights:
    parts = []
    for layer in range(SHAPE.layers):
        for name in names:
            rows, columns = SHAPE.size(name)
            a, b = np.full((1, columns), value, np.float32), np.full((rows, 1), value, np.float32)
            parts.append(LoraProjection(layer, name, a, b, 1.0))
    return LoraWeights(1, tuple(parts), version().digest)


@asynccontextmanager
async def running() -> AsyncIterator[Engine]:
    engine = Engine(TWIN.core(max_loras=2), max_model_len=64, max_waiting=9, eog_token_ids=frozenset())
    engine.start(asyncio.get_running_loop())
    try:
        yield engine
    finally:
        engine.stop()


async def warm_up(engine: Engine, one: LoraWeights) -> WarmUp:
    warm = WarmUp(engine, PROMPT)
    await warm(version(), await asyncio.to_thread(engine.load_adapter, one))
    return warm


def test_a_sound_version_computes_one_token_once() -> None:
    async def main() -> None:
        async with running() as engine:
            warm = await warm_up(engine, weights(0.01, "q_proj"))
            assert engine.stats().generated_tokens == 1
            await warm(version(), LoadedAdapter(0, version().digest))  # loaded again later: nothing new to learn
            assert engine.stats().generated_tokens == 1

    asyncio.run(main())


@pytest.mark.parametrize(
    ("one", "reason"),
    [
        (weights(1.8e19, "gate_proj", "up_proj"), "its logits are not finite"),
        (weights(1e10, "o_proj"), "it gives all tokens the same logit"),
    ],
)
def test_a_version_that_overflows_is_refused(one: LoraWeights, reason: str) -> None:
    async def main() -> None:
        async with running() as engine:
            with pytest.raises(AdapterError, match=f"tools@1 cannot be served: {reason}"):
                await warm_up(engine, one)

    asyncio.run(main())


def test_a_full_queue_does_not_keep_a_version_waiting() -> None:
    async def main() -> None:
        core = FakeCore(max_num_seqs=1)
        engine = Engine(core, max_model_len=64, max_waiting=2, eog_token_ids=frozenset())
        engine.start(asyncio.get_running_loop())
        handle = await asyncio.to_thread(engine.load_adapter, weights(0.01, "q_proj"))
        core.gate = threading.Event()
        ended: list[str] = []

        async def read(name: str, stream: TokenStream) -> None:
            async for _ in stream:
                pass
            ended.append(name)

        async def warm_up() -> None:
            await WarmUp(engine, PROMPT)(version(), handle)
            ended.append("warm-up")

        params = SamplingParams(max_tokens=20, temperature=0.0)
        reading = [asyncio.create_task(read("running", engine.submit(PROMPT, params)))]
        await until(lambda: len(core.steps) > 0)  # it has the only place, in a step that does not end
        reading += [asyncio.create_task(read(name, engine.submit(PROMPT, params))) for name in ("first", "second")]
        with pytest.raises(QueueFullError):
            engine.submit(PROMPT, params)
        warming = asyncio.create_task(warm_up())
        await settle()
        core.gate.set()
        await asyncio.gather(warming, *reading)
        engine.stop()
        assert ended == ["running", "warm-up", "first", "second"]

    asyncio.run(main())


def test_a_stopping_engine_is_not_the_version_s_fault() -> None:
    async def main() -> None:
        async with running() as engine:
            handle = await asyncio.to_thread(engine.load_adapter, weights(0.01, "q_proj"))
        with pytest.raises(ServerUnavailableError):
            await WarmUp(engine, PROMPT)(version(), handle)

    asyncio.run(main())


def test_the_route_stays_when_the_promoted_version_overflows(sqlite_database: Database, tmp_path: Path) -> None:
    async def main() -> None:
        world = World(sqlite_database, tmp_path, max_loras=4)
        residency: Residency[LoadedAdapter] = Residency(
            world.loader, max_versions=4, max_bytes=1 << 30, warm_up=WarmUp(world.engine, PROMPT)
        )
        service = AdapterService(world.registry, residency, base_names=["base"], poll_seconds=10)
        for number, strength in ((1, 0.3), (2, 1e16)):
            world.store.import_version(write_version(tmp_path / str(number), number, strength), "tools", **WHO)
        world.engine.start(asyncio.get_running_loop())
        try:
            await service.start()
            for number in (1, 2):
                await service.change(partial(put_live, world.registry, VersionRef("tools", number)))
            route = service.resolve("tools", episode_id=None, request_id="r")
            assert str(route.version and route.version.ref) == "tools@1"
            (failure,) = service.stats().failures
            assert "tools@2 cannot be served" in failure.reason
            assert world.engine.stats().num_adapters == 1
        finally:
            await service.stop()
            world.engine.stop()

    asyncio.run(main())
