"""Rotary embedding and attention over a packed sequence, block-sparse both ways; grouped queries, shared prefixes.

Tile by tile (attention_tiles.py): scores against the ancestors' keys and the own ones, softmax, values. The backward
pass computes the probabilities again: Q, K and V are kept as the tiles read them, turned, and not as they came, which
is as much (float32 scores: Q and K twice as much); gradients of a prefix's keys and values add up over the branches in
float32, and go back through the inverse rotation. The rotation is float32 for bf16 inputs (float64 for float64); scores
are what the layout says, their softmax sums in float32 always.
Why not F.scaled_dot_product_attention: on a CPU its backward takes 2 to 3 times as long as these products (bf16, heads
of 64: 13 ms for 4 x 256 rows), and it knows no prefix that branches share.
Shapes: q (T, heads, D), k and v (T, kv_heads, D); inside, H is kv_heads, g query heads share one of them, and there are
rows of zeros around the T, as tiles want them: Q = T + QUERY_STEP, K = KEY_STEP + T + QUERY_STEP.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from finetune.ops.attention_tiles import KEY_STEP, QUERY_STEP, Tile
from finetune.ops.numeric import wide_dtype
from finetune.ops.rope import rotate


@dataclass(frozen=True, eq=False)
class Layout:
    """What is constant in one packed sequence: who sees whom, and the rows' angles (T, rope_dim/2) in the wide type."""

    tiles: Sequence[Tile]
    cos: torch.Tensor
    sin: torch.Tensor
    scores: torch.dtype
    """Of scores and probabilities: with bf16 inputs bf16, or float32 for twice the attention's time."""


class Attention(torch.autograd.Function):
    """(T, heads, D)."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout) -> torch.Tensor:
        queries, keys, values = _turned_queries(q, k, layout), _turned_keys(k, layout), _by_head(v, v.dtype)
        group, masks = q.shape[1] // k.shape[1], _Masks(queries)
        out = torch.empty_like(queries, dtype=q.dtype)
        for tile in layout.tiles:  # in row order: what one computes too many, the next one writes over
            own = slice(tile.start * group, (tile.start + tile.num_queries) * group)
            p = _probabilities(queries[:, own], _gather(keys, tile), masks, tile)
            torch.bmm(p.to(v.dtype), _gather(values, tile), out=out[:, own])
        ctx.save_for_backward(queries, keys, values)
        ctx.layout, ctx.shapes = layout, (q.shape, k.shape)
        return _by_row(out[:, : q.shape[0] * group], q.shape, q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        queries, keys, values = ctx.saved_tensors
        layout: Layout = ctx.layout
        (num_rows, num_heads, width), by_keys = ctx.shapes
        dtype = values.dtype
        narrow_queries, narrow_keys = queries.to(dtype), keys.to(dtype)
        group, masks = num_heads // by_keys[1], _Masks(queries)
        d_out = _grouped(grad, by_keys[1], grad.dtype)
        wide = layout.cos.dtype
        dq = torch.empty_like(narrow_queries)
        dk, dv = torch.zeros_like(keys, dtype=wide), torch.zeros_like(keys, dtype=wide)
        for tile in layout.tiles:
            own = slice(tile.start * group, (tile.start + tile.num_queries) * group)
            p = _probabilities(queries[:, own], _gather(keys, tile), masks, tile)
            p[:, (tile.end - tile.start) * group :] = 0  # queries too many: their keys and values get nothing
            dp = torch.bmm(d_out[:, own], _gather(values, tile).transpose(1, 2)).to(p.dtype)
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype).to(dtype)  # p * (dp - sum(p * dp)); masked: p is 0
            _add_rows(dv, tile, torch.bmm(p.to(dtype).transpose(1, 2), d_out[:, own]))
            _add_rows(dk, tile, torch.bmm(ds.transpose(1, 2), narrow_queries[:, own]))
            torch.bmm(ds, _gather(narrow_keys, tile), out=dq[:, own])
        dq = dq[:, : num_rows * group].to(wide)
        scaled = _angles(layout, group, width**-0.5)
        rotate(dq, *scaled, inverse=True)
        _scale_rest(dq, scaled[0], width**-0.5)
        dk, dv = _inner(dk), _inner(dv)
        rotate(dk, *_angles(layout, 1, 1.0), inverse=True)
        by_queries = (num_rows, num_heads, width)
        return _by_row(dq, by_queries, dtype), _by_row(dk, by_keys, dtype), _by_row(dv, by_keys, dtype), None


class _Masks:
    """What a tile's own scores get added: 0, or -inf for later keys; (n, 1, n), for all heads. Made once a size."""

    def __init__(self, like: torch.Tensor) -> None:
        self._like = like
        self._made: dict[int, torch.Tensor] = {}

    def of(self, n: int) -> torch.Tensor:
        if n not in self._made:
            self._made[n] = self._like.new_full((n, n), -torch.inf).triu_(1).unsqueeze(1)
        return self._made[n]


def _grouped(x: torch.Tensor, num_kv_heads: int, dtype: torch.dtype) -> torch.Tensor:
    """(T, heads, D) as (H, Q * g, D): the queries of a row and a KV head beside each other, so a tile is one run."""
    split = x.unflatten(1, (num_kv_heads, -1)).transpose(0, 1)
    found = torch.empty((num_kv_heads, len(x) + QUERY_STEP, *split.shape[2:]), dtype=dtype, device=x.device)
    found[:, : len(x)].copy_(split)
    found[:, len(x) :].zero_()
    return found.flatten(1, 2)


def _by_head(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(T, H, D) as (H, K, D)."""
    found = torch.zeros((x.shape[1], KEY_STEP + len(x) + QUERY_STEP, x.shape[2]), dtype=dtype, device=x.device)
    _inner(found).copy_(x.transpose(0, 1))
    return found


def _inner(x: torch.Tensor) -> torch.Tensor:
    """The T rows of (H, K, D)."""
    return x[:, KEY_STEP:-QUERY_STEP]


def _by_row(x: torch.Tensor, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """(H, T * g, D) as `shape`: (T, heads, D)."""
    split = x.unflatten(1, (shape[0], -1)).transpose(0, 1)
    return split.to(dtype, memory_format=torch.contiguous_format, copy=True).view(shape)


def _angles(layout: Layout, group: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin for (H, T * g, D), times `scale`."""
    cos, sin = layout.cos * scale, layout.sin * scale
    return cos.repeat_interleave(group, 0), sin.repeat_interleave(group, 0)


def _turned_queries(q: torch.Tensor, k: torch.Tensor, layout: Layout) -> torch.Tensor:
    """(H, Q * g, D) in the scores' type, scaled by 1/sqrt(D)."""
    group, scale = q.shape[1] // k.shape[1], q.shape[-1] ** -0.5
    wide = _grouped(q, k.shape[1], wide_dtype(q.dtype))
    cos, sin = _angles(layout, group, scale)
    _scale_rest(rotate(wide[:, : len(q) * group], cos, sin), cos, scale)
    return wide.to(layout.scores)


def _scale_rest(x: torch.Tensor, cos: torch.Tensor, scale: float) -> torch.Tensor:
    """Elements behind rope_dim, which no angle scales."""
    x[..., 2 * cos.shape[-1] :].mul_(scale)
    return x


def _turned_keys(k: torch.Tensor, layout: Layout) -> torch.Tensor:
    """(H, K, D) in the scores' type."""
    turned = _by_head(k, wide_dtype(k.dtype))
    rotate(_inner(turned), layout.cos, layout.sin)
    return turned.to(layout.scores)


def _probabilities(queries: torch.Tensor, keys: torch.Tensor, masks: _Masks, tile: Tile) -> torch.Tensor:
    """(H, n * g, keys) of a tile."""
    n = tile.num_queries
    scores = torch.bmm(queries, keys.transpose(1, 2))
    scores.unflatten(1, (n, -1))[..., -n:].add_(masks.of(n))
    scores[..., : tile.num_before] = -torch.inf
    return torch.softmax(scores, -1)


def _gather(x: torch.Tensor, tile: Tile) -> torch.Tensor:
    """The tile's rows of (H, K, D): a view where they are one run."""
    parts = [x[:, KEY_STEP + start : KEY_STEP + end] for start, end in tile.computed_runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _add_rows(total: torch.Tensor, tile: Tile, part: torch.Tensor) -> None:
    at = 0
    for start, end in tile.computed_runs:
        total[:, KEY_STEP + start : KEY_STEP + end] += part[:, at : at + end - start]
        at += end - start


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout) -> torch.Tensor:
    result: torch.Tensor = Attention.apply(q, k, v, layout)
    return result
