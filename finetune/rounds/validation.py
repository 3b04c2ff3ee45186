"""The validation part of a round: some clusters of the training side that are not trained on but measured now and then.

By their loss training stops early and the best checkpoint is chosen. Never held-out traces: the gate's evidence must
not have chosen what it judges. Which clusters is drawn from digests of (seed, name). General examples are always
trained on: their loss is a distance to the base, which every step makes larger. Not here: when it is measured
(finetune/train/loop.py).
"""

from collections.abc import Sequence

from finetune.dataset.order import shuffled
from finetune.packed import Example
from finetune.rounds.errors import RoundError

MOST_COST = 0.03
"""Of the time of the steps between two evaluations that one of them may take."""
FORWARD_SHARE = 1 / 3
"""Of a training step's time that the same tokens take without gradients."""
LEAST_CLUSTERS = 2


def split_validation(
    examples: Sequence[Example], *, share: float, evaluate_every: int, tokens_per_step: int, seed: int
) -> tuple[list[Example], list[Example]]:
    """(to train on, to validate on). At most `share` of the clusters and `MOST_COST` of the time, at least one cluster.

    Raises RoundError where there are too few clusters for both sides.
    """
    clusters: dict[str, int] = {}
    for one in examples:
        if not one.kl:
            clusters[one.cluster] = clusters.get(one.cluster, 0) + len(one.token_ids)
    if len(clusters) < LEAST_CLUSTERS:
        raise RoundError(
            f"evaluate_every takes a validation part from the training data, which has {len(clusters)} clusters; "
            f"it needs {LEAST_CLUSTERS} or more"
        )
    names = sorted(clusters)
    most_tokens = MOST_COST / FORWARD_SHARE * evaluate_every * tokens_per_step
    most_clusters = min(max(1, round(share * len(names))), len(names) - 1)
    chosen: set[str] = set()
    num_tokens = 0
    for index in shuffled(names, seed=seed, epoch=0)[:most_clusters]:
        num_tokens += clusters[names[index]]
        if chosen and num_tokens > most_tokens:
            break
        chosen.add(names[index])
    validated = [one for one in examples if not one.kl and one.cluster in chosen]
    return [one for one in examples if one.kl or one.cluster not in chosen], validated
