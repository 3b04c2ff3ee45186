"""The whole model: the slow twin's loss and gradients, finite differences in float64, weights rounded once a step."""

from typing import Any

import pytest
import torch
from torch import Tensor

from finetune.errors import TrainingError
from finetune.qat.model import Objective, QatModel
from finetune.qat.quantizers import Ternary
from finetune.qat.shape import Shape
from tests.finetune.model.builders import pack, plain, some_samples
from tests.finetune.qat.slow_model import SlowModel

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "untied, Q4_0, groups": {"tie_embeddings": False, "embedding_type": "q4_0", "ternary": Ternary("absmax", 64)},
    "two streams": {"residual_streams": 2, "num_kv_heads": 1, "ternary": Ternary("absmean", 256)},
}


def make(name: str = "plain", **options: Any) -> QatModel:
    """Weights larger than at the start, so that nothing is near the identity."""
    shape = Shape(vocab_size=384, num_layers=2, intermediate_size=256, **SHAPES[name])
    model = QatModel(shape, **{"dtype": torch.float64, **options})
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in model.parameters().values():
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.add_((0.06 if tensor.ndim == 2 else 0.2) * noise)
    return model


def gradients(model: QatModel) -> dict[str, Tensor]:
    found = {}
    for name, tensor in model.parameters().items():
        assert tensor.grad is not None, name
        found[name], tensor.grad = tensor.grad, None
    return found


@pytest.mark.parametrize("is_quantized", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_the_slow_twin_agrees(name: str, is_quantized: bool) -> None:
    model, packed = make(name, is_quantized=is_quantized), pack(some_samples(), share=True)
    loss = model.loss(packed, 7.0)
    loss.total.backward()
    found = gradients(model)
    twin = SlowModel(model.shape, model.parameters(), is_quantized=is_quantized)
    expected = twin.loss(packed)
    (expected / 7.0).backward()
    assert loss.ce_sum == pytest.approx(expected.item(), rel=1e-12)
    for key, gradient in gradients(model).items():
        assert torch.allclose(found[key], gradient, rtol=1e-9, atol=1e-12 * float(gradient.abs().max())), key


@pytest.mark.parametrize("name", ["plain", "two streams"])
def test_gradients_are_finite_differences(name: str) -> None:
    """Without the roundings, whose steps have no derivative: along one random direction of each parameter."""
    model, packed = make(name, is_quantized=False), pack(some_samples(), share=True)
    objective = Objective(entropy_weight=0.1)
    model.loss(packed, 3.0, objective).total.backward()
    found = gradients(model)
    generator = torch.Generator().manual_seed(4)

    def value() -> float:
        with torch.no_grad():
            return model.loss(packed, 3.0, objective).total.item()

    for key, tensor in model.parameters().items():
        direction = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        step = 1e-5 / float(direction.norm())
        with torch.no_grad():
            tensor.add_(direction, alpha=step)
            above = value()
            tensor.sub_(direction, alpha=2 * step)
            below = value()
            tensor.add_(direction, alpha=step)
        slope = torch.dot(found[key].flatten(), direction.flatten()).item()
        assert (above - below) / (2 * step) == pytest.approx(slope, rel=1e-4, abs=1e-7), key


def test_weights_are_rounded_once_a_step() -> None:
    model, packed = make(), plain([1, 2, 3, 4])
    before = model.weights.values()
    model.loss(packed, 1.0).total.backward()
    model.loss(packed, 1.0).total.backward()
    assert model.weights.values() is before
    with torch.no_grad():
        model.parameters()["blk.0.attn_q.weight"].mul_(2)
    assert model.weights.values() is not before
    half = model.weights.served("blk.0.ffn_up.weight")
    model.weights.share = 0.0
    shadow = model.parameters()["blk.0.ffn_up.weight"]
    assert torch.equal(model.weights.served("blk.0.ffn_up.weight"), shadow.detach())
    model.weights.share = 0.5
    blend = model.weights.served("blk.0.ffn_up.weight")
    torch.testing.assert_close(blend, (half + shadow.detach()) / 2)


def test_a_model_that_teaches_itself_has_nothing_to_learn() -> None:
    teacher, packed = make("untied, Q4_0, groups"), pack(some_samples(), share=True)
    model = make("untied, Q4_0, groups")
    loss = model.loss(packed, 1.0, Objective(distillation=1.0), teacher)
    assert loss.value == pytest.approx(0.0, abs=1e-9)
    half = model.loss(packed, 1.0, Objective(distillation=0.5), teacher)
    assert half.value == pytest.approx(loss.ce_sum / 2)
    assert half.ce_sum == pytest.approx(loss.ce_sum)


def test_held_out_measures() -> None:
    model, packed = make(), pack(some_samples(), share=True)
    found, loss = model.measure(packed), model.loss(packed, 1.0)
    assert (found.ce_sum, found.entropy_sum) == pytest.approx((loss.ce_sum, loss.entropy_sum))
    top = SlowModel(model.shape, model.parameters(), is_quantized=True).logits(packed).argmax(1).numpy()
    right = (top[packed.loss_rows] == packed.loss_targets) * packed.loss_weights
    assert found.num_right == pytest.approx(right.sum())


def test_shapes_that_fit_nothing() -> None:
    with pytest.raises(TrainingError, match=r"hidden_size is 100.*num_kv_heads is 3.*residual_streams is 5"):
        Shape(vocab_size=10, hidden_size=100, num_kv_heads=3, residual_streams=5)
