"""Packed, accumulated and plain runs are one computation: loss and every LoRA gradient, in float32 and float64.

Also: without factors that differ it is the base model, a memory option changes no bit of the result, and gradients are
those of finite differences through the whole model.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from finetune.model.lora import LoraSpec
from finetune.model.model import TrainModel
from finetune.model.terms import ROWS
from finetune.ops.cross_entropy import linear_cross_entropy
from finetune.packed import Packed
from quant.formats import GGMLType
from tests.finetune.model.builders import pack, plain, some_samples
from tests.finetune.model.conftest import Opener
from tests.tiny_models import write_tiny_gguf

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


def run(model: TrainModel, micro_batches: Sequence[Packed], seed: int = 0) -> tuple[float, dict[str, torch.Tensor]]:
    """The step's loss, and gradients added up over its micro-batches."""
    normalizer = float(sum(packed.loss_weights.sum(dtype=np.float64) for packed in micro_batches))
    for factor in model.parameters().values():
        factor.grad = None
    total = 0.0
    for packed in micro_batches:
        loss = model.loss(packed, normalizer, dropout_seed=seed)
        loss.backward()
        total += loss.total.item()
    gradients = {}
    for name, factor in model.parameters().items():
        assert factor.grad is not None, name
        gradients[name] = factor.grad.clone()
    return total, gradients


def assert_equal(
    got: tuple[float, dict[str, torch.Tensor]], expected: tuple[float, dict[str, torch.Tensor]], tolerance: float
) -> None:
    assert got[0] == pytest.approx(expected[0], rel=tolerance)
    for name, gradient in expected[1].items():
        assert (got[1][name] - gradient).abs().max() <= tolerance * max(1.0, gradient.abs().max().item()), name


@pytest.mark.parametrize("kl", [False, True], ids=["ce", "kl"])
def test_rows_of_loss_that_are_filled_up_change_nothing(
    kl: bool, open_tiny: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = pack(some_samples(kl=kl), share=True)
    found = []
    for is_filled in (True, False):
        model, sizes = open_tiny(dtype=torch.float64), []
        if not is_filled:
            monkeypatch.setattr("finetune.model.model.filled_up", lambda rows, multiple: rows)
        monkeypatch.setattr(
            "finetune.model.model.linear_cross_entropy",
            lambda hidden, *rest, sizes=sizes: (sizes.append(len(hidden)), linear_cross_entropy(hidden, *rest))[1],
        )
        found.append(run(model, [packed]))
        assert (sizes[0] % ROWS == 0) is is_filled
        assert len(model.logits(packed.token_ids[:5], [1, 2, 4])) == 3
    assert_equal(*found, TOLERANCE[torch.float64])


@pytest.mark.parametrize("kl", [False, True], ids=["ce", "kl"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_packed_accumulated_and_plain_agree(dtype: torch.dtype, kl: bool, open_tiny: Opener) -> None:
    model, samples = open_tiny(dtype=dtype), some_samples(kl=kl)
    one_by_one = run(model, [pack([sample], share=False) for sample in samples])
    assert one_by_one[0] > 0.1
    for micro_batches in (
        [pack(samples, share=True)],
        [pack(samples, share=False)],
        [pack(samples[:3], share=True), pack(samples[3:], share=True)],
    ):
        assert_equal(run(model, micro_batches), one_by_one, TOLERANCE[dtype])


@pytest.mark.parametrize(
    "options", [("checkpointing",), ("checkpointing", "offload"), ("cache_weights",)], ids="+".join
)
def test_memory_options_change_no_bit(options: tuple[str, ...], open_tiny: Opener) -> None:
    packed = pack(some_samples(kl=True), share=True)
    longer = plain(range(70))  # another micro-batch, of another length
    expected = run(open_tiny(dtype=torch.bfloat16), [packed, longer, packed])
    chosen = open_tiny(dtype=torch.bfloat16, **dict.fromkeys(options, True))
    assert_equal(run(chosen, [packed, longer, packed]), expected, 0.0)


def test_the_inputs_of_one_micro_batch_are_not_anothers(open_tiny: Opener) -> None:
    model = open_tiny(checkpointing=True)
    first = model.loss(plain(range(9)), 1.0)
    model.loss(plain(range(9)), 1.0)
    with pytest.raises(AssertionError, match="another forward pass came before"):
        first.backward()
    with pytest.raises(ValueError, match="offload is of checkpointing"):
        open_tiny(offload=True)


@pytest.mark.parametrize("upcast", [True, False])
def test_bfloat16_is_near(upcast: bool, open_tiny: Opener) -> None:
    packed = pack(some_samples(), share=True)
    exact = run(open_tiny(), [packed])
    loss, gradients = run(open_tiny(dtype=torch.bfloat16, upcast=upcast), [packed])
    assert loss == pytest.approx(exact[0], rel=5e-3)
    errors = torch.stack([(gradients[name] - gradient).norm() for name, gradient in exact[1].items()])
    sizes = torch.stack([gradient.norm() for gradient in exact[1].values()])
    assert errors.norm() < 0.05 * sizes.norm()


def test_per_row_losses_are_in_the_packed_order(open_tiny: Opener) -> None:
    model, samples = open_tiny(), some_samples()
    packed = model.loss(pack(samples, share=True), 1.0).per_row
    alone = torch.cat([model.loss(pack([sample], share=False), 1.0).per_row for sample in samples])
    torch.testing.assert_close(packed, alone, rtol=1e-12, atol=1e-12)
    weights = torch.from_numpy(pack(samples, share=True).loss_weights).double()
    loss = model.loss(pack(samples, share=True), 2.0)
    assert loss.ce_sum == pytest.approx(float(weights @ packed))
    assert loss.total.item() == pytest.approx(loss.ce_sum / 2)


def test_kl_to_itself_is_nothing(tiny_gguf: Path) -> None:
    """A fresh adapter (B = 0) is the base."""
    model = TrainModel.open(tiny_gguf, LoraSpec(), dtype=torch.float64)
    samples = [s for s in some_samples(kl=True) if s.kl]
    loss = model.loss(pack(samples, share=True), 1.0)
    loss.backward()
    assert loss.per_row.abs().max() < 1e-12
    assert all(p.grad is not None and p.grad.abs().max() < 1e-12 for p in model.parameters().values())


def test_logits_give_the_loss(open_tiny: Opener) -> None:
    model, ids = open_tiny(), np.random.default_rng(2).integers(0, 384, 20)
    logits = model.logits(ids, range(19))
    expected = torch.nn.functional.cross_entropy(logits, torch.from_numpy(ids[1:]), reduction="none")
    torch.testing.assert_close(model.loss(plain(ids.tolist()), 1.0).per_row, expected)


def test_nothing_to_learn_is_a_loss_of_zero(open_tiny: Opener) -> None:
    model = open_tiny()
    loss = model.loss(plain([1, 2, 3], first_loss=3), 5.0)
    loss.backward()
    assert (loss.ce_sum, loss.total.item(), loss.per_row.shape) == (0.0, 0.0, (0,))
    with pytest.raises(ValueError, match="normalizer is 0"):
        model.loss(plain([1, 2, 3]), 0.0)


def test_dropout_is_keyed_by_its_seed(open_tiny: Opener) -> None:
    model, packed = open_tiny(spec=LoraSpec(rank=4, dropout=0.3), checkpointing=True), plain(range(30))
    first, again, other = run(model, [packed], 1), run(model, [packed], 1), run(model, [packed], 2)
    assert_equal(first, again, 0.0)
    assert first[0] != other[0]
    without = open_tiny(spec=LoraSpec(rank=4, dropout=0.3))
    assert_equal(run(without, [packed], 1), first, 1e-12)


SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"architecture": "qwen2"},
    "qwen3": {"architecture": "qwen3", "head_dim": 4},
    "untied": {"tie": False, "linear_type": GGMLType.Q8_0},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_gradcheck_of_the_whole_model(shape: str, open_tiny: Opener, tmp_path: Path) -> None:
    sizes = {"hidden": 32, "heads": 4, "kv_heads": 2, "ffn": 32, "layers": 2, "vocab_size": 384}
    path = write_tiny_gguf(tmp_path / "tiny.gguf", **(sizes | SHAPES[shape]))
    model = open_tiny(path, spec=LoraSpec(rank=2, alpha=4, rank_pattern={"k_proj": 1}))
    packed = pack(some_samples(kl=True)[:4], share=True)
    factors = [model.parameters()[name] for name in sorted(model.parameters())]
    generator = np.random.default_rng(0)
    (total := model.loss(packed, 3.0).total).backward()
    assert total.item() > 0
    for _ in range(4):  # along random directions: a gradient's worth in one number
        direction = [torch.from_numpy(generator.standard_normal(f.shape)) for f in factors]
        slope = sum(float((f.grad * d).sum()) for f, d in zip(factors, direction, strict=True) if f.grad is not None)
        values = []
        for step in (2e-6, -2e-6):
            with torch.no_grad():
                for factor, d in zip(factors, direction, strict=True):
                    factor.add_(d, alpha=step)
                values.append(model.loss(packed, 3.0).total.item())
                for factor, d in zip(factors, direction, strict=True):
                    factor.add_(d, alpha=-step)
        assert (values[0] - values[1]) / 4e-6 == pytest.approx(slope, rel=1e-6, abs=1e-8)
