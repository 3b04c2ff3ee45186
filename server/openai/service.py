"""What one application serves with: the backend once it is loaded, the model names, and whether requests are taken.

One object an application, so that two run in one process. It knows three states: loading (or failed to load), ready,
draining. Routing from a requested model name to (backend, adapter version) happens here and nowhere else.
"""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from server.backends.base import Backend, Health
from server.errors import ModelNotFoundError, ServerUnavailableError
from server.metrics import Metrics
from server.openai.protocol.chunks import Body


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One name in /v1/models. `root` is the model behind it; an adapter's `parent` is the base it was trained on."""

    name: str
    max_model_len: int
    root: str
    parent: str | None = None
    version: str | None = None
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


class Service:
    """State of one application; used on its event loop only."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self.num_in_flight = 0
        """Generations under way."""
        self._backend: Backend | None = None
        self._models: dict[str, ServedModel] = {}
        self._refusal: str | None = "the model is loading"
        self._is_closed = False
        self.closing = asyncio.Event()
        """Set when the backend is to close: what is still under way then ends with an error that its client sees."""
        self._idle = asyncio.Event()
        self._idle.set()

    def open(self, backend: Backend, *models: ServedModel) -> None:
        """The backend is loaded: take requests."""
        self._backend = backend
        self._models = {model.name: model for model in models}
        if not self._is_closed:
            self._refusal = None

    def refuse(self, reason: str) -> None:
        """Answer 503 with this reason from now on, for good; what is under way goes on."""
        self._refusal = reason
        self._is_closed = True

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
        return self._ready_backend().health()

    def backend(self, model_name: str | None) -> tuple[Backend, str | None]:
        """The backend and the adapter version that answer to a model name; None: the base model."""
        backend = self._ready_backend()
        if model_name is None:
            return backend, None
        return backend, self.model(model_name).version

    def models(self) -> list[ServedModel]:
        self._ready_backend()
        return list(self._models.values())

    def model(self, name: str) -> ServedModel:
        self._ready_backend()
        if name not in self._models:
            known = ", ".join(f"'{known}'" for known in self._models)
            raise ModelNotFoundError(f"The model '{name[:200]}' does not exist; this server has {known}.")
        return self._models[name]

    def _ready_backend(self) -> Backend:
        if self._refusal is not None or self._backend is None:
            raise ServerUnavailableError(f"The server is not taking requests: {self._refusal}.")
        return self._backend
