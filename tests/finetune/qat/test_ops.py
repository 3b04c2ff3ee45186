"""Every hand-written backward by finite differences where nothing is rounded, and straight through where it is."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from finetune.ops.rms_norm import rms_norm
from finetune.qat.ops import Rounding, embed, linear, norm_rounded, rounded, swiglu_rounded
from finetune.qat.quantizers import Ternary, activations, q8_0, ternary
from finetune.qat.streams import Streams

PLAIN = Rounding(torch.float64, passes=0)
EPS = 1e-5


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()


def through(x: Tensor, value: Tensor) -> Tensor:
    """`value` going forward, x going back: straight through, by its definition."""
    return x + (value - x).detach()


def same_gradients(fast: Tensor, slow: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(fast, slow)
    grad = draw(*fast.shape, seed=9).detach()
    torch.testing.assert_close(
        torch.autograd.grad(fast, inputs, grad), torch.autograd.grad(slow, inputs, grad), rtol=1e-9, atol=1e-12
    )


def test_gradcheck() -> None:
    assert gradcheck(lambda x, weight: norm_rounded(x, weight, EPS, PLAIN), (draw(3, 8), draw(8, seed=1)))
    assert gradcheck(lambda x: swiglu_rounded(x, PLAIN), (draw(3, 8),))
    assert gradcheck(lambda x: rounded(x, PLAIN), (draw(3, 8),))
    # Values are constants to autograd; made anew from the shadows at each call they follow them.
    two = (draw(3, 8), draw(4, 8, seed=1), draw(2, 8, seed=2))
    assert gradcheck(lambda x, a, b: linear(x, torch.cat([a, b]).detach(), a, b), two)
    ids = torch.tensor([2, 0, 2])
    assert gradcheck(lambda table: embed(table, table.detach(), ids), (draw(5, 4),))


@pytest.mark.parametrize("rows", [None, torch.tensor([0, 2])])
def test_gradcheck_of_the_streams(rows: Tensor | None) -> None:
    def two_sublayers(x: Tensor, numbers: Tensor) -> Tensor:
        streams = Streams(x, 2)
        streams.add(numbers[0], lambda h: torch.sin(h))
        streams.add(numbers[1], lambda h: torch.cos(h) if rows is None else torch.cos(h)[rows], rows)
        return streams.mean()

    assert gradcheck(two_sublayers, (draw(3, 4), draw(2, 5, seed=1)))


def test_streams_are_their_definition() -> None:
    x, numbers = draw(3, 4).detach(), draw(5, seed=1).detach()
    alpha, pre0, pre1, post0, post1 = numbers
    streams = Streams(x, 2)
    s0, s1 = x, x
    for _ in range(3):
        streams.add(numbers, torch.sin)
        y, m = torch.sin(pre0 * s0 + pre1 * s1), torch.sigmoid(alpha)
        s0, s1 = m * s0 + (1 - m) * s1 + post0 * y, (1 - m) * s0 + m * s1 + post1 * y
    torch.testing.assert_close(streams.mean(), (s0 + s1) / 2)


@pytest.mark.parametrize("passes", [1, 2])
def test_rounding_is_straight_through(passes: int) -> None:
    rounding = Rounding(torch.float64, passes)
    x, weight = draw(5, 64), draw(64, seed=1)

    def slow(y: Tensor) -> Tensor:
        return through(y, activations(y.detach(), passes))

    same_gradients(rounded(x, rounding), slow(x), [x])
    gate, up = x.chunk(2, dim=-1)
    same_gradients(swiglu_rounded(x, rounding), slow(torch.nn.functional.silu(gate) * up), [x])
    normed = rms_norm(x, weight, EPS)
    same_gradients(norm_rounded(x, weight, EPS, rounding), slow(normed), [x, weight])


@pytest.mark.parametrize(
    "quantizer", [lambda w: ternary(w, Ternary()), lambda w: ternary(w, Ternary("absmax", 64)), q8_0]
)
def test_weights_are_straight_through(quantizer: Callable[[Tensor], Tensor]) -> None:
    x, a, b = draw(5, 64), draw(4, 64, seed=1), draw(3, 64, seed=2)
    values = [quantizer(weight.detach()) for weight in (a, b)]
    slow = torch.cat([x @ through(a, values[0]).t(), x @ through(b, values[1]).t()], 1)
    same_gradients(linear(x, torch.cat(values), a, b), slow, [x, a, b])
    ids = torch.tensor([3, 1, 3, 0])
    same_gradients(embed(a, values[0], ids), through(a, values[0])[ids], [a])


def test_gradients_of_parameters_have_their_type() -> None:
    x, shadow = draw(5, 64).detach().bfloat16().requires_grad_(), draw(4, 64, seed=1).detach().float().requires_grad_()
    linear(x, shadow.detach().bfloat16(), shadow).sum().backward()
    assert shadow.grad is not None
    assert x.grad is not None
    assert (shadow.grad.dtype, x.grad.dtype) == (torch.float32, torch.bfloat16)
