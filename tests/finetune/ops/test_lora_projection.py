"""Fused LoRA projections agree with separate ones under autograd, for every prologue; and with finite differences."""

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F

from finetune.ops.lora_projection import LoraPart, Projection, project
from finetune.ops.prologues import Norm, Plain, Prologue, Swiglu

T, IN = 6, 10
PARTS = (LoraPart(0, 8, 2.0), LoraPart(8, 12, 0.5), LoraPart(16, 20, 1.5))
"""Rows 12 to 15 belong to a projection without LoRA."""
RANKS = (3, 2, 4)


def make(
    prologue: Prologue, parts: tuple[LoraPart, ...], dtype: torch.dtype, *, bias: bool = False, dropout: bool = False
) -> tuple[torch.Tensor, Projection, list[torch.Tensor]]:
    torch.manual_seed(0)
    source = torch.randn(T, 2 * IN if isinstance(prologue, Swiglu) else IN, dtype=dtype, requires_grad=True)
    weight = torch.randn(20, IN, dtype=dtype)
    factors = []
    for part, rank in zip(parts, RANKS, strict=False):
        factors += [torch.randn(rank, IN, dtype=dtype), torch.randn(part.end - part.start, rank, dtype=dtype)]
    for factor in factors:
        factor.requires_grad_()
    mask = (torch.rand(T, IN) < 0.5).to(dtype) * 2 if dropout else None
    given = torch.randn(20, dtype=dtype) if bias else None
    masked = None if mask is None else lambda _: mask
    return source, Projection(lambda: weight, given, prologue, parts, masked), factors


def slow(source: torch.Tensor, projection: Projection, factors: Sequence[torch.Tensor]) -> torch.Tensor:
    prologue, x = projection.prologue, source
    if isinstance(prologue, Norm):
        x = prologue.weight * x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + prologue.eps)
    elif isinstance(prologue, Swiglu):
        x = F.silu(x[:, :IN]) * x[:, IN:]
    y = x @ projection.weight().t()
    if projection.bias is not None:
        y = y + projection.bias
    dropped = x if projection.dropout is None else x * projection.dropout(x)
    for part, a, b in zip(projection.parts, factors[0::2], factors[1::2], strict=True):
        y = y + F.pad(part.scale * dropped @ a.t() @ b.t(), (part.start, 20 - part.end))
    return y


def norm(dtype: torch.dtype = torch.float64) -> Norm:
    return Norm(torch.linspace(0.5, 1.5, IN, dtype=dtype), 1e-5, dtype)


PROLOGUES = {"plain": Plain(), "norm": norm(), "swiglu": Swiglu()}
OPTIONS = [{}, {"bias": True}, {"dropout": True}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("parts", [PARTS, PARTS[:1], ()], ids=len)
@pytest.mark.parametrize("prologue", PROLOGUES)
def test_equals_separate_projections(prologue: str, parts: tuple[LoraPart, ...], options: dict[str, bool]) -> None:
    source, projection, factors = make(PROLOGUES[prologue], parts, torch.float64, **options)
    grad = torch.randn(T, 20, dtype=torch.float64)
    inputs = [source, *factors]
    y, expected = project(source, projection, factors), slow(source, projection, factors)
    torch.testing.assert_close(y, expected)
    ours, theirs = torch.autograd.grad(y, inputs, grad), torch.autograd.grad(expected, inputs, grad)
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize("prologue", PROLOGUES)
def test_gradcheck(prologue: str) -> None:
    source, projection, factors = make(PROLOGUES[prologue], PARTS, torch.float64)
    assert torch.autograd.gradcheck(lambda source, *f: project(source, projection, f), (source, *factors))


def test_the_weight_may_be_overwritten_between_forward_and_backward() -> None:
    """Nothing holds on to the shared buffer."""
    source, projection, factors = make(Plain(), PARTS, torch.float64)
    original, buffer = projection.weight().clone(), torch.empty(20, IN, dtype=torch.float64)
    shared = Projection(lambda: buffer.copy_(original), None, Plain(), PARTS)
    y = project(source, shared, factors)
    buffer.fill_(torch.nan)
    (got,) = torch.autograd.grad(y.sum(), [source])
    (expected,) = torch.autograd.grad(slow(source, projection, factors).sum(), [source])
    torch.testing.assert_close(got, expected)


def test_factors_stay_float32_beside_bfloat16() -> None:
    source, projection, factors = make(norm(torch.float32), PARTS, torch.float32)
    exact = torch.autograd.grad(slow(source, projection, factors).square().sum(), factors)
    half = torch.randn(20, IN)
    half.copy_(projection.weight())
    narrow = Norm(torch.linspace(0.5, 1.5, IN), 1e-5, torch.bfloat16)
    given = Projection(lambda: half.bfloat16(), None, narrow, PARTS)
    y = project(source, given, factors)
    assert y.dtype == torch.bfloat16
    for grad, expected in zip(torch.autograd.grad(y.float().square().sum(), factors), exact, strict=True):
        assert grad.dtype == torch.float32
        assert (grad - expected).norm() < 0.02 * expected.norm()  # a few roundings of 2^-9 each


def test_the_first_layer_needs_no_gradient_of_its_input() -> None:
    source, projection, factors = make(norm(), PARTS, torch.float64)
    grads = torch.autograd.grad(project(source.detach(), projection, factors).sum(), factors)
    expected = torch.autograd.grad(slow(source.detach(), projection, factors).sum(), factors)
    for own, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(own, other)
