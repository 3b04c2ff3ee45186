"""The speed check's rule: what is below its bound is measured again, and only what stays below it fails."""

from collections.abc import Iterator

from benchmarks.regressions import ATTEMPTS, Check, settled


def measured(*values: float) -> Iterator[list[Check]]:
    return iter([[Check("a", value, 2.0, "x"), Check("b", 1.0, 0.5, "%")] for value in values])


def test_what_is_met_is_measured_once() -> None:
    runs = measured(2.5, 9.0)
    assert [check.value for check in settled(lambda: next(runs))] == [2.5, 1.0]


def test_what_was_disturbed_is_measured_again() -> None:
    runs = measured(0.5, 2.2)
    assert all(check.is_met for check in settled(lambda: next(runs)))


def test_what_stays_below_its_bound_fails_with_its_best_value() -> None:
    runs = measured(*(0.5 + 0.1 * i for i in range(ATTEMPTS)))
    slow = [check for check in settled(lambda: next(runs)) if not check.is_met]
    assert [check.row() for check in slow] == [["a", f"{0.5 + 0.1 * (ATTEMPTS - 1):.1f}x", "2.0x", "TOO SLOW"]]
    assert next(runs, None) is None
