"""The roundings are those of the files and of the kernels, bit for bit."""

import gguf
import numpy as np
import pytest
import torch

import _sterna
import quant.ternary as numpy_ternary
from finetune.errors import TrainingError
from finetune.qat.quantizers import Ternary, activations, q4_0, q8_0, ternary, ternary_parts
from quant.formats import GGMLType
from quant.quantize import quantize


def some_weights(rows: int = 6, columns: int = 512, seed: int = 0) -> torch.Tensor:
    """A block of zeros, ties, an outlier and tiny values among them."""
    weights = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02
    weights[1, :256] = 0
    weights[2, :32] = torch.tensor([0.5, -0.5, 0.25, 1.0]).repeat(8)
    weights[3, 7] = 3.0
    weights[4, 256:] *= 1e-7
    return weights


@pytest.mark.parametrize("kind", [GGMLType.Q8_0, GGMLType.Q4_0])
def test_embedding_types(kind: GGMLType) -> None:
    weights = some_weights()
    blocks = quantize(weights.numpy().reshape(-1).view(np.uint8), GGMLType.F32, kind)
    expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType(int(kind))).reshape(weights.shape)
    found = (q8_0 if kind is GGMLType.Q8_0 else q4_0)(weights)
    assert np.array_equal(found.numpy(), expected)


def test_absmax_in_groups_of_256_is_tq2_0() -> None:
    weights = some_weights()
    kind = gguf.GGMLQuantizationType.TQ2_0
    expected = gguf.quants.dequantize(gguf.quants.quantize(weights.numpy(), kind), kind)
    assert np.array_equal(ternary(weights, Ternary("absmax", 256)).numpy(), expected)


def test_absmean_is_bitnet_s() -> None:
    """By its definition, in float64; the scale is then an f16."""
    weights = some_weights()
    scale = weights.double().abs().mean()
    codes, scales = ternary_parts(weights, Ternary("absmean"))
    assert torch.equal(codes.double().view_as(weights), (weights.double() / scale).round().clamp(-1, 1))
    assert scales.item() == scale.half().item()


@pytest.mark.parametrize("group", [64, 128, 256])
def test_absmax_is_that_of_files(group: int) -> None:
    weights = some_weights()
    codes, scales = numpy_ternary.absmax(weights.numpy(), group)
    found, halves = ternary_parts(weights, Ternary("absmax", group))
    assert np.array_equal(found.numpy().reshape(codes.shape), codes)
    assert np.array_equal(halves.numpy().reshape(scales.shape), scales.astype(np.float16).astype(np.float32))


def test_absmean_is_that_of_files() -> None:
    weights = some_weights(seed=1)
    scale = numpy_ternary.absmean_scale(float(np.abs(weights.double().numpy()).sum()), weights.numel())
    found, halves = ternary_parts(weights, Ternary("absmean"))
    assert np.array_equal(found.numpy().reshape(weights.shape), numpy_ternary.absmean(weights.numpy(), scale))
    assert halves.item() == np.float16(scale)


@pytest.mark.parametrize("group", [64, 128, 256])
def test_absmean_in_groups(group: int) -> None:
    weights = some_weights()
    found = ternary(weights, Ternary("absmean", group))
    for row, expected in zip(weights.view(-1, group), found.view(-1, group), strict=True):
        scale = row.abs().mean().clamp(min=1e-5)
        assert torch.equal((row * (1 / scale)).round().clamp(-1, 1) * scale.half().float(), expected)
    assert not found[1, :256].any()


@pytest.mark.parametrize("isa", _sterna.available_isas())
def test_activations_are_the_kernels(isa: str) -> None:
    x = 3 * some_weights(7, 256, seed=1)
    codes, scales = _sterna.quantize_activations(x.numpy(), isa)
    expected = (codes.reshape(7, -1, 32) * scales.reshape(7, -1, 1)).reshape(7, 256)
    assert np.array_equal(activations(x).numpy(), expected)
    rest = x.numpy() - expected
    codes, scales = _sterna.quantize_activations(rest, isa)
    twice = expected + (codes.reshape(7, -1, 32) * scales.reshape(7, -1, 1)).reshape(7, 256)
    assert np.array_equal(activations(x, 2).numpy(), twice)
    assert np.abs(twice - x.numpy()).max() < np.abs(x.numpy()).max() / 127**2


@pytest.mark.parametrize(
    ("rule", "group", "message"),
    [("absmax", None, "needs a group"), ("absmean", 100, "accepted are 64, 128, 256"), ("mean", None, "'mean'")],
)
def test_what_is_no_ternary(rule: str, group: int | None, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        Ternary(rule, group)  # type: ignore[arg-type]
