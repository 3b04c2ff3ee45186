"""How two versions differ: keys of their configurations, and for each matrix how far the change of the base moved.

The change is scale * B @ A, never formed: its Frobenius norm is that of the small product R_B @ R_A^T of the QR
factors of B and A^T, which stays accurate when two versions are almost equal.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from server.engine.lora import CONFIG_NAME
from server.engine.lora_types import PROJECTIONS, LoraProjection, LoraWeights


@dataclass(frozen=True, slots=True)
class ProjectionDiff:
    """Frobenius norms of the change that each version makes to one matrix, and of the difference of the two."""

    layer: int
    projection: str
    left_norm: float
    right_norm: float
    difference_norm: float


def compare_weights(left: LoraWeights, right: LoraWeights) -> list[ProjectionDiff]:
    """One row for each matrix that either of them adapts, in layer order."""
    sides = [{(part.layer, part.projection): part for part in one.projections} for one in (left, right)]
    keys = sorted(sides[0].keys() | sides[1].keys(), key=lambda key: (key[0], PROJECTIONS.index(key[1])))
    rows = []
    for key in keys:
        a, b = (side.get(key) for side in sides)
        rows.append(ProjectionDiff(*key, _norm([(a, 1)]), _norm([(b, 1)]), _norm([(a, 1), (b, -1)])))
    return rows


def compare_configs(left: Path, right: Path) -> dict[str, tuple[Any, Any]]:
    """Keys whose values differ, with both values; None for a key that is missing."""
    configs = [json.loads((path / CONFIG_NAME).read_bytes()) for path in (left, right)]
    keys = sorted(configs[0].keys() | configs[1].keys())
    values = {key: (configs[0].get(key), configs[1].get(key)) for key in keys}
    return {key: pair for key, pair in values.items() if pair[0] != pair[1]}


def _norm(parts: list[tuple[LoraProjection | None, int]]) -> float:
    """Of the sum of sign * scale * B @ A over the parts."""
    present = [(part, sign) for part, sign in parts if part is not None]
    if not present:
        return 0.0
    b = np.hstack([sign * part.scale * part.b.astype(np.float64) for part, sign in present])
    a = np.vstack([part.a.astype(np.float64) for part, _ in present])
    r_b, r_a = np.asarray(np.linalg.qr(b, mode="r")), np.asarray(np.linalg.qr(a.T, mode="r"))
    return float(np.linalg.norm(r_b @ r_a.T))
