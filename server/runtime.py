"""From settings to something that answers: model file -> tokenizer -> core -> engine -> backend, closed in reverse.

`sterna serve` (through server/app.py) opens it with the records and the adapters beside; `sterna generate` the backend
alone. Loading runs on threads, so that the event loop can say "loading" meanwhile. The one place where the serving
parts are put together.
"""

import asyncio
import logging
import math
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from _sterna import available_isas
from quant.formats import BLOCK
from quant.model_file import ModelFile, open_model
from quant.tensor_rules import has_float_projection
from server.adapters.engine_loader import EngineLoader
from server.adapters.files import open_files
from server.adapters.registry import Registry
from server.adapters.residency import Residency
from server.adapters.service import AdapterService
from server.adapters.store import Base, VersionStore
from server.adapters.warm_up import WarmUp
from server.app import OpenRuntime, Runtime
from server.backends.base import Identity
from server.backends.chat_plan import ChatPlanner
from server.backends.native import NativeBackend
from server.config import Settings
from server.engine.engine import Engine
from server.engine.weights import load_core
from server.errors import ConfigError
from server.kv_budget import KVBudget, plan_kv_budget
from server.machine import available_memory_bytes, physical_cores
from server.metrics import Metrics
from server.models.catalog import ResolvedModel, resolve_model
from server.openai.service import ServedModel
from server.records import Records, open_records, open_store
from server.text.chat_template import ChatTemplate
from server.text.tokenizer import Tokenizer, build_tokenizer
from server.tools.constraint import ConstraintFactory

logger = logging.getLogger(__name__)

TRIED_WITH = "What is the capital of France?"
"""Every adapter version computes a token after this before it serves."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model that answers."""

    model: ResolvedModel
    file: ModelFile
    budget: KVBudget
    engine: Engine
    tokenizer: Tokenizer
    backend: NativeBackend

    def close(self) -> None:
        self.engine.stop()
        self.file.close()


def open_runtime(settings: Settings) -> OpenRuntime:
    """What create_app takes. Entering it raises ConfigError or ModelFileError when the model cannot be served."""
    if settings.backend == "openai":
        from server.record_mode import open_record_mode  # brings an HTTP client, which nothing else needs

        return open_record_mode(settings)

    @asynccontextmanager
    async def opened(metrics: Metrics) -> AsyncIterator[Runtime]:
        name = settings.served_model_name or resolve_model(settings.model, settings.cache_dir).name
        opening = asyncio.create_task(asyncio.to_thread(open_store, settings, metrics, name))
        async with AsyncExitStack() as stack:
            # Both at once; and the database is open, or has failed, before anything is given up.
            loading = asyncio.create_task(asyncio.to_thread(load_model, settings))
            await asyncio.wait([opening, loading])
            if loading.exception() is None:
                stack.push_async_callback(asyncio.to_thread, loading.result().close)
            if opening.exception() is None:
                records = await stack.enter_async_context(open_records(settings, opening.result()))
            loaded = loading.result()
            opening.result()
            loaded.engine.start(asyncio.get_running_loop())
            versions = await asyncio.to_thread(_open_versions, settings, records, loaded, name)
            residency = Residency(
                EngineLoader(versions, loaded.engine),
                max_versions=settings.max_loras,
                max_bytes=settings.adapter_memory,
                warm_up=WarmUp(
                    loaded.engine, loaded.tokenizer.encode(TRIED_WITH, add_special=True, parse_special=False)
                ),
            )
            adapters = AdapterService(
                versions.registry,
                residency,
                base_names=[name],
                on_swap=metrics.count_swap,
                housekeeping=versions.collect_garbage,
            )
            await adapters.start()
            metrics.watch_log(records.log.stats)
            metrics.watch_adapters(adapters.stats, residency.stats, adapters.known_versions)

            async def end_answers() -> None:
                await adapters.stop()
                await asyncio.to_thread(loaded.engine.stop)

            stack.push_async_callback(end_answers)
            yield Runtime(
                loaded.backend,
                replace(records, adapters=adapters, versions=versions),
                (ServedModel(name, loaded.engine.max_model_len, root=loaded.model.name),),
                loaded.engine.stats,
                end_answers,
                description=_description(settings, loaded.budget),
            )

    return opened


def _open_versions(settings: Settings, records: Records, loaded: Loaded, base_name: str) -> VersionStore:
    is_float = has_float_projection({name: tensor.type for name, tensor in loaded.file.tensors.items()})
    return VersionStore(
        Registry(records.database),
        open_files(settings.adapter_store_url, settings.cache_dir / "adapters"),
        Base(loaded.file.digest, loaded.file.config, frozenset({base_name}), is_float=is_float),
    )


def _description(settings: Settings, budget: KVBudget) -> str:
    isa = available_isas()[0] if settings.isa == "auto" else settings.isa
    return f"{isa}, {settings.threads or physical_cores()} threads, {budget}"


def load_model(settings: Settings) -> Loaded:
    """Ready but for `engine.start`. Raises ConfigError, ModelFileError."""
    model = resolve_model(settings.model, settings.cache_dir)
    file = open_model(model.path, quantize=settings.quantize, digest_cache=settings.cache_dir / "digests")
    for note in file.notes:
        logger.info("%s: %s", file.path, note)
    _check_digest(model, file)
    budget = plan_kv_budget(
        file.config,
        kv_memory=settings.kv_memory,
        max_model_len=settings.max_model_len,
        available_bytes=max(available_memory_bytes() - _weight_bytes(file), 0),
    )
    tokenizer = _tokenizer(file)
    with ThreadPoolExecutor(1) as beside:
        tokenizer_digest = beside.submit(lambda: tokenizer.digest)  # 0.2 s, most of it while the weights are packed
        core = load_core(
            file,
            isa=settings.isa,
            num_threads=settings.threads or physical_cores(),
            num_blocks=budget.num_blocks,
            max_num_seqs=settings.max_num_seqs,
            max_batch_tokens=settings.max_num_batched_tokens,
            max_model_len=budget.max_model_len,
            max_loras=settings.max_loras,
        )
    engine = Engine(
        core,
        max_model_len=budget.max_model_len,
        max_waiting=settings.max_waiting,
        eog_token_ids=tokenizer.eog_token_ids,
        enable_prefix_caching=settings.enable_prefix_caching,
        max_draft_tokens=settings.max_draft_tokens,
    )
    template = _template_text(settings, tokenizer)
    backend = NativeBackend(
        engine,
        tokenizer,
        _planner(template, tokenizer, core.mask_words),
        identity=Identity(
            model.name,
            model_digest=file.digest,
            template_digest=None if template is None else "sha256:" + sha256(template.encode()).hexdigest(),
            tokenizer_digest=tokenizer_digest.result(),
        ),
        max_model_len=engine.max_model_len,
        max_choices=settings.max_num_seqs + settings.max_waiting,
    )
    return Loaded(model, file, budget, engine, tokenizer, backend)


def _tokenizer(file: ModelFile) -> Tokenizer:
    try:
        return build_tokenizer(file.tokenizer, file.config.vocab_size)
    except ConfigError as error:
        raise ConfigError(f"{file.path}: {error}") from None


def _check_digest(model: ResolvedModel, file: ModelFile) -> None:
    """A catalogue model must be, byte for byte, what the catalogue names."""
    if model.sha256 is not None and file.digest.removeprefix("sha256:") != model.sha256:
        raise ConfigError(
            f"{model.path}: its digest {file.digest} is not the catalogue's sha256:{model.sha256}; "
            f"remove it and run `sterna models pull {model.name}`"
        )


def _weight_bytes(file: ModelFile) -> int:
    """What the packed weights will take: about their size in the file."""
    total = 0
    for tensor in file.tensors.values():
        elements, num_bytes = BLOCK[tensor.type]
        total += math.prod(tensor.shape) // elements * num_bytes
    return total


def _template_text(settings: Settings, tokenizer: Tokenizer) -> str | None:
    return tokenizer.chat_template_text if settings.chat_template is None else _read_template(settings.chat_template)


def _planner(template_text: str | None, tokenizer: Tokenizer, mask_words: int) -> ChatPlanner:
    template = None
    if template_text is not None:
        template = ChatTemplate(
            template_text,
            bos_token=tokenizer.bos_token,
            eos_token=tokenizer.eos_token,
            special_tokens=tokenizer.special_tokens,
        )
    constraints = ConstraintFactory(tokenizer, mask_words=mask_words)
    return ChatPlanner(tokenizer, template, constraints, template_text=template_text)


def _read_template(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise ConfigError(f"chat template {path}: {error.strerror}") from error
    except UnicodeDecodeError:
        raise ConfigError(f"chat template {path}: not UTF-8 text") from None
