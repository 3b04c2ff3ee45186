"""First weights that copy: an induction circuit of ternary matrices, so that training need not find it.

What a call quotes has to be copied from the prompt. The circuit for that (Olsson et al. 2022, arXiv:2209.11895) takes
training from random weights longer than the shipped model's whole run: after 16 M tokens it repeated 0 % of random
tokens, with a quarter of the training spent on just that 3 %. Written down it repeats 92 % before the first step (at
least 80 %: tests/finetune/qat/test_induction.py).

The residual stream has two halves. The first holds the token, the second a constant direction. In layer 0 half of the
heads attend to the previous token and half to the one before it: queries and keys see the constant alone, keys turned
so that rotary position makes the score highest one or two positions back; a sketch of what they find goes to a quarter
of the stream each. Layer 1 compares the own token's sketch and the previous one's with those, and adds the token that
it finds to the first half, by the transposed matrix that read it. Sketches are products with random ternary matrices.
Two tokens are compared because there are ten digits, and one alone has stood in too many places; of repeated random
digits over 60 % are right. Other layers begin as ever, and all of it is trained. After Trockman and Kolter's "mimetic"
first weights (arXiv:2305.09828). Not here: what else begins (weights.py).
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from finetune.errors import TrainingError
from finetune.qat.quantizers import ternary
from finetune.qat.shape import Shape
from quant.tensor_rules import EMBEDDING

ROPE_THETA = 1e6
"""So that most of a head's dimensions have hardly turned after 150 positions; at 1e4 sketches no longer match."""
_TOKEN, _CONSTANT = 0.03, 0.06
"""Of the embedding's halves. At 0.03 for the constant layer 0 looks around, and 65 % are repeated."""
_LOOK_BACK, _READ, _KEEP, _MATCH, _COPY = 0.1, 0.05, 0.06, 0.5, 0.4
_SLOW = 10
"""Rotary frequencies from here on turn little enough to compare by."""
_TURNED = 8
_EIGHTHS = tuple(math.pi / 4 * number for number in range(-3, 5))
"""Angles that pairs of ternary weights have."""


@dataclass(frozen=True, eq=False)
class _Layer:
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor


def begin_with_induction(shape: Shape, parameters: Mapping[str, Tensor], *, seed: int) -> None:
    """Overwrites the embedding and the attention of layers 0 and 1. Raises TrainingError for a shape without room."""
    for is_wrong, what in (
        (shape.num_layers < 2, f"two layers, not {shape.num_layers}"),
        (shape.residual_streams != 1, f"one residual stream, not {shape.residual_streams}"),
        (shape.num_kv_heads % 2, f"an even number of key heads, not {shape.num_kv_heads}"),
        (not shape.tie_embeddings, "the embedding as the output head (tie_embeddings)"),
    ):
        if is_wrong:
            raise TrainingError(f"to begin with induction takes {what}")
    generator = torch.Generator().manual_seed(seed)

    def drawn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    half, quarter = shape.hidden_size // 2, shape.hidden_size // 4
    first, second, constant = _layer(parameters, 0), _layer(parameters, 1), drawn(half).sign()
    with torch.no_grad():
        embedding = parameters[EMBEDDING]
        embedding[:, :half] = _TOKEN * drawn(len(embedding), half)
        embedding[:, half:] = _CONSTANT * constant
        _look_back(shape, first, constant)
        width = len(first.v) // 2
        first.v.zero_()[:, :half] = _READ * drawn(width, half).repeat(2, 1)
        keep, kept = _KEEP * drawn(quarter, width), torch.zeros(half, 2 * width)
        kept[:quarter, :width] = kept[quarter:, width:] = keep
        first.o.zero_()[half:] = _for_each_query(shape, kept, dim=1)
        keys = drawn(len(second.k), half)
        for part in (slice(quarter), slice(quarter, None)):
            keys[:, part] -= torch.outer(keys[:, part] @ constant[part], constant[part]) / quarter
        keys[~_slow(shape).repeat(shape.num_kv_heads)] = 0
        second.k.zero_()[:, half:] = _MATCH * keys
        second.q.zero_()[:, : half + quarter] = _for_each_query(shape, _queries(shape, first, second), dim=0)
        read = drawn(len(second.v), half)
        second.v.zero_()[:, :half] = _READ * read
        second.o.zero_()[:half] = _for_each_query(shape, _COPY * read.t(), dim=1)


def circuit_names() -> tuple[str, ...]:
    """The tensors that `begin_with_induction` writes."""
    kinds = ("q", "k", "v", "output")
    return (EMBEDDING, *(f"blk.{index}.attn_{kind}.weight" for index in range(2) for kind in kinds))


def _layer(parameters: Mapping[str, Tensor], index: int) -> _Layer:
    return _Layer(*(parameters[f"blk.{index}.attn_{kind}.weight"] for kind in ("q", "k", "v", "output")))


def _look_back(shape: Shape, layer: _Layer, constant: Tensor) -> None:
    pairs, half = shape.head_dim // 2, shape.hidden_size // 2
    angles = np.zeros((3, pairs))
    for back in (1, 2):
        angles[back, :_TURNED] = _turns(ROPE_THETA ** -(np.arange(_TURNED) / pairs), back)
    rows = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    signs = torch.from_numpy(np.sign(rows) * (np.abs(rows) > 0.1)).to(constant.dtype)
    sides = torch.tensor([1, 2]).repeat_interleave(shape.num_kv_heads // 2)
    for weights, backs in ((layer.q, torch.zeros(shape.num_heads, dtype=torch.int64)), (layer.k, sides)):
        weights.zero_()[:, half:] = _LOOK_BACK * torch.outer(signs[backs].flatten(), constant)


def _turns(frequencies: np.ndarray, wanted: int) -> tuple[float, ...]:
    """Angles of the keys by pair, with which the score `wanted` positions back is furthest above all others."""
    back = np.arange(64)

    def margin(angles: tuple[float, ...]) -> float:
        score = np.cos(np.outer(frequencies, back) - np.array(angles)[:, None]).sum(0)
        return float(score[wanted] - np.delete(score, wanted).max())

    def distance(angle: float, frequency: float) -> float:
        return abs((angle - wanted * frequency + math.pi) % (2 * math.pi) - math.pi)

    near = [[angle for angle in _EIGHTHS if distance(angle, one) < 0.8] for one in frequencies]
    return max(itertools.product(*near), key=margin)


def _queries(shape: Shape, first: _Layer, second: _Layer) -> Tensor:
    """(key rows, 3/4 of the stream): the own token meets the sketches of previous ones, and the sketch of the previous
    token, as it stands, those of the ones before."""
    half, quarter = shape.hidden_size // 2, shape.hidden_size // 4
    keys = _served(shape, second.k)[:, half:]
    sketch = _served(shape, first.o)[half : half + quarter] @ _for_each_query(
        shape, _served(shape, first.v)[:, :half], dim=0
    )
    own = keys[:, :quarter] @ sketch
    own *= _MATCH / own[own != 0].std()
    return torch.cat([own, _MATCH * keys[:, quarter:].sign()], dim=1)


def _slow(shape: Shape) -> Tensor:
    pair = torch.arange(shape.head_dim // 2) >= _SLOW
    return torch.cat([pair, pair])


def _for_each_query(shape: Shape, heads: Tensor, dim: int) -> Tensor:
    """Key heads repeated for the query heads that share them."""
    return heads.unflatten(dim, (shape.num_kv_heads, shape.head_dim)).repeat_interleave(
        shape.num_heads // shape.num_kv_heads, dim=dim
    ).flatten(dim, dim + 1)  # fmt: skip


def _served(shape: Shape, weights: Tensor) -> Tensor:
    return ternary(weights.float(), shape.ternary)
