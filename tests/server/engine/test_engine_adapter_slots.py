"""Slots alone: given out and back, in use until the last sequence ends, and nobody waits for ever."""

from concurrent.futures import Future

import numpy as np
import pytest

from server.engine.adapters import AdapterSlots, LoadedAdapter, pack
from server.engine.lora_types import LoraProjection, LoraWeights
from server.errors import AdapterError
from tests.server.engine.fake_core import FakeCore, lora_content


def weights(number: int, scale: float = 1.0) -> LoraWeights:
    matrix = np.full((1, 1), number, np.float32)
    parts = tuple(LoraProjection(layer, "q_proj", matrix, matrix, scale) for layer in range(3))
    return LoraWeights(1, parts, f"sha256:{number}")


def load(core: FakeCore, slots: AdapterSlots, number: int) -> LoadedAdapter:
    return slots.load(pack(core, weights(number)), f"sha256:{number}")


def unload(slots: AdapterSlots, adapter: LoadedAdapter) -> "Future[None]":
    future: Future[None] = Future()
    slots.begin_unload(adapter, future)
    return future


def test_slots_are_given_out_and_back() -> None:
    core = FakeCore(max_loras=2)
    slots = AdapterSlots(core)
    first, second = load(core, slots, 1), load(core, slots, 2)
    assert core.loras == {first.slot: lora_content(weights(1)), second.slot: lora_content(weights(2))}
    with pytest.raises(AdapterError, match="all 2 adapter slots are taken"):
        load(core, slots, 3)
    assert unload(slots, first).done()
    third = load(core, slots, 3)
    assert third.slot == first.slot
    assert slots.num_loaded == 2
    assert not slots.acquire(first)  # a handle of what was there before
    assert unload(slots, first).done()
    assert core.loras[third.slot] == lora_content(weights(3))


def test_a_version_in_use_goes_when_its_last_sequence_ends() -> None:
    core = FakeCore()
    slots = AdapterSlots(core)
    adapter = load(core, slots, 1)
    assert slots.acquire(adapter)
    assert slots.acquire(adapter)
    unloading = unload(slots, adapter)
    slots.release(adapter)
    assert not unloading.done()
    assert not slots.acquire(adapter)
    slots.release(adapter)
    assert unloading.done()
    assert core.loras == {}


def test_what_the_core_refuses_takes_no_slot() -> None:
    with pytest.raises(AdapterError, match="the core refused the adapter: scale is not finite"):
        pack(FakeCore(), weights(1, scale=float("inf")))


def test_the_end_of_the_engine_ends_every_wait() -> None:
    core = FakeCore()
    slots = AdapterSlots(core)
    adapter = load(core, slots, 1)
    slots.acquire(adapter)
    unloading = unload(slots, adapter)
    assert not unloading.done()
    slots.abandon()
    assert unloading.done()
