"""Losses of whole answers against the plain formula, one sequence at a time: value and every gradient, in float64."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from finetune.dataset.packing import pack
from finetune.dataset.pairs import pack_pairs
from finetune.model.answer_losses import AnswerLosses
from finetune.model.lora import LoraSpec
from finetune.model.model import TrainModel
from finetune.packed import Example, Packed, Preference
from tests.finetune.model.builders import plain
from tests.finetune.model.conftest import Opener

TOLERANCE = 1e-12
Gradients = dict[str, torch.Tensor]


def tokens(dice: np.random.Generator, n: int) -> list[int]:
    ids: list[int] = dice.integers(0, 384, n).tolist()
    return ids


def an_example(name: str, prompt: Sequence[int], answer: Sequence[int], *, is_call: bool | None) -> Example:
    weights = np.array([0.0] * len(prompt) + [1 + 0.5 * (at % 2) for at in range(len(answer))], np.float32)
    return Example(name, np.array([*prompt, *answer], np.int32), weights, name, is_call=is_call)


def some_pairs() -> list[Preference]:
    """Two of three share a prompt that is long enough to be laid out once."""
    dice = np.random.default_rng(3)
    long, short = tokens(dice, 40), tokens(dice, 6)
    made = []
    for number, (prompt, chosen, rejected) in enumerate(((long, 3, 5), (long, 4, 2), (short, 2, 7))):
        right = an_example(f"pair-{number}", prompt, tokens(dice, chosen), is_call=True)
        made.append(Preference(right, np.array([*prompt, *tokens(dice, rejected)], np.int32), len(prompt)))
    return made


def gradients(model: TrainModel, run: Callable[[], float]) -> tuple[float, Gradients]:
    for parameter in model.trained().values():
        parameter.grad = None
    value = run()
    return value, {
        name: torch.zeros_like(one) if one.grad is None else one.grad.clone() for name, one in model.trained().items()
    }


def fast(model: TrainModel, micro_batches: Sequence[Packed]) -> tuple[float, Gradients]:
    def run() -> float:
        value = 0.0
        for packed in micro_batches:
            loss = model.loss(packed, 1.0)
            loss.backward()
            assert loss.total.item() == pytest.approx(loss.ce_sum + loss.extra_sum, rel=TOLERANCE)
            value += loss.ce_sum + loss.extra_sum
        return value

    return gradients(model, run)


def nll(model: TrainModel, ids: Sequence[int], prompt_length: int) -> torch.Tensor:
    """Of the answer; differentiable."""
    chosen, model.answer_losses = model.answer_losses, AnswerLosses()
    loss = model.loss(plain(ids, first_loss=prompt_length), 1.0)
    model.answer_losses = chosen
    return loss.total


def weighted(model: TrainModel, one: Example) -> torch.Tensor:
    (packed,) = pack([one], len(one.token_ids), seed=0, epoch=0)
    chosen, model.answer_losses = model.answer_losses, AnswerLosses()
    loss = model.loss(packed, 1.0)
    model.answer_losses = chosen
    return loss.total


def assert_equal(got: tuple[float, Gradients], expected: tuple[float, Gradients]) -> None:
    assert got[0] == pytest.approx(expected[0], rel=TOLERANCE)
    assert any(gradient.abs().max() > 1e-3 for gradient in expected[1].values())
    for name, gradient in expected[1].items():
        assert (got[1][name] - gradient).abs().max() <= TOLERANCE * max(1.0, gradient.abs().max().item()), name


@pytest.mark.parametrize("max_tokens", [500, 60], ids=["packed", "apart"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_pairs_are_the_plain_formula(open_tiny: Opener, max_tokens: int, checkpointing: bool) -> None:
    model, pairs = open_tiny(), some_pairs()
    packed_model = open_tiny(checkpointing=checkpointing)
    packed_model.answer_losses = AnswerLosses(dpo_weight=0.7, dpo_beta=0.3)
    references = {"pair-0": 0.5, "pair-1": -2.0, "pair-2": 4.0}

    def plainly() -> float:
        value = 0.0
        for pair in pairs:
            chosen, rejected = (
                -nll(model, ids.tolist(), pair.prompt_length) for ids in (pair.chosen.token_ids, pair.rejected_ids)
            )
            margin = chosen - rejected - references[pair.chosen.id]
            loss = 0.7 * float(pair.chosen.weights.sum()) * -F.logsigmoid(0.3 * margin) + weighted(model, pair.chosen)
            loss.backward()  # type: ignore[no-untyped-call]
            value += loss.item()
        return value

    micro_batches = pack_pairs(pairs, max_tokens, references, seed=1, epoch=0)
    assert len(micro_batches) == (1 if max_tokens == 500 else 3)
    assert_equal(fast(packed_model, micro_batches), gradients(model, plainly))


def test_the_first_models_margins_are_the_reference(open_tiny: Opener) -> None:
    model, pairs = open_tiny(), some_pairs()
    (packed,) = pack_pairs(pairs, 500, {}, seed=0, epoch=0)
    assert packed.pairs is not None
    found = dict(zip(packed.pairs.ids, model.pair_margins(packed).tolist(), strict=True))
    for pair in pairs:
        ids = (pair.chosen.token_ids.tolist(), pair.rejected_ids.tolist())
        chosen, rejected = (nll(model, one, pair.prompt_length).item() for one in ids)
        assert found[pair.chosen.id] == pytest.approx(rejected - chosen, rel=TOLERANCE)
    model.answer_losses = AnswerLosses(dpo_weight=1.0)
    again = pack_pairs(pairs, 500, found, seed=0, epoch=0)
    weight = sum(float(pair.chosen.weights.sum()) for pair in pairs)
    assert model.loss(again[0], 1.0).extra_sum == pytest.approx(weight * np.log(2), rel=TOLERANCE)


def some_examples() -> list[Example]:
    dice = np.random.default_rng(4)
    shared = tokens(dice, 35)
    flags: list[bool | None] = [True, False, None, True]
    made = [
        an_example(f"{n}", shared if n % 2 else tokens(dice, 5), tokens(dice, 1 + n), is_call=flag)
        for n, flag in enumerate(flags)
    ]
    return [*made, Example("kl", made[0].token_ids, made[0].weights, "kl", kl=True, is_call=True)]


def test_the_chance_of_a_complete_call(open_tiny: Opener) -> None:
    model, examples = open_tiny(), some_examples()
    model.answer_losses = AnswerLosses(sequence_weight=50.0)

    def plainly() -> float:
        value = 0.0
        for one in examples:
            loss = weighted(model, one)
            if one.is_call and not one.kl:
                first = int(np.flatnonzero(one.weights)[0])
                p = torch.exp(-nll(model, one.token_ids.tolist(), first))
                loss = loss + 50 * float(one.weights.sum()) * (1 - p)
            loss.backward()  # type: ignore[no-untyped-call]
            value += loss.item()
        return value

    assert_equal(fast(model, pack(examples, 200, seed=0, epoch=0)), gradients(model, plainly))


def test_the_tool_or_not_head(open_tiny: Opener) -> None:
    model, examples = open_tiny(), some_examples()
    assert len(model.trained()) == len(model.parameters())
    model.answer_losses = AnswerLosses(call_head_weight=0.5)
    head = {name: one for name, one in model.trained().items() if name not in model.parameters()}
    assert set(head) == {"call_head.weight", "call_head.bias"}
    with torch.no_grad():
        head["call_head.weight"].copy_(torch.linspace(-1, 1, 64))
        head["call_head.bias"].fill_(0.3)

    def plainly() -> float:
        value = 0.0
        for one in examples:
            loss = weighted(model, one)
            if one.is_call is not None and not one.kl:
                last_of_prompt = int(np.flatnonzero(one.weights)[0]) - 1
                (packed,) = pack([one], len(one.token_ids), seed=0, epoch=0)
                rows = np.array([last_of_prompt])
                state = model._hidden(model._layers, packed.token_ids, packed.positions, packed.segments, rows)
                chance = torch.sigmoid(state[0] @ head["call_head.weight"] + head["call_head.bias"])
                said = chance if one.is_call else 1 - chance
                loss = loss - 0.5 * float(one.weights.sum()) * said.log().sum()
            loss.backward()  # type: ignore[no-untyped-call]
            value += loss.item()
        return value

    assert_equal(fast(model, pack(examples, 200, seed=0, epoch=0)), gradients(model, plainly))


def test_off_changes_no_bit(open_tiny: Opener) -> None:
    first, second = (open_tiny(spec=LoraSpec(rank=4), dtype=torch.float32) for _ in range(2))
    pairs = pack_pairs(some_pairs(), 500, {}, seed=0, epoch=0)
    bare = [Packed(**{**vars(one), "answers": None, "pairs": None}) for one in pairs]
    with_parts, without = fast(first, pairs), fast(second, bare)
    assert with_parts[0] == without[0]
    assert all(torch.equal(with_parts[1][name], without[1][name]) for name in without[1])
