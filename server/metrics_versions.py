"""The label `model` of every family that has it: which of its values exist, and which must go to make room.

A label value is a version that answered (`tools@7`) or the base model's served name, never what a client wrote. At most
MAX_VERSIONS of them exist at once: one more takes the place of the value that was used longest ago, whose series go out
of all families together. Prometheus sees that as series that end, and as a counter that starts at 0 if it comes back.

Any thread may ask for a child. A child that was handed out before its label went counts into nothing.
"""

from collections import OrderedDict
from collections.abc import Iterable
from threading import Lock
from typing import TypeVar

from prometheus_client import Counter, Histogram, Summary

Family = Counter | Histogram | Summary
FamilyT = TypeVar("FamilyT", Counter, Histogram, Summary)

MAX_VERSIONS = 64
"""About 90 series each, so some 6,000: twice the versions that a server keeps loaded by default."""


class VersionLabels:
    """`at_once`: families with what follows `model` in their labels, for which a new value begins at 0 right away."""

    def __init__(
        self, at_once: Iterable[tuple[Family, tuple[str, ...]]] = (), *, max_versions: int = MAX_VERSIONS
    ) -> None:
        self._at_once = tuple(at_once)
        self._max_versions = max_versions
        self._series: OrderedDict[str, set[tuple[Family, tuple[str, ...]]]] = OrderedDict()
        """By label value, the one used longest ago first."""
        self._lock = Lock()

    def child(self, family: FamilyT, model: str, *rest: str) -> FamilyT:
        """The series of `model`; `rest` are the values of the family's other labels, each from a fixed list."""
        labels = (model, *rest)
        with self._lock:
            series = self._series.get(model)
            if series is None:
                series = self._admit(model)
            else:
                self._series.move_to_end(model)
            series.add((family, labels))
            return family.labels(*labels)

    def _admit(self, model: str) -> set[tuple[Family, tuple[str, ...]]]:
        if len(self._series) >= self._max_versions:
            _, gone = self._series.popitem(last=False)
            for family, labels in gone:
                family.remove(*labels)
        series = self._series[model] = {(family, (model, *rest)) for family, rest in self._at_once}
        for family, labels in series:
            family.labels(*labels)
        return series
