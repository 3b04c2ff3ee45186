"""What a served model rounds, as float tensors with the rounded values: weights of every exported type, activations.

Ternary weights are {-1, 0, 1} times one scale for the tensor (absmean: the mean magnitude, arXiv:2402.17764) or one a
group of a row (absmax: the largest; absmean too), with the codes of quant/ternary.py; scales are f16, as GGUF's blocks
hold them. Embedding and head follow Q8_0 and Q4_0, bit for bit as quant/quantize.py. Activations are int8 in blocks of
32, as quant/kernels/elementwise.inc makes them, or the same twice, as the engine does for the last layer's gate and up.
Here is no gradient: all of these are used straight through (ops.py), which means that the gradient of the rounded value
is taken for that of the value.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from finetune.errors import TrainingError

Rule = Literal["absmean", "absmax"]
GROUPS = (64, 128, 256)
BLOCK = 32
"""Of activations, and of Q8_0 and Q4_0."""
MIN_ABSMEAN = 1e-5
_SMALLEST = 2.0**-127
"""Scales below it have no float32 inverse."""


@dataclass(frozen=True)
class Ternary:
    """How weights become ternary. `group`: weights of a row that share a scale; None: the whole tensor does."""

    rule: Rule = "absmean"
    group: int | None = None

    def __post_init__(self) -> None:
        if self.rule not in ("absmean", "absmax"):
            raise TrainingError(f"the ternary rule is {self.rule!r}, accepted are absmean and absmax")
        if self.group is not None and self.group not in GROUPS:
            raise TrainingError(f"the ternary group is {self.group}, accepted are 64, 128, 256 and none (the tensor)")
        if self.rule == "absmax" and self.group is None:
            raise TrainingError("absmax needs a group of 64, 128 or 256: one outlier would silence a whole tensor")


def ternary_parts(weight: Tensor, how: Ternary) -> tuple[Tensor, Tensor]:
    """Codes in {-1, 0, 1} (groups, size) and scales (groups, 1), both in weight's type; scales are f16's values.

    A group of zeros has scale 0. Raises nothing: what is not finite stays so.
    """
    groups = weight.reshape(1, -1) if how.group is None else weight.reshape(-1, how.group)
    magnitude = groups.abs()
    if how.rule == "absmean":  # halves to even, as BitNet's
        exact = magnitude.mean(1, keepdim=True).clamp_(min=MIN_ABSMEAN)
        return (groups * (1 / exact)).round_().clamp_(-1, 1), _as_half(exact)
    exact = magnitude.amax(1, keepdim=True)  # halves away from zero, as TQ2_0's
    is_one = (magnitude * _inverse(exact)) >= 0.5
    return groups.sign().mul_(is_one), _as_half(exact)


def ternary(weight: Tensor, how: Ternary) -> Tensor:
    """The weights as they are served."""
    codes, scales = ternary_parts(weight, how)
    return codes.mul_(scales).view(weight.shape)


def q8_0(weight: Tensor) -> Tensor:
    blocks = weight.reshape(-1, BLOCK)
    scales = blocks.abs().amax(1, keepdim=True) / 127
    scaled = blocks * _inverse(scales)
    return _half_away(scaled).mul_(_as_half(scales)).view(weight.shape)


def q4_0(weight: Tensor) -> Tensor:
    blocks = weight.reshape(-1, BLOCK)
    extreme = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    scales = extreme / -8
    nibbles = (blocks * _inverse(scales)).add_(8.5).floor_().clamp_(max=15)
    return nibbles.sub_(8).mul_(_as_half(scales)).view(weight.shape)


def activations(x: Tensor, passes: int = 1) -> Tensor:
    """x (..., C) as int8 codes times a scale for each 32, half to even; `passes` 2: and their error once more."""
    rounded = _int8(x)
    return rounded if passes == 1 else rounded.add_(_int8(x - rounded))


def _int8(x: Tensor) -> Tensor:
    blocks = x.unflatten(-1, (-1, BLOCK))
    largest = torch.maximum(blocks.amax(-1, keepdim=True), -blocks.amin(-1, keepdim=True))
    inverse = torch.where(largest > 0, 127 / largest, 0.0)
    return torch.mul(blocks, inverse).round_().mul_(largest * (1 / 127)).flatten(-2)


def _inverse(scales: Tensor) -> Tensor:
    return torch.where(scales.abs() >= _SMALLEST, 1 / scales, 0.0)


def _as_half(scales: Tensor) -> Tensor:
    return scales.half().to(scales.dtype)


def _half_away(x: Tensor) -> Tensor:
    """Rounded, halves away from zero. floor(|x| + 0.5) would be wrong just below a half."""
    magnitude = x.abs()
    whole = magnitude.floor()
    return torch.copysign(whole.add_((magnitude - whole >= 0.5).to(x.dtype)), x)
