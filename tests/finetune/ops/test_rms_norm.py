"""RMSNorm agrees with its definition under autograd, and its gradient with finite differences."""

import pytest
import torch

from finetune.ops.rms_norm import rms_norm

EPS = 1e-5


def slow(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + EPS)


def test_equals_the_definition() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(5, 3, 16, requires_grad=True), torch.randn(16)
    twin = x.detach().clone().requires_grad_()
    grad = torch.randn(5, 3, 16)
    y, expected = rms_norm(x, weight, EPS), slow(twin, weight)
    torch.testing.assert_close(y, expected)
    y.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(x.grad, twin.grad)


def test_gradcheck() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, weight, EPS), (x,))
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight, EPS), (x, weight.requires_grad_()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_narrow_inputs_are_summed_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(3, 512).to(dtype), torch.ones(512)
    expected = slow(x.double(), weight.double())
    y = rms_norm(x, weight, EPS)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_a_row_of_zeros_has_a_gradient() -> None:
    x = torch.zeros(1, 4, requires_grad=True)
    rms_norm(x, torch.ones(4), EPS).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.full((1, 4), EPS**-0.5))
