"""Losses of whole answers: direct preference optimization, a complete call's probability, and the tool-or-not head.

They are functions of sums of log-probabilities, so their gradient is that of the tokens' cross-entropy with weights
that depend on those sums: the output head runs once without gradients for the sums, then once with these weights.

    DPO       W * softplus(-beta * m),  m = log p(chosen)/p(rejected) - the same of the reference    arXiv:2305.18290
    sequence  W * (1 - p(answer)), of answers that are calls: the chance that a sampled call is not the right one
    head      W * cross-entropy of sigmoid(h w + b) with "is a call", h the state that predicts the first answer token

W is the weight of the answer's tokens, so that a pair and its SFT term weigh alike whatever their length (as in
arXiv:2404.19733). All of it is off by default. Not here: the products (finetune/ops/cross_entropy.py).
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from finetune.packed import Packed


@dataclass(frozen=True)
class AnswerLosses:
    """What each is multiplied by; 0: off."""

    dpo_weight: float = 0.0
    dpo_beta: float = 0.1
    sequence_weight: float = 0.0
    call_head_weight: float = 0.0

    def needs_sums(self, packed: Packed) -> bool:
        return (bool(self.dpo_weight) and packed.pairs is not None) or (
            bool(self.sequence_weight) and packed.answers is not None and bool((packed.answers.is_call == 1).any())
        )


OFF = AnswerLosses()


def with_pair_terms(packed: Packed) -> Packed:
    """The pairs' tokens as loss terms of weight 0, behind the others."""
    pairs = packed.pairs
    if pairs is None:
        return packed
    return replace(
        packed,
        loss_rows=np.concatenate([packed.loss_rows, pairs.rows]),
        loss_targets=np.concatenate([packed.loss_targets, pairs.targets]),
        loss_weights=np.concatenate([packed.loss_weights, np.zeros(len(pairs.rows), np.float32)]),
        loss_kl=np.concatenate([packed.loss_kl, np.zeros(len(pairs.rows), np.bool_)]),
    )


def margins(packed: Packed, losses: NDArray[np.float64]) -> NDArray[np.float64]:
    """log p(chosen) - log p(rejected) of each pair; `losses`: of all terms, the pairs' last."""
    assert packed.pairs is not None
    pairs = packed.pairs
    own = losses[len(losses) - len(pairs.rows) :]
    return -np.bincount(pairs.numbers, own * pairs.signs, minlength=len(pairs.ids)).astype(np.float64)


def token_weights(
    packed: Packed, losses: NDArray[np.float64], chosen: AnswerLosses
) -> tuple[NDArray[np.float64], float]:
    """(what is added to each term's weight, the value of these losses). `packed`: before `with_pair_terms`."""
    added = np.zeros(len(losses))
    value = 0.0
    if chosen.dpo_weight and packed.pairs is not None:
        pairs = packed.pairs
        assert np.isfinite(pairs.references).all(), "references are computed before training"
        margin = chosen.dpo_beta * (margins(packed, losses) - pairs.references)
        weights = chosen.dpo_weight * pairs.weights
        value += float(np.sum(weights * np.logaddexp(0.0, -margin)))
        slope = weights * chosen.dpo_beta * np.exp(-np.logaddexp(0.0, margin))
        added[len(losses) - len(pairs.rows) :] = slope[pairs.numbers] * pairs.signs
    if chosen.sequence_weight and packed.answers is not None:
        for (start, end), is_call in zip(packed.answers.spans.tolist(), packed.answers.is_call, strict=True):
            if is_call == 1 and end > start:
                p = float(np.exp(-losses[start:end].sum()))
                weight = chosen.sequence_weight * float(packed.loss_weights[start:end].sum(dtype="float64"))
                value += weight * (1 - p)
                added[start:end] += weight * p
    return added, value


@dataclass(frozen=True, eq=False)
class CallHead:
    """Trained beside the adapter and never exported."""

    weight: torch.Tensor
    """(C,)"""
    bias: torch.Tensor
    """(1,)"""

    @classmethod
    def make(cls, hidden_size: int, dtype: torch.dtype, device: torch.device) -> "CallHead":
        """Of zeros: it changes nothing until it knows something."""
        made = (torch.zeros(size, dtype=dtype, device=device).requires_grad_() for size in (hidden_size, 1))
        return cls(*made)

    def parameters(self) -> dict[str, torch.Tensor]:
        return {"call_head.weight": self.weight, "call_head.bias": self.bias}

    def loss(self, packed: Packed, hidden: torch.Tensor, hidden_rows: np.ndarray) -> torch.Tensor | None:
        """Weighted sum over the answers; None where no tools were offered. `hidden`: of `hidden_rows`, ascending."""
        assert packed.answers is not None
        spans, is_call = packed.answers.spans, packed.answers.is_call
        mine = np.flatnonzero((is_call >= 0) & (spans[:, 1] > spans[:, 0]))
        if not len(mine):
            return None
        places = np.searchsorted(hidden_rows, packed.loss_rows[spans[mine, 0]])
        weights = [float(packed.loss_weights[start:end].sum(dtype="float64")) for start, end in spans[mine].tolist()]
        states = hidden[torch.from_numpy(places).to(hidden.device)].to(self.weight.dtype)
        wanted = torch.from_numpy(is_call[mine]).to(states)
        logits = states @ self.weight + self.bias
        return F.binary_cross_entropy_with_logits(
            logits, wanted, torch.tensor(weights, dtype=states.dtype, device=states.device), reduction="sum"
        )
