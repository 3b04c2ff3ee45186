"""From settings to something that answers: model file -> tokenizer -> core -> engine -> backend, closed in reverse.

Used by `sterna serve` (through server/app.py) and `sterna generate`. Loading runs on a thread, so that the event loop
can say "loading" meanwhile. The one place where the serving parts are put together.
"""

import asyncio
import logging
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from _sterna import available_isas
from quant.formats import BLOCK
from quant.model_file import ModelFile, open_model
from server.app import OpenRuntime, Runtime
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
from server.text.chat_template import ChatTemplate
from server.text.tokenizer import Tokenizer, build_tokenizer
from server.tools.constraint import ConstraintFactory

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Loaded:
    model: ResolvedModel
    file: ModelFile
    tokenizer: Tokenizer
    planner: ChatPlanner
    budget: KVBudget
    engine: Engine


def open_runtime(settings: Settings) -> OpenRuntime:
    """What create_app takes. Entering it raises ConfigError or ModelFileError when the model cannot be served."""

    @asynccontextmanager
    async def opened(metrics: Metrics) -> AsyncIterator[Runtime]:
        loaded = await asyncio.to_thread(_load, settings)
        loaded.engine.start(asyncio.get_running_loop())
        try:
            yield _runtime(settings, loaded, metrics)
        finally:
            await asyncio.to_thread(loaded.engine.stop)
            loaded.file.close()

    return opened


def _runtime(settings: Settings, loaded: _Loaded, metrics: Metrics) -> Runtime:
    engine = loaded.engine
    backend = NativeBackend(
        engine,
        loaded.tokenizer,
        loaded.planner,
        digest=loaded.file.digest,
        max_model_len=engine.max_model_len,
        max_choices=settings.max_num_seqs + settings.max_waiting,
        metrics=metrics,
    )
    name = settings.served_model_name or loaded.model.name
    model = ServedModel(name, engine.max_model_len, root=loaded.model.name)
    return Runtime(backend, (model,), engine.stats, description=_description(settings, loaded.budget))


def _description(settings: Settings, budget: KVBudget) -> str:
    isa = available_isas()[0] if settings.isa == "auto" else settings.isa
    return f"{isa}, {settings.threads or physical_cores()} threads, {budget}"


def _load(settings: Settings) -> _Loaded:
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
    core = load_core(
        file,
        isa=settings.isa,
        num_threads=settings.threads or physical_cores(),
        num_blocks=budget.num_blocks,
        max_num_seqs=settings.max_num_seqs,
        max_batch_tokens=settings.max_num_batched_tokens,
        max_model_len=budget.max_model_len,
    )
    engine = Engine(
        core,
        max_model_len=budget.max_model_len,
        max_waiting=settings.max_waiting,
        eog_token_ids=tokenizer.eog_token_ids,
        enable_prefix_caching=settings.enable_prefix_caching,
    )
    return _Loaded(model, file, tokenizer, _planner(settings, tokenizer, core.mask_words), budget, engine)


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


def _planner(settings: Settings, tokenizer: Tokenizer, mask_words: int) -> ChatPlanner:
    text = tokenizer.chat_template_text
    if settings.chat_template is not None:
        text = _read_template(settings.chat_template)
    template = None
    if text is not None:
        template = ChatTemplate(
            text,
            bos_token=tokenizer.bos_token,
            eos_token=tokenizer.eos_token,
            special_tokens=tokenizer.special_tokens,
        )
    constraints = ConstraintFactory(tokenizer, mask_words=mask_words)
    return ChatPlanner(tokenizer, template, constraints, template_text=text)


def _read_template(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise ConfigError(f"chat template {path}: {error.strerror}") from error
    except UnicodeDecodeError:
        raise ConfigError(f"chat template {path}: not UTF-8 text") from None
