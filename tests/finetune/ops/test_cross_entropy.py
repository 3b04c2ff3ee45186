"""Chunked cross-entropy and KL agree with plain ones over whole logits, whatever the chunks, and by gradcheck."""

from dataclasses import replace

import pytest
import torch

import finetune.ops.cross_entropy as cross_entropy
from finetune.ops.cross_entropy import HeadOptions, LossTerms, linear_cross_entropy, trained_cross_entropy

ROWS, WIDTH, VOCAB = 5, 4, 11
TERM_ROWS = torch.tensor([0, 1, 1, 1, 2, 4, 4])
"""Row 1 predicts three targets, row 3 none; row 4 has a KL term beside another."""
TARGETS = torch.tensor([3, 0, 10, 0, 5, 7, 0])
IS_KL = torch.tensor([False, False, False, False, True, False, True])


def make(dtype: torch.dtype, *, kl: bool) -> tuple[torch.Tensor, torch.Tensor, LossTerms]:
    torch.manual_seed(0)
    hidden = (2 * torch.randn(ROWS, WIDTH, dtype=dtype)).requires_grad_()
    head = torch.randn(VOCAB, WIDTH, dtype=dtype)
    weights = torch.tensor([1.0, 0.5, 2.0, -1.5, 1.0, 0.0, 3.0], dtype=torch.promote_types(dtype, torch.float32))
    if not kl:
        return hidden, head, LossTerms(TERM_ROWS, TARGETS, weights, torch.zeros_like(IS_KL))
    base_rows = torch.tensor([0, 0, 0, 0, 1, 0, 0])
    return hidden, head, LossTerms(TERM_ROWS, TARGETS, weights, IS_KL, torch.randn(2, WIDTH, dtype=dtype), base_rows)


def slow(hidden: torch.Tensor, head: torch.Tensor, terms: LossTerms) -> tuple[torch.Tensor, torch.Tensor]:
    log_p = torch.log_softmax(hidden @ head.t(), -1)
    losses = -log_p[terms.rows, terms.targets]
    if terms.base is not None:
        log_base = torch.log_softmax(terms.base @ head.t(), -1)[terms.base_rows]
        divergence = torch.nn.functional.kl_div(log_p[terms.rows], log_base, reduction="none", log_target=True).sum(-1)
        losses = torch.where(terms.is_kl, divergence, losses)
    return (losses * terms.weights).sum(), losses.detach()


@pytest.mark.parametrize("chunk_rows", [1, 2, 100])
@pytest.mark.parametrize("softmax_rows", [1, 3, 100])
@pytest.mark.parametrize("kl", [False, True])
def test_equals_whole_logits(chunk_rows: int, softmax_rows: int, kl: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", chunk_rows * VOCAB * 8)
    monkeypatch.setattr(cross_entropy, "SOFTMAX_BYTES", softmax_rows * VOCAB * 8)
    hidden, head, terms = make(torch.float64, kl=kl)
    total, losses = linear_cross_entropy(hidden, head, terms)
    expected, expected_losses = slow(hidden, head, terms)
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(losses, expected_losses)
    (grad,) = torch.autograd.grad(total / 7, [hidden])
    (expected_grad,) = torch.autograd.grad(expected / 7, [hidden])
    torch.testing.assert_close(grad, expected_grad)
    assert not grad[3].any()


@pytest.mark.parametrize("kl", [False, True])
def test_gradcheck(kl: bool) -> None:
    hidden, head, terms = make(torch.float64, kl=kl)
    assert torch.autograd.gradcheck(lambda hidden: linear_cross_entropy(hidden, head, terms)[0], (hidden,))


def test_without_gradient_only_the_losses() -> None:
    hidden, head, terms = make(torch.float64, kl=True)
    total, losses = linear_cross_entropy(hidden.detach(), head, terms)
    assert not total.requires_grad
    torch.testing.assert_close(losses, slow(hidden, head, terms)[1])


def test_certain_and_impossible_targets() -> None:
    """The log-sum comes from the largest logit: no infinity where a probability vanishes."""
    head = torch.tensor([[1.0], [-1.0], [0.0]])
    hidden = torch.tensor([[300.0]], requires_grad=True)
    rows, weights = torch.zeros(2, dtype=torch.long), torch.ones(2)
    terms = LossTerms(rows, torch.tensor([0, 1]), weights, torch.zeros(2, dtype=torch.bool))
    total, losses = linear_cross_entropy(hidden, head, terms)
    torch.testing.assert_close(losses, torch.tensor([0.0, 600.0]))
    total.backward()
    torch.testing.assert_close(hidden.grad, torch.tensor([[2.0]]))


def test_bfloat16_losses_are_float32() -> None:
    hidden, head, terms = make(torch.float32, kl=True)
    narrow, narrow_head = hidden.detach().bfloat16().requires_grad_(), head.bfloat16()
    assert terms.base is not None
    given = LossTerms(terms.rows, terms.targets, terms.weights, terms.is_kl, terms.base.bfloat16(), terms.base_rows)
    total, losses = linear_cross_entropy(narrow, narrow_head, given)
    assert (total.dtype, losses.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(losses, slow(hidden, head, terms)[1], rtol=0.02, atol=0.05)


def test_no_terms_at_all() -> None:
    none = torch.zeros(0, dtype=torch.long)
    terms = LossTerms(none, none, torch.zeros(0), torch.zeros(0, dtype=torch.bool))
    hidden = torch.zeros(0, WIDTH, requires_grad=True)
    total, losses = linear_cross_entropy(hidden, torch.randn(VOCAB, WIDTH), terms)
    total.backward()
    assert (total.item(), losses.shape) == (0.0, (0,))


def slow_entropy(hidden: torch.Tensor, head: torch.Tensor, terms: LossTerms) -> torch.Tensor:
    log_p = torch.log_softmax(hidden @ head.t(), -1)
    return (-(log_p.exp() * log_p).sum(-1)[terms.rows] * terms.weights).sum()


@pytest.mark.parametrize("kl", [False, True])
@pytest.mark.parametrize("entropy_weight", [0.0, 0.3, -0.2])
def test_a_trained_head(kl: bool, entropy_weight: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of hidden states and head, with the entropy in the loss, over several chunks."""
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 2 * VOCAB * 8)
    monkeypatch.setattr(cross_entropy, "HEAD_TILE", 4)
    hidden, head, terms = make(torch.float64, kl=kl)
    head.requires_grad_()
    if kl:  # a teacher of another width; otherwise the head's own base, which the gradient must not reach
        terms = replace(terms, base=torch.randn(2, 3).double(), base_head=torch.randn(VOCAB, 3).double())
    options = HeadOptions(entropy_weight=entropy_weight, has_entropy=True)
    total, losses, entropy = trained_cross_entropy(hidden, head, terms, options)
    log_p = torch.log_softmax(hidden @ head.t(), -1)
    expected_losses = -log_p[terms.rows, terms.targets]
    if terms.base is not None and terms.base_head is not None:
        log_base = torch.log_softmax(terms.base @ terms.base_head.t(), -1)[terms.base_rows]
        divergence = (log_base.exp() * (log_base - log_p[terms.rows])).sum(-1)
        expected_losses = torch.where(terms.is_kl, divergence, expected_losses)
    expected = (expected_losses * terms.weights).sum() - entropy_weight * slow_entropy(hidden, head, terms)
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(losses, expected_losses.detach())
    torch.testing.assert_close(entropy, slow_entropy(hidden, head, terms).detach())
    grads = torch.autograd.grad(total / 7, [hidden, head])
    torch.testing.assert_close(grads, torch.autograd.grad(expected / 7, [hidden, head]))


def test_gradcheck_of_a_trained_head() -> None:
    hidden, head, terms = make(torch.float64, kl=False)
    options = HeadOptions(entropy_weight=0.3)

    def total(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        return trained_cross_entropy(hidden, head, terms, options)[0]

    assert torch.autograd.gradcheck(total, (hidden, head.requires_grad_()))


def test_values_stand_for_the_head() -> None:
    """What is multiplied are the values; the gradient goes to the head, straight through."""
    hidden, head, terms = make(torch.float64, kl=False)
    values = (head * 3).round() / 3
    total, _, _ = trained_cross_entropy(hidden, head.requires_grad_(), terms, HeadOptions(values))
    twin = values.clone().requires_grad_()
    expected, _ = slow(hidden, twin, terms)
    torch.testing.assert_close(total, expected)
    found = torch.autograd.grad(total, [hidden, head])
    torch.testing.assert_close(found, torch.autograd.grad(expected, [hidden, twin]))
