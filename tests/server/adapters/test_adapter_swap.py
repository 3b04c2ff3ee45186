"""Files, registry, residency, engine thread and the real core together: no stream sees two versions, none fails."""

import asyncio
from functools import partial
from pathlib import Path

import numpy as np

from server.adapters.engine_loader import EngineLoader
from server.adapters.files import open_files
from server.adapters.registry import Registry
from server.adapters.residency import Residency
from server.adapters.service import AdapterService
from server.adapters.store import Base, VersionStore
from server.adapters.version import VersionRef
from server.engine.adapters import LoadedAdapter
from server.engine.engine import Engine
from server.engine.params import SamplingParams
from server.engine.stream import merge_outputs
from server.storage.database import Database
from tests.server.adapters.fake_engine import until
from tests.server.adapters.make import BASE, WHO, put_live
from tests.server.engine.core_twin import Shape, Twin
from tests.server.engine.test_lora_files import BASE_CONFIG, module_name, small_model, write_adapter

SHAPE = Shape()
MODEL = small_model(SHAPE.layers, SHAPE.hidden, SHAPE.ffn, SHAPE.heads, SHAPE.kv_heads, SHAPE.head_dim)
TWIN = Twin(SHAPE)
NUM_VERSIONS = 6
PARAMS = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
PROMPT = list(range(40))  # more than two blocks: the prefix cache has something to mix up


def write_version(path: Path, number: int, strength: float = 0.3) -> Path:
    """Strong enough to change every greedy continuation."""
    rng = np.random.default_rng(number)
    tensors = {}
    for layer in range(SHAPE.layers):
        for name in ("q_proj", "v_proj", "down_proj"):
            rows, columns = SHAPE.size(name)
            prefix = f"base_model.model.{module_name(layer, name)}"
            tensors[f"{prefix}.lora_A.weight"] = (rng.standard_normal((2, columns)) * strength, "F32")
            tensors[f"{prefix}.lora_B.weight"] = (rng.standard_normal((rows, 2)) * strength, "F32")
    config = BASE_CONFIG | {"target_modules": ["q_proj", "v_proj", "down_proj"]}
    return write_adapter(path, config, tensors)


class World:
    """One server without its HTTP."""

    def __init__(self, database: Database, root: Path, max_loras: int) -> None:
        self.registry = Registry(database)
        base = Base(BASE, MODEL, frozenset({"base"}))  # type: ignore[arg-type]
        self.store = VersionStore(self.registry, open_files(str(root / "store"), root / "copies"), base)
        core = TWIN.core(num_blocks=600, max_loras=max_loras)
        self.engine = Engine(core, max_model_len=256, max_waiting=99, eog_token_ids=frozenset())
        self.loader = EngineLoader(self.store, self.engine)
        residency: Residency[LoadedAdapter] = Residency(self.loader, max_versions=max_loras, max_bytes=1 << 30)
        self.service = AdapterService(self.registry, residency, base_names=["base"], poll_seconds=0.01)

    async def generate(self, model: str, request_id: str) -> tuple[str, tuple[int, ...]]:
        """Which version it says it is, and what it says."""
        async with self.service.route(model, episode_id=None, request_id=request_id) as routed:
            stream = self.engine.submit(PROMPT, PARAMS, adapter=routed.handle)
            tokens = merge_outputs([output async for output in stream]).token_ids
            return routed.headers.get("X-Sterna-Adapter-Version", "base"), tuple(tokens)


def test_swaps_under_streams(sqlite_database: Database, tmp_path: Path) -> None:
    async def main() -> None:
        world = World(sqlite_database, tmp_path, max_loras=4)
        for number in range(1, NUM_VERSIONS + 1):
            world.store.import_version(write_version(tmp_path / str(number), number), "tools", **WHO)
        world.engine.start(asyncio.get_running_loop())
        try:
            await world.service.start()
            names = ["base", *(f"tools@{number}" for number in range(1, NUM_VERSIONS + 1))]
            alone = dict([await world.generate(name, "alone") for name in names])
            assert len(set(alone.values())) == len(names)  # each version says something of its own
            answers: list[tuple[str, tuple[int, ...]]] = []
            is_over = False

            async def client(index: int) -> None:
                while not is_over:
                    model = ("tools", "tools", f"tools@{1 + index % NUM_VERSIONS}", "base")[index % 4]
                    answers.append(await world.generate(model, f"{index}-{len(answers)}"))

            clients = [asyncio.create_task(client(index)) for index in range(12)]
            act = world.service.change
            for number in range(1, NUM_VERSIONS + 1):
                share = {"hold_back_share": 0.3}
                await act(partial(put_live, world.registry, VersionRef("tools", number), **share))
                enough = len(answers) + 12
                await until(lambda enough=enough: len(answers) >= enough)  # type: ignore[misc]
            for _ in range(3):
                await act(partial(world.registry.rollback, "tools", **WHO))
            is_over = True
            await asyncio.gather(*clients)
            assert not [tokens for name, tokens in answers if tokens != alone[name]]
            assert {name for name, _ in answers} == set(names)
            assert world.service.stats().failures == ()
            assert (await world.generate("tools", "last"))[0] == "tools@3"
        finally:
            await world.service.stop()
            world.engine.stop()

    asyncio.run(main())
