"""RoPE equals rotation by complex numbers, turns back, and leaves what is behind rope_dim alone."""

import pytest
import torch

from finetune.ops.rope import rope_angles, rotate

POSITIONS = torch.tensor([0, 1, 5, 2, 3])


def angles(rope_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    return rope_angles(POSITIONS, theta=10000.0, rope_dim=rope_dim, factors=None, dtype=torch.float64)


def slow(x: torch.Tensor, rope_dim: int) -> torch.Tensor:
    half = rope_dim // 2
    turn = torch.polar(
        torch.ones(len(POSITIONS), half, dtype=torch.float64),
        POSITIONS[:, None] * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half),
    )
    turned = torch.complex(x[..., :half], x[..., half:rope_dim]) * turn
    return torch.cat([turned.real, turned.imag, x[..., rope_dim:]], -1)


@pytest.mark.parametrize("rope_dim", [8, 6])
def test_equals_complex_rotation_and_turns_back(rope_dim: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    turned = rotate(x.clone(), *angles(rope_dim))
    torch.testing.assert_close(turned, slow(x, rope_dim))
    torch.testing.assert_close(rotate(turned, *angles(rope_dim), inverse=True), x)


def test_the_inverse_is_the_gradient() -> None:
    x = torch.randn(5, 8, dtype=torch.float64)
    grad = torch.randn(5, 8, dtype=torch.float64)
    expected = torch.autograd.functional.vjp(lambda x: slow(x, 6), x, grad)[1]
    torch.testing.assert_close(rotate(grad.clone(), *angles(6), inverse=True), expected)


def test_factors_divide_the_frequencies() -> None:
    cos, _ = rope_angles(POSITIONS, theta=100.0, rope_dim=4, factors=(2.0, 8.0), dtype=torch.float64)
    expected = torch.stack([torch.cos(POSITIONS.double() / 2), torch.cos(POSITIONS.double() / 10 / 8)], -1)
    torch.testing.assert_close(cos, expected)
