"""What the model that a round begins with thinks of its preference pairs: computed once, kept in the round's folder.

The reference of DPO is the base, or a warm start's parent: the very model before its first step, so no second one is in
memory. Written before the first checkpoint, whole or not at all; a round that is taken up reads what is there.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from finetune.dataset.pairs import pack_pairs
from finetune.model.model import TrainModel
from finetune.packed import Preference

REFERENCES = "references.json"


def reference_margins(
    model: TrainModel, pairs: Sequence[Preference], folder: Path, *, micro_batch_tokens: int, pause: Callable[[], None]
) -> dict[str, float]:
    """log p(chosen) - log p(rejected) by the chosen example's id. `model`: before its first step."""
    path = folder / REFERENCES
    if path.exists():
        known: dict[str, float] = json.loads(path.read_bytes())
        return known
    found: dict[str, float] = {}
    for packed in pack_pairs(pairs, micro_batch_tokens, {}, seed=0, epoch=0):
        pause()
        assert packed.pairs is not None
        found |= dict(zip(packed.pairs.ids, model.pair_margins(packed).tolist(), strict=True))
    new = path.with_suffix(".new")
    new.write_text(json.dumps(found))
    new.rename(path)
    return found
