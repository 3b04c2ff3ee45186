"""First weights that copy: they do, before any training; and shapes that have no room for them are refused."""

from typing import Any

import numpy as np
import pytest

from finetune.errors import TrainingError
from finetune.qat.copying import copying_examples
from finetune.qat.induction import ROPE_THETA, begin_with_induction
from finetune.qat.model import QatModel
from finetune.qat.shape import Shape


def shape(**options: Any) -> Shape:
    sizes = {"hidden_size": 512, "intermediate_size": 256, "num_layers": 2, "num_heads": 8, "num_kv_heads": 4}
    return Shape(**{"vocab_size": 500, "rope_theta": ROPE_THETA, **sizes, **options})


def share_copied(model: QatModel, num_tokens: int = 495) -> float:
    right = []
    for one in copying_examples(np.arange(5, 5 + num_tokens, dtype=np.int32), 12, seed=1):
        at = np.flatnonzero(one.weights)
        found = model.logits(one.token_ids, at - 1).argmax(1).numpy()
        right += (found == one.token_ids[at]).tolist()
    return float(np.mean(right))


@pytest.mark.parametrize("seed", [0, 1])
def test_it_copies_before_any_training(seed: int) -> None:
    model = QatModel(shape(), seed=seed)
    assert share_copied(model) < 0.05
    begin_with_induction(model.shape, model.parameters(), seed=seed)
    assert share_copied(model) > 0.8
    assert share_copied(model, num_tokens=10) > 0.6  # numbers are made of so few


def test_the_seed_decides_all_of_it() -> None:
    models = [QatModel(shape()) for _ in range(2)]
    for model in models:
        begin_with_induction(model.shape, model.parameters(), seed=3)
    first, second = (model.parameters() for model in models)
    assert all(first[name].equal(second[name]) for name in first)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layers": 1}, "two layers, not 1"),
        ({"residual_streams": 2}, "one residual stream, not 2"),
        ({"tie_embeddings": False}, "the output head"),
        ({"num_heads": 4, "num_kv_heads": 1}, "an even number of key heads, not 1"),
    ],
)
def test_shapes_without_room(options: dict[str, Any], message: str) -> None:
    model = QatModel(shape(**options))
    with pytest.raises(TrainingError, match=message):
        begin_with_induction(model.shape, model.parameters(), seed=0)
