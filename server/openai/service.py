"""What one application serves with: backend, records and model names once loaded, and whether requests are taken.

One object an application, so that two run in one process. It knows three states: loading (or failed to load), ready,
draining. Not here: which adapter version answers (server/adapters/router.py, asked by answer.py).
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from server.adapters.shadow import ShadowRunner
from server.backends.base import Backend, Health
from server.errors import ServerUnavailableError
from server.metrics import Metrics
from server.openai.access import Access
from server.openai.answer import Parts
from server.openai.protocol.chunks import Body
from server.openai.shadow import ShadowJob, with_shadows
from server.records import Records


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One name in /v1/models. `root` is the model behind it; an adapter's `parent` is the base it was trained on."""

    name: str
    max_model_len: int | None
    """None: an upstream that does not tell."""
    root: str
    parent: str | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    def body(self) -> Body:
        """OpenAI's model object with vLLM's three extra fields."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "sterna",
            "root": self.root,
            "parent": self.parent,
            "max_model_len": self.max_model_len,
        }


ListModels = Callable[[], Awaitable[Sequence[ServedModel]]]


class Service:
    """State of one application; used on its event loop only."""

    def __init__(self, metrics: Metrics, *, is_loopback: bool) -> None:
        self.metrics = metrics
        self.access = Access(lambda: self.records().keys, is_loopback=is_loopback)
        self.num_in_flight = 0
        """Generations under way."""
        self._parts: Parts | None = None
        self._shadows: ShadowRunner[ShadowJob] | None = None
        self._models: dict[str, ServedModel] = {}
        self._list_models: ListModels | None = None
        self._refusal: str | None = "the model is loading"
        self._is_closed = False
        self.closing = asyncio.Event()
        """Set when the backend is to close: what is still under way then ends with an error that its client sees."""
        self._idle = asyncio.Event()
        self._idle.set()

    def open(
        self,
        backend: Backend,
        records: Records,
        *models: ServedModel,
        list_models: ListModels | None = None,
        is_busy: Callable[[], bool] = lambda: False,
    ) -> None:
        """The backend is loaded: take requests. The first model is the base.

        `list_models`: who knows them instead. `is_busy`: requests wait, so that this is no time for shadows.
        """
        self._list_models = list_models
        parts = Parts(backend, records, self.metrics, models[0].name)
        self._parts, self._shadows = with_shadows(parts, lambda: not self.is_open or is_busy())
        self._models = {model.name: model for model in models}
        if not self._is_closed:
            self._refusal = None

    def refuse(self, reason: str) -> None:
        """Answer 503 with this reason from now on, for good; what is under way goes on."""
        self._refusal = reason
        self._is_closed = True

    async def end_shadows(self) -> None:
        """Cut off what runs for shadow versions; their traces say so. Before the engine stops."""
        if self._shadows is not None:
            await self._shadows.stop()

    @property
    def is_open(self) -> bool:
        """Requests are taken."""
        return self._refusal is None

    async def drained(self) -> None:
        """Returns once nothing is under way."""
        await self._idle.wait()

    @contextmanager
    def in_flight(self) -> Iterator[None]:
        """Around one generation."""
        self.num_in_flight += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.num_in_flight -= 1
            if not self.num_in_flight:
                self._idle.set()

    def health(self) -> Health:
        if self._refusal is not None:
            return Health(is_ready=False, reason=self._refusal)
        return self.parts().backend.health()

    def parts(self) -> Parts:
        """What answers are made with. Raises ServerUnavailableError while there is nothing to answer with."""
        if self._refusal is not None or self._parts is None:
            raise ServerUnavailableError(f"The server is not taking requests: {self._refusal}.")
        return self._parts

    def records(self) -> Records:
        """Raises ServerUnavailableError."""
        return self.parts().records

    def backend(self, model_name: str | None) -> Backend:
        """What tokenizes for a model, which does not depend on its adapter. Raises ModelNotFoundError."""
        if model_name is not None:
            self.model(model_name)
        return self.parts().backend

    async def models(self) -> Sequence[ServedModel]:
        """The base, then every adapter, each followed by its versions; in record mode what the upstream lists."""
        if self._list_models is not None:
            return await self._list_models()
        return [*self._models.values(), *self._adapter_models()]

    def model(self, name: str) -> ServedModel:
        """Raises ModelNotFoundError."""
        adapters = self.records().adapters
        if name in self._models:
            return self._models[name]
        if adapters is None:  # an upstream may have more than it lists
            return replace(next(iter(self._models.values())), name=name, root=name)
        adapters.resolve(name, episode_id=None, request_id="")  # raises for an unknown one
        return next(model for model in self._adapter_models() if model.name == name)

    def _adapter_models(self) -> Iterator[ServedModel]:
        adapters = self.records().adapters
        base = next(iter(self._models.values()))
        for routes in adapters.adapters() if adapters is not None else ():
            created = [int(version.created_at.timestamp()) for version in routes.versions.values()]
            yield replace(base, name=routes.name, parent=base.name, created=min(created, default=base.created))
            for version in routes.versions.values():
                moment = int(version.created_at.timestamp())
                yield replace(base, name=str(version.ref), parent=base.name, created=moment)
