"""The core's LoRA slots: which adapter version lies in which, and when a slot can be given back.

Lives on the engine thread, between steps. A load is spread over steps, so that no running sequence waits for all of
it. An unload takes effect when the adapter's last sequence has ended.

Not covered: reading adapter files (lora.py), names and versions (the registry).
"""

from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass

from server.engine.core_api import Core
from server.engine.lora_types import LoraWeights
from server.errors import AdapterError, SternaError

# One projection of a 135M model repacks in tens of microseconds, one of an 8B model in about a millisecond: a step that
# carries this many is at most a few milliseconds late.
PROJECTIONS_PER_STEP = 8


@dataclass(frozen=True, eq=False, slots=True)
class LoadedAdapter:
    """A handle: valid until `Engine.unload_adapter`. `digest` is part of every KV block's key."""

    slot: int
    digest: str


@dataclass(eq=False, slots=True)
class _Load:
    weights: LoraWeights
    future: "Future[LoadedAdapter]"
    slot: int = -1
    num_done: int = 0


@dataclass(eq=False, slots=True)
class _Slot:
    adapter: LoadedAdapter
    num_sequences: int = 0
    unloaded: "Future[None] | None" = None


class AdapterSlots:
    """The `max_loras` slots of one core."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._free = list(range(core.max_loras - 1, -1, -1))
        self._slots: dict[int, _Slot] = {}
        self._loads: deque[_Load] = deque()

    @property
    def num_loaded(self) -> int:
        return len(self._slots)

    @property
    def has_work(self) -> bool:
        return bool(self._loads)

    def begin_load(self, weights: LoraWeights, future: "Future[LoadedAdapter]") -> None:
        self._loads.append(_Load(weights, future))

    def work(self, num_projections: int | None) -> None:
        """Load up to `num_projections` matrix pairs of the oldest load; None finishes every load."""
        while self._loads:
            load = self._loads[0]
            if load.slot < 0:
                if not self._free:
                    self._loads.popleft()
                    load.future.set_exception(
                        AdapterError(f"all {self._core.max_loras} adapter slots are taken: unload a version first")
                    )
                    continue
                load.slot = self._free.pop()
            todo = load.weights.projections[load.num_done :]
            todo = todo if num_projections is None else todo[:num_projections]
            try:
                for part in todo:
                    self._core.load_lora(load.slot, part.layer, part.projection, part.a, part.b, part.scale)
            except (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, MemoryError) as error:
                # Whatever a C++ exception becomes in nanobind.
                self._loads.popleft()
                load.future.set_exception(AdapterError(f"the core refused the adapter: {error}"))
                self._core.clear_lora(load.slot)
                self._free.append(load.slot)
                continue
            load.num_done += len(todo)
            if load.num_done == len(load.weights.projections):
                self._loads.popleft()
                adapter = LoadedAdapter(load.slot, load.weights.digest)
                self._slots[load.slot] = _Slot(adapter)
                load.future.set_result(adapter)
            if num_projections is not None:
                return

    def begin_unload(self, adapter: LoadedAdapter, future: "Future[None]") -> None:
        slot = self._find(adapter)
        if slot is None:
            future.set_result(None)  # gone already: unloading twice is no fault
        elif slot.unloaded is not None:
            slot.unloaded.add_done_callback(lambda _: future.set_result(None))
        else:
            slot.unloaded = future
            self._clear_if_idle(slot)

    def acquire(self, adapter: LoadedAdapter) -> bool:
        """Count one more sequence; False when the handle is not (or no longer) served."""
        slot = self._find(adapter)
        if slot is None or slot.unloaded is not None:
            return False
        slot.num_sequences += 1
        return True

    def release(self, adapter: LoadedAdapter) -> None:
        slot = self._find(adapter)
        assert slot is not None
        assert slot.num_sequences > 0
        slot.num_sequences -= 1
        self._clear_if_idle(slot)

    def abandon(self, error: SternaError) -> None:
        """The engine stops: nobody may wait for a load or an unload for ever."""
        for load in self._loads:
            load.future.set_exception(error)
        self._loads.clear()
        for slot in self._slots.values():
            if slot.unloaded is not None:
                slot.unloaded.set_result(None)
                slot.unloaded = None

    def _find(self, adapter: LoadedAdapter) -> _Slot | None:
        slot = self._slots.get(adapter.slot)
        return slot if slot is not None and slot.adapter is adapter else None

    def _clear_if_idle(self, slot: _Slot) -> None:
        if slot.unloaded is None or slot.num_sequences > 0:
            return
        self._core.clear_lora(slot.adapter.slot)
        del self._slots[slot.adapter.slot]
        self._free.append(slot.adapter.slot)
        slot.unloaded.set_result(None)
