"""The core's LoRA slots: which adapter version lies in which, and when a slot can be given back.

Packing is the caller's, on a thread of its own, and a free slot is filled while the engine steps: nobody waits for a
load but who asked for it. An unload takes effect when the adapter's last sequence has ended. Used under the engine's
lock.

Not covered: reading adapter files (lora.py), names and versions (the registry).
"""

from concurrent.futures import Future
from dataclasses import dataclass

from server.engine.core_api import Core, Lora
from server.engine.lora_types import LoraWeights
from server.errors import AdapterError


@dataclass(frozen=True, eq=False, slots=True)
class LoadedAdapter:
    """A handle: valid until `Engine.unload_adapter`. `digest` is part of every KV block's key."""

    slot: int
    digest: str


@dataclass(eq=False, slots=True)
class _Slot:
    adapter: LoadedAdapter
    num_sequences: int = 0
    unloaded: "Future[None] | None" = None


def pack(core: Core, weights: LoraWeights) -> Lora:
    """Any thread; 10 ms for a 135M model, a quarter of a second for an 8B one. Raises AdapterError."""
    lora = core.new_lora()
    try:
        for part in weights.projections:
            lora.add(part.layer, part.projection, part.a, part.b, part.scale)
    except (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, MemoryError) as error:
        # Whatever a C++ exception becomes in nanobind.
        raise AdapterError(f"the core refused the adapter: {error}") from error
    return lora


class AdapterSlots:
    """The `max_loras` slots of one core."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._free = list(range(core.max_loras - 1, -1, -1))
        self._slots: dict[int, _Slot] = {}

    @property
    def num_loaded(self) -> int:
        return len(self._slots)

    def load(self, lora: Lora, digest: str) -> LoadedAdapter:
        """Raises AdapterError when every slot is taken."""
        if not self._free:
            raise AdapterError(f"all {self._core.max_loras} adapter slots are taken: unload a version first")
        adapter = LoadedAdapter(self._free.pop(), digest)
        self._core.set_lora(adapter.slot, lora)
        self._slots[adapter.slot] = _Slot(adapter)
        return adapter

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

    def abandon(self) -> None:
        """The engine stops: nobody may wait for an unload for ever."""
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
