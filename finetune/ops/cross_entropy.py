"""Cross-entropy of an output head over only the rows that carry loss, in chunks; and KL to a teacher's answers.

    total = sum_n weight_n * loss_n,   loss_n = -log softmax(h_r W^T)[target_n]   (r = row_n)
    or, for KL terms,                  loss_n = KL(softmax(b_r U^T) || softmax(h_r W^T)), exact over the vocabulary
    minus, where it is asked for,      entropy_weight * sum_n weight_n * H(softmax(h_r W^T))

Logits exist for one chunk of rows at a time (CHUNK_BYTES) and become their own gradient in place; the gradient of the
hidden states is ready when the forward pass ends. Rows that predict several targets (the last row of a shared prompt)
are computed once. b is the teacher's hidden state at the row, U its head (W itself where the teacher is the base of an
adapter): far smaller to have than its logits. A head that requires a gradient gets one, in its own type; what is
multiplied with may be another tensor (`values`: the head quantized, straight through). Shapes: hidden (U, C) one row
each, head (V, C), N terms; V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
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
    base_head: torch.Tensor | None = None
    """(V, C of the teacher); None: the head"""


@dataclass(frozen=True, eq=False)
class HeadOptions:
    """What a head that is trained wants beside the loss."""

    values: torch.Tensor | None = None
    """(V, C) in hidden's type: what the head is computed with; None: the head itself"""
    entropy_weight: float = 0.0
    has_entropy: bool = False
    """Whether entropies are computed (they are where they have a weight): one more pass over the logits."""


PLAIN = HeadOptions()


class LinearCrossEntropy(torch.autograd.Function):
    """(total, per term (N,), weighted sum of the terms' entropies; only the first is differentiable)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: torch.Tensor, terms: LossTerms, options: HeadOptions
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        wide = wide_dtype(hidden.dtype)
        values = head if options.values is None else options.values
        losses = torch.zeros(len(terms.rows), dtype=wide, device=hidden.device)
        entropy = torch.zeros((), dtype=wide, device=hidden.device)
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        d_hidden = torch.zeros_like(hidden) if needs_hidden else None
        d_head = torch.zeros_like(head) if needs_head else None
        for start, end, first, last in _chunks(terms.rows, len(hidden), values):
            chunk = _part(terms, first, last)
            logits = _logits(hidden[start:end], values)
            base = None
            if terms.base is not None and bool(chunk.is_kl.any()):
                teacher = values if terms.base_head is None else terms.base_head
                base = _base_log_probabilities(chunk, terms.base, teacher, wide)
            entropy += _loss_and_gradient(
                logits, start, chunk, base, losses[first:last], needs_hidden or needs_head, options
            )
            if d_hidden is not None:
                _hidden_gradient(logits, values, d_hidden[start:end])
            if d_head is not None:
                _head_gradient(logits, hidden[start:end], d_head)
            del logits, base  # before the next chunk's are made: two at once are 32 MB
        ctx.save_for_backward(d_hidden, d_head)
        ctx.mark_non_differentiable(losses, entropy)
        return torch.dot(terms.weights, losses) - options.entropy_weight * entropy, losses, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        d_hidden, d_head = ctx.saved_tensors
        return (
            None if d_hidden is None else d_hidden * grad,
            None if d_head is None else d_head * grad,
            None,
            None,
        )


def _chunks(rows: torch.Tensor, num_rows: int, head: torch.Tensor) -> Iterator[tuple[int, int, int, int]]:
    """Rows [start, end) of hidden with their terms [first, last)."""
    step = max(1, CHUNK_BYTES // (head.shape[0] * head.element_size()))
    for start in range(0, num_rows, step):
        end = min(start + step, num_rows)
        first, last = torch.searchsorted(rows, torch.tensor([start, end], device=rows.device)).tolist()
        yield start, end, first, last


def _part(terms: LossTerms, first: int, last: int) -> LossTerms:
    return replace(
        terms,
        rows=terms.rows[first:last],
        targets=terms.targets[first:last],
        weights=terms.weights[first:last],
        is_kl=terms.is_kl[first:last],
        base_rows=None if terms.base_rows is None else terms.base_rows[first:last],
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


def _head_gradient(d_logits: torch.Tensor, hidden: torch.Tensor, total: torch.Tensor) -> None:
    """Adds d_logits^T @ hidden."""
    for start in range(0, len(total), HEAD_TILE):
        tile = slice(start, start + HEAD_TILE)
        total[tile] += torch.mm(d_logits[:, tile].t(), hidden)


def _loss_and_gradient(
    logits: torch.Tensor,
    start: int,
    chunk: LossTerms,
    base: torch.Tensor | None,
    losses: torch.Tensor,
    needs_grad: bool,
    options: HeadOptions,
) -> torch.Tensor:
    """Fill the chunk's losses; turn its logits (rows from `start` on) into the gradient of the total by them.

    Gives the weighted sum of the terms' entropies (0 where none are asked for).
    """
    wide = losses.dtype
    total = torch.zeros((), dtype=wide, device=losses.device)
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
        weights = part.weights
        row_weights = torch.zeros(len(rows), dtype=wide, device=p.device).index_add_(0, at, weights)
        entropies = None
        if options.has_entropy or options.entropy_weight:
            entropies = log_sum - torch.linalg.vecdot(p, values)
            total += torch.dot(row_weights, entropies)
        if needs_grad:
            if entropies is not None and options.entropy_weight:
                # d(-H)/d logit = p (log p + H)
                extra = (values - (log_sum - entropies)[:, None]).mul_(options.entropy_weight).add_(1)
                p.mul_(extra)
            p.mul_(row_weights[:, None])
            if len(kl):
                p.index_add_(0, at[kl], log_base.exp() * -weights[kl, None])
            ce = (~part.is_kl).nonzero().squeeze(1)
            p.index_put_((at[ce], part.targets[ce]), -weights[ce], accumulate=True)
            rows.copy_(p)
    return total


def linear_cross_entropy(
    hidden: torch.Tensor, head: torch.Tensor, terms: LossTerms
) -> tuple[torch.Tensor, torch.Tensor]:
    """(total of weight * loss, loss of each term); raises nothing: rows and targets must be in range."""
    total, losses, _ = LinearCrossEntropy.apply(hidden, head, terms, PLAIN)
    return total, losses


def trained_cross_entropy(
    hidden: torch.Tensor, head: torch.Tensor, terms: LossTerms, options: HeadOptions
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same, with the weighted sum of the terms' entropies."""
    result: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = LinearCrossEntropy.apply(hidden, head, terms, options)
    return result
