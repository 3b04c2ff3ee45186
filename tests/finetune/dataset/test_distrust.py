"""Empirical distrust: the formula, and what our log says of authority and provenance."""

import math
from typing import get_args

import pytest

from finetune.dataset.distrust import AUTHORITY, LEAST, distrust, doubts
from server.traces.feedback import Source
from tests.finetune.dataset.test_examples import row


def test_the_formula() -> None:
    assert distrust(0.0, 0.0) == pytest.approx(0, abs=1e-12)
    assert distrust(0.9, 0.0, eps=0) == pytest.approx(math.log(0.1) ** 2)
    assert distrust(0.5, 3.0, alpha=2.0, eps=0) == pytest.approx(2 * (3 - math.log(2)) ** 2)
    for authority, bits in ((1.0, 0.0), (-0.1, 0.0), (0.5, -1.0)):
        with pytest.raises(ValueError, match="accepted: 0 to below 1"):
            distrust(authority, bits)


def test_every_source_has_an_authority() -> None:
    assert set(AUTHORITY) == {*get_args(Source), "import", ""}
    assert all(0 <= authority < 1 for authority in AUTHORITY.values())


def test_provenance_is_counted_by_tools() -> None:
    given = [
        row(id="a", tools=["x", "y"], source="known_answer"),
        row(id="b", tools=["y", "x"], source="thumbs"),
        row(id="c", tools=["z"], source="thumbs"),
        row(id="d", tools=[], source="", origin="served"),
    ]
    found = doubts(given)
    assert found["a"] == pytest.approx(distrust(0.9, 1.0))
    assert found["b"] == pytest.approx(distrust(0.2, 1.0))
    assert found["c"] == pytest.approx(distrust(0.2, 0.0))
    assert found["d"] == LEAST, "never nothing"
