"""The difference of two versions against the slow twin that forms every matrix."""

from pathlib import Path

import numpy as np
import pytest

from server.adapters.compare import compare_configs, compare_weights
from server.engine.lora_types import PROJECTIONS, LoraProjection, LoraWeights
from tests.server.adapters.make import adapter_dir


def weights(seed: int, projections: tuple[str, ...], rank: int, scale: float = 2.0) -> LoraWeights:
    rng = np.random.default_rng(seed)
    parts = tuple(
        LoraProjection(
            layer, name, rng.standard_normal((rank, 8), np.float32), rng.standard_normal((12, rank), np.float32), scale
        )
        for layer in range(2)
        for name in projections
    )
    return LoraWeights(rank, parts, f"sha256:{seed}")


def formed(part: LoraProjection) -> np.ndarray:
    return part.scale * part.b.astype(np.float64) @ part.a.astype(np.float64)


@pytest.mark.parametrize("rank", [1, 4, 8])  # 8 + 8 columns are more than A has
def test_equals_the_norms_of_the_formed_matrices(rank: int) -> None:
    left, right = weights(1, PROJECTIONS, rank), weights(2, PROJECTIONS, rank, scale=0.5)
    rows = compare_weights(left, right)
    assert [(row.layer, row.projection) for row in rows] == [(n, name) for n in range(2) for name in PROJECTIONS]
    for row, one, other in zip(rows, left.projections, right.projections, strict=True):
        expected = [np.linalg.norm(matrix) for matrix in (formed(one), formed(other), formed(one) - formed(other))]
        assert [row.left_norm, row.right_norm, row.difference_norm] == pytest.approx(expected, rel=1e-12)


def test_equal_and_almost_equal_versions() -> None:
    left, right = weights(1, ("q_proj",), 4), weights(1, ("q_proj",), 4)
    assert [row.difference_norm for row in compare_weights(left, right)] == pytest.approx([0, 0], abs=1e-13)
    right.projections[0].b[0, 0] += np.float32(2**-10)
    moved = 2.0 * np.linalg.norm((right.projections[0].b - left.projections[0].b).astype(float) @ left.projections[0].a)
    assert compare_weights(left, right)[0].difference_norm == pytest.approx(moved, rel=1e-6)


def test_matrices_that_only_one_adapts() -> None:
    rows = compare_weights(weights(1, ("q_proj", "up_proj"), 2), weights(2, ("v_proj", "up_proj"), 3))
    assert [row.projection for row in rows] == ["q_proj", "v_proj", "up_proj"] * 2
    for row in rows:
        if row.projection == "q_proj":
            assert (row.right_norm, row.difference_norm) == (0, pytest.approx(row.left_norm, rel=1e-12))
        if row.projection == "v_proj":
            assert (row.left_norm, row.difference_norm) == (0, pytest.approx(row.right_norm, rel=1e-12))


def test_configurations(tmp_path: Path) -> None:
    left = adapter_dir(tmp_path / "a", lora_alpha=6)
    right = adapter_dir(tmp_path / "b", lora_alpha=8, use_rslora=True)
    assert compare_configs(left, right) == {"lora_alpha": (6, 8), "use_rslora": (None, True)}
