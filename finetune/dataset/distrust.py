"""Empirical distrust: how much an example's cross-entropy weighs, by who vouches for its answer and by how many.

    d = alpha * (ln(1 - w + eps) + H)^2,   w: authority weight in [0, 1),   H: provenance entropy in bits

As a term that is added to the loss it would have no gradient, so it multiplies the example's cross-entropy, normalized
over the optimizer step (finetune/rounds/steps.py), where alpha cancels out. Our reading of its two numbers: w is a
constant of the feedback's source, H the entropy of (origin, source) among the examples that offer the same tools.
Off by default.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping

from finetune.dataset.rows import ExampleRow

EPS = 1e-8
AUTHORITY: Mapping[str, float] = {
    "known_answer": 0.9,
    "audit_sample": 0.8,
    "import": 0.5,
    "user_correction": 0.4,
    "thumbs": 0.2,
    "": 0.0,
}
"""By source. Known answers and audits come from one place that all others are measured by; a user speaks for one trace.
Not tuned: benchmarks/ablations.py tells whether any of it helps."""
LEAST = 1e-3
"""Of a weight, so that no example vanishes from the loss."""


def distrust(authority: float, entropy_bits: float, *, alpha: float = 1.0, eps: float = EPS) -> float:
    """Raises ValueError for an authority outside of [0, 1) or a negative entropy."""
    if not 0 <= authority < 1 or entropy_bits < 0:
        raise ValueError(f"authority is {authority}, entropy {entropy_bits} bits; accepted: 0 to below 1, 0 or more")
    return alpha * (math.log(1 - authority + eps) + entropy_bits) ** 2


def doubts(rows: Iterable[ExampleRow]) -> dict[str, float]:
    """By the row's id."""
    known = [(row.id, tuple(sorted(row.tools)), row.origin, row.source) for row in rows]
    counts: dict[tuple[str, ...], Counter[tuple[str, str]]] = {}
    for _, tools, origin, source in known:
        counts.setdefault(tools, Counter())[origin, source] += 1
    bits = {tools: _entropy_bits(found) for tools, found in counts.items()}
    return {id_: max(LEAST, distrust(AUTHORITY[source], bits[tools])) for id_, tools, _, source in known}


def _entropy_bits(counts: Counter[tuple[str, str]]) -> float:
    total = counts.total()
    return sum(-count / total * math.log2(count / total) for count in counts.values()) + 0.0
