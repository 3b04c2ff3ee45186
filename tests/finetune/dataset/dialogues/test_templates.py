"""Templates: distinct once masked, shares exact, families apart; and the draws behind them are the same everywhere."""

from collections import Counter

import numpy as np
import pytest

from finetune.dataset.dialogues.distinct import DistinctSets, jaccard, nearest_pair
from finetune.dataset.dialogues.drawing import Dice, Drawer, is_reserved
from finetune.dataset.dialogues.scenarios import scenarios
from finetune.dataset.dialogues.subjects import subjects
from finetune.dataset.dialogues.templates import SHARES, THRESHOLD, make_templates, mixed
from finetune.dataset.dialogues.toolbox import SEEN, TOOLS, UNSEEN
from finetune.dataset.dialogues.wording import expand, masked_tokens, slot_names
from finetune.dataset.errors import DialogueError

COUNTS = {"train": 400, "validation": 20, "families": 80, "unseen_tools": 20}


@pytest.fixture(scope="module")
def templates() -> list:
    return list(make_templates(COUNTS, seed=3))  # type: ignore[arg-type]


def test_no_two_templates_are_near_once_their_slots_are_masked(templates: list) -> None:
    nearest, _, _ = nearest_pair([masked_tokens(one.text) for one in templates])
    assert 0.5 < nearest < THRESHOLD


def test_kinds_have_their_shares_and_families_take_turns(templates: list) -> None:
    train = [one for one in templates if one.part == "train"]
    kinds = Counter(one.kind for one in train)
    assert {kind: count / 400 for kind, count in kinds.items()} == pytest.approx(dict(SHARES))
    families = Counter(one.family.name for one in train)
    assert set(families) == {family.name for family in scenarios().of("train")}
    assert max(families.values()) - min(families.values()) <= 1


def test_families_and_tools_stay_in_their_part(templates: list) -> None:
    split_of = {"train": "train", "validation": "validation", "families": "held_out", "unseen_tools": "held_out"}
    for one in templates:
        assert one.family.split == split_of[one.part]
        called = {step.tool for step in one.subject.steps}
        assert called <= set(UNSEEN if one.part == "unseen_tools" else SEEN)
        asked_for = one.subject.key.removeprefix("unfit:").split(".")[0]
        assert one.part == "unseen_tools" or asked_for not in UNSEEN


def test_a_set_that_the_grammar_cannot_fill_is_refused_with_what_ran_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.dataset.dialogues.templates.THRESHOLD", 0.15)
    with pytest.raises(
        DialogueError, match=r"no more distinct templates for .* requests of the group '.*' in the family"
    ):
        list(make_templates({"train": 400}, seed=3))


def test_distinct_sets_finds_what_comparing_all_pairs_finds() -> None:
    for seed in range(30):
        dice = Dice("sets", seed)
        words = [f"{'w' * (number % 7)}{number}" for number in range(40)]
        known, kept = DistinctSets(0.6), []
        for _ in range(60):
            one = frozenset(dice.sample(words, dice.between(1, 12)))
            is_near = any(jaccard(one, other) >= 0.6 for other in kept)
            assert known.add(one) == (not is_near)
            if not is_near:
                kept.append(one)
        pairs = [jaccard(a, b) for i, a in enumerate(kept) for b in kept[:i]]
        assert nearest_pair(kept)[0] == pytest.approx(max(pairs))


def test_every_wording_names_what_its_calls_require() -> None:
    for many in subjects().values():
        for one in many:
            for wording in set(one.wordings):
                for step in one.steps_for(wording):
                    assert set(TOOLS[step.tool].required) <= set(step.arguments), (one.key, wording)


def test_every_wording_and_answer_has_its_slots_drawn() -> None:
    words = next(iter(scenarios().families.values())).words
    for many in subjects().values():
        for one in many:
            slots = one.draw(Drawer(Dice(one.key), words, pool="any"))
            for text in {*one.wordings, *one.answers}:
                named = slot_names(text) - {"result"}
                assert named <= slots.keys(), (one.key, text)


def test_wordings_expand_to_plain_text(templates: list) -> None:
    for one in templates:
        assert not set("[]|<>") & set(one.text), one.text
    words = {"person": ["the cook"], "things": ["cups"]}
    assert expand("<Person> and <person> [wash|dry] <things>.", words, Dice(0)) in (
        "The cook and the cook wash cups.",
        "The cook and the cook dry cups.",
    )


def test_mixed_spreads_shares_evenly() -> None:
    order = mixed(SHARES, 1000)
    for kind, share in SHARES.items():
        places = np.array([kind == one for one in order])
        assert places.sum() == round(1000 * share)
        running = places.cumsum() - share * np.arange(1, 1001)
        assert np.abs(running).max() <= 1


def test_draws_are_the_same_on_every_machine() -> None:
    dice = Dice("a", 1)
    assert [dice.between(1, 100) for _ in range(5)] == [72, 9, 45, 63, 70]
    assert [number for number in range(10, 60) if is_reserved(str(number))] == [14, 26, 35, 38, 39, 54, 58]
