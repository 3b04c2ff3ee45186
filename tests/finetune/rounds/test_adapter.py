"""Micro-batches side by side: the gradients of one after the other, the same bits every time, each micro-batch once."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from finetune.dataset.packing import pack
from finetune.model.lora import LoraSpec
from finetune.model.model import TrainModel
from finetune.packed import Example
from finetune.rounds.adapter import Adapter, Batch, Keyed, side_by_side
from tests.finetune.model.conftest import stir

MAX_ROWS = 120


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def keyed(*lengths: int, kl: int = 0) -> list[Keyed]:
    dice = np.random.default_rng(3)
    found = []
    for number, length in enumerate(lengths):
        weights = np.ones(length, np.float32)
        weights[: length // 3] = 0
        ids = dice.integers(60, size=length).astype(np.int32)
        example = Example(str(number), ids, weights, str(number), kl=number < kl)
        found.append(Keyed(pack([example], length, seed=0, epoch=0)[0], number))
    return found


def rows(batch: Batch) -> list[int]:
    return [len(one.packed.token_ids) for one in batch]


def test_twos_of_like_cost_within_the_limit() -> None:
    batches = side_by_side(keyed(60, 20, 50, 130, 25, 60, 10, kl=1), MAX_ROWS)
    assert [rows(batch) for batch in batches] == [[130], [60, 60], [50, 25], [20, 10]]
    assert batches[1][0].packed.loss_kl.any(), "what costs more comes first"
    assert sorted(one.key for batch in batches for one in batch) == list(range(7))
    assert side_by_side([], MAX_ROWS) == []


def gradients(adapter: Adapter, batches: list[Batch]) -> tuple[float, dict[str, torch.Tensor]]:
    normalizer = sum(adapter.weight_of(batch) for batch in batches)
    loss = sum(adapter.backward(batch, normalizer) for batch in batches)
    found = {}
    for name, parameter in adapter.parameters().items():
        assert parameter.grad is not None
        found[name], parameter.grad = parameter.grad.clone(), None
    return loss, found


@pytest.mark.parametrize(("dropout", "checkpointing"), [(0.0, False), (0.25, False), (0.0, True)])
def test_side_by_side_is_one_after_the_other(
    tiny_gguf: Path, two_threads: None, dropout: float, checkpointing: bool
) -> None:
    spec = LoraSpec(rank=4, dropout=dropout)
    model = stir(TrainModel.open(tiny_gguf, spec, dtype=torch.float64, checkpointing=checkpointing))
    adapter, parts = Adapter(model), keyed(60, 55, 40, kl=1)
    loss, together = gradients(adapter, side_by_side(parts, MAX_ROWS))
    again_loss, again = gradients(adapter, side_by_side(parts, MAX_ROWS))
    alone_loss, alone = gradients(adapter, [(one,) for one in parts])
    assert torch.get_num_threads() == 2, "as before"
    assert loss == again_loss
    assert loss == pytest.approx(alone_loss, rel=1e-12)
    for name, wanted in alone.items():
        assert wanted.norm() > 0, name
        assert torch.equal(together[name], again[name]), name
        assert float((together[name] - wanted).norm() / wanted.norm()) < 1e-12, name
    model.close()


def test_a_fault_on_the_other_side_is_heard_of(tiny_gguf: Path, two_threads: None) -> None:
    model = TrainModel.open(tiny_gguf, LoraSpec(rank=4))
    good, bad = keyed(60, 50)
    bad.packed.token_ids[3] = 10_000  # no such token
    with pytest.raises(IndexError):
        Adapter(model).backward((good, bad), 1.0)
    assert torch.get_num_threads() == 2
    model.close()
