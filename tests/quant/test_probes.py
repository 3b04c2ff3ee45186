"""The probes of the machine's limits: they read every word and count every product, on every instruction set."""

import numpy as np
import pytest

import _sterna


@pytest.mark.parametrize("isa", _sterna.available_isas())
def test_all_words_are_read(isa: str) -> None:
    words = np.arange(64 * 5, dtype=np.uint64)
    assert _sterna.probe_read(words.view(np.uint8), isa, 3) == 3 * int(words.sum())


@pytest.mark.parametrize("isa", _sterna.available_isas())
def test_products_are_proportional_to_rounds(isa: str) -> None:
    one = _sterna.probe_dot(isa, 1)
    assert one > 0
    assert one % 64 == 0
    assert _sterna.probe_dot(isa, 1000) == 1000 * one


def test_bytes_that_are_not_aligned_are_refused() -> None:
    with pytest.raises(ValueError, match="aligned"):
        _sterna.probe_read(np.zeros(65, np.uint8)[1:], "scalar")
