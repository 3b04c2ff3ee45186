"""Cross-entropy of a frozen output head over only the rows that carry loss, in chunks; and KL to the base's answers.

    total = sum_n weight_n * loss_n,   loss_n = -log softmax(h_r W^T)[target_n]   (r = row_n)
    or, for KL terms,                  loss_n = KL(softmax(b_r W^T) || softmax(h_r W^T)), exact over the vocabulary

Logits exist for one chunk of rows at a time (CHUNK_BYTES) and become their own gradient in place; the gradient of the
hidden states is ready when the forward pass ends. Rows that predict several targets (the last row of a shared prompt)
are computed once. b is the base model's hidden state at the row: far smaller to have than its logits. The head gets
no gradient. Shapes: hidden (U, C) one row each, head (V, C), N terms; V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from finetune.ops.numeric import wide_dtype

CHUNK_BYTES = 16 << 20
"""Of logits in the head's type: 170 rows of bf16 and 49,152 tokens, whose products take 20 times as long as reading
the head for them does."""
HEAD_TILE = 8192
"""Tokens of the vocabulary in one product: oneDNN copies the whole of its right-hand side, 57 MB for the default
model's head, into its own layout."""
SOFTMAX_BYTES = 2 << 20
"""Of float32 rows that the softmax works on at a time: they stay in the L2 caches."""


@dataclass(frozen=True, eq=False)
class LossTerms:
    """N terms, sorted by row. `base` (B, C) has a row for each KL term's row; None without KL terms."""

    rows: torch.Tensor
    """int64 (N,), of hidden"""
    targets: torch.Tensor
    """int64 (N,); ignored for KL terms"""
    weights: torch.Tensor
    """(N,), in the wide type"""
    is_kl: torch.Tensor
    """bool (N,)"""
    base: torch.Tensor | None = None
    base_rows: torch.Tensor | None = None
    """int64 (N,): the row of `base` for KL terms"""


class LinearCrossEntropy(torch.autograd.Function):
    """(total, per term (N,), not differentiable)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: torch.Tensor, terms: LossTerms
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wide = wide_dtype(hidden.dtype)
        losses = torch.zeros(len(terms.rows), dtype=wide, device=hidden.device)
        needs_grad = ctx.needs_input_grad[0]
        d_hidden = torch.zeros_like(hidden) if needs_grad else None
        for start, end, first, last in _chunks(terms.rows, len(hidden), head):
            chunk = _part(terms, first, last)
            logits = _logits(hidden[start:end], head)
            base = None
            if terms.base is not None and bool(chunk.is_kl.any()):
                base = _base_log_probabilities(chunk, terms.base, head, wide)
            _loss_and_gradient(logits, start, chunk, base, losses[first:last], needs_grad)
            if d_hidden is not None:
                _hidden_gradient(logits, head, d_hidden[start:end])
            del logits, base  # before the next chunk's are made: two at once are 32 MB
        ctx.save_for_backward(d_hidden)
        ctx.mark_non_differentiable(losses)
        return torch.dot(terms.weights, losses), losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (d_hidden,) = ctx.saved_tensors
        return d_hidden * grad, None, None


def _chunks(rows: torch.Tensor, num_rows: int, head: torch.Tensor) -> Iterator[tuple[int, int, int, int]]:
    """Rows [start, end) of hidden with their terms [first, last)."""
    step = max(1, CHUNK_BYTES // (head.shape[0] * head.element_size()))
    for start in range(0, num_rows, step):
        end = min(start + step, num_rows)
        first, last = torch.searchsorted(rows, torch.tensor([start, end], device=rows.device)).tolist()
        yield start, end, first, last


def _part(terms: LossTerms, first: int, last: int) -> LossTerms:
    base_rows = None if terms.base_rows is None else terms.base_rows[first:last]
    return LossTerms(
        terms.rows[first:last],
        terms.targets[first:last],
        terms.weights[first:last],
        terms.is_kl[first:last],
        terms.base,
        base_rows,
    )


def _base_log_probabilities(
    chunk: LossTerms, base: torch.Tensor, head: torch.Tensor, wide: torch.dtype
) -> torch.Tensor:
    """(KL terms of the chunk, V), by the same head."""
    assert chunk.base_rows is not None
    return torch.log_softmax(_logits(base[chunk.base_rows[chunk.is_kl]], head).to(wide), -1)


def _logits(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """hidden @ head^T, a tile of the vocabulary at a time."""
    logits = torch.empty(len(hidden), len(head), dtype=hidden.dtype, device=hidden.device)
    for start in range(0, len(head), HEAD_TILE):
        tile = slice(start, start + HEAD_TILE)
        torch.mm(hidden, head[tile].t(), out=logits[:, tile])
    return logits


def _hidden_gradient(d_logits: torch.Tensor, head: torch.Tensor, out: torch.Tensor) -> None:
    """d_logits @ head into `out`, added up over the tiles in the wide type."""
    total = torch.zeros_like(out, dtype=wide_dtype(out.dtype))
    for start in range(0, len(head), HEAD_TILE):
        tile = slice(start, start + HEAD_TILE)
        total += torch.mm(d_logits[:, tile], head[tile])
    out.copy_(total)


def _loss_and_gradient(
    logits: torch.Tensor,
    start: int,
    chunk: LossTerms,
    base: torch.Tensor | None,
    losses: torch.Tensor,
    needs_grad: bool,
) -> None:
    """Fill the chunk's losses; turn its logits (rows from `start` on) into the gradient of the total by them."""
    wide = losses.dtype
    step = max(1, SOFTMAX_BYTES // (logits.shape[1] * losses.element_size()))
    kl_numbers = chunk.is_kl.cumsum(0) - 1
    for begin in range(0, len(logits), step):
        rows = logits[begin : begin + step]
        bounds = torch.tensor([start + begin, start + begin + len(rows)], device=logits.device)
        first, last = torch.searchsorted(chunk.rows, bounds).tolist()
        part = _part(chunk, first, last)
        at = part.rows - start - begin
        values = rows.to(wide)
        p = torch.softmax(values, -1)
        log_sum = values.amax(-1) - p.amax(-1).log()
        losses[first:last] = log_sum[at] - values[at, part.targets]
        kl = part.is_kl.nonzero().squeeze(1)
        if len(kl):
            assert base is not None
            log_base = base[kl_numbers[first:last][kl]]
            log_p = values[at[kl]] - log_sum[at[kl], None]
            losses[first:last][kl] = (log_base.exp() * (log_base - log_p)).sum(-1)
        if needs_grad:
            weights = part.weights
            p.mul_(torch.zeros(len(rows), dtype=wide, device=p.device).index_add_(0, at, weights)[:, None])
            if len(kl):
                p.index_add_(0, at[kl], log_base.exp() * -weights[kl, None])
            ce = (~part.is_kl).nonzero().squeeze(1)
            p.index_put_((at[ce], part.targets[ce]), -weights[ce], accumulate=True)
            rows.copy_(p)


def linear_cross_entropy(
    hidden: torch.Tensor, head: torch.Tensor, terms: LossTerms
) -> tuple[torch.Tensor, torch.Tensor]:
    """(total of weight * loss, loss of each term); raises nothing: rows and targets must be in range."""
    result: tuple[torch.Tensor, torch.Tensor] = LinearCrossEntropy.apply(hidden, head, terms)
    return result
