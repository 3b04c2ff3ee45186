"""Texts that are nearly equal: shingles, MinHash to find candidates, the exact Jaccard index to decide.

Near-duplicates of a held-out question must not be trained on, and count as one in statistics. A text is its letters and
digits, lower-case, cut into overlapping runs of five characters; two texts are nearly equal when they share `threshold`
of all their runs. "weather in Paris?" and "weather in Rome?" are not: 0.8 takes a change of a few letters in a hundred.

Deterministic, and linear in the number of texts. Not here: which texts of a trace are compared (candidates.py).
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

THRESHOLD = 0.8
SHINGLE = 5
NUM_BANDS, BAND_ROWS = 16, 4
"""Texts with a Jaccard index of 0.8 become candidates with a probability of 0.9998, of 0.7 with 0.988: thresholds below
that would miss pairs."""
MIN_THRESHOLD = 0.7
_CHUNK = 4096
"""Shingles hashed at once: 2 MiB, which the L2 cache nearly holds."""

_NO_WORD = re.compile(r"[\W_]+")
_U64 = np.uint64


def normalized(text: str) -> str:
    """Letters and digits, lower-case, words separated by one space."""
    return _NO_WORD.sub(" ", unicodedata.normalize("NFKC", text).casefold()).strip()


class NearTexts:
    """Texts that were added, and which of them another one nearly equals."""

    def __init__(self, threshold: float = THRESHOLD) -> None:
        if not MIN_THRESHOLD <= threshold <= 1:
            raise ValueError(f"the threshold lies between {MIN_THRESHOLD} and 1, not {threshold}")
        self._threshold = threshold
        self._shingles: list[NDArray[np.uint64]] = []
        self._buckets: defaultdict[bytes, list[int]] = defaultdict(list)

    def __len__(self) -> int:
        return len(self._shingles)

    def add(self, text: str) -> list[int]:
        """The numbers, in the order of adding, of those added before that it nearly equals; it gets the next one."""
        shingles = shingle_hashes(text)
        bands = _bands(shingles)
        found = self._find(shingles, bands)
        for band in bands:
            self._buckets[band].append(len(self._shingles))
        self._shingles.append(shingles)
        return found

    def has(self, text: str) -> bool:
        shingles = shingle_hashes(text)
        return bool(self._find(shingles, _bands(shingles)))

    def _find(self, shingles: NDArray[np.uint64], bands: Sequence[bytes]) -> list[int]:
        candidates = {number for band in bands for number in self._buckets.get(band, ())}
        return sorted(number for number in candidates if self._is_near(shingles, self._shingles[number]))

    def _is_near(self, a: NDArray[np.uint64], b: NDArray[np.uint64]) -> bool:
        return jaccard(a, b) >= self._threshold


def near_groups(texts: Sequence[str], threshold: float = THRESHOLD) -> list[int]:
    """For each text the smallest index of its connected group: nearly equal, perhaps over others between them."""
    known = NearTexts(threshold)
    return connected(len(texts), [(other, index) for index, text in enumerate(texts) for other in known.add(text)])


def same_groups(*labels: Sequence[Hashable]) -> list[int]:
    """For each index the smallest one of its connected group: equal in one of the lists of labels."""
    first: dict[tuple[int, Hashable], int] = {}
    pairs = [
        (first.setdefault((number, label), index), index)
        for number, one in enumerate(labels)
        for index, label in enumerate(one)
    ]
    return connected(len(labels[0]), pairs)


def connected(count: int, pairs: Iterable[tuple[int, int]]) -> list[int]:
    """For each of `count` things the smallest one that it is connected with by `pairs` (union-find)."""
    root = list(range(count))

    def find(index: int) -> int:
        while root[index] != index:
            root[index] = root[root[index]]
            index = root[index]
        return index

    for one, other in pairs:
        low, high = sorted((find(one), find(other)))
        root[high] = low
    return [find(index) for index in range(count)]


def jaccard(a: NDArray[np.uint64], b: NDArray[np.uint64]) -> float:
    """Of two sets of distinct hashes: the share that both have of all that one of them has."""
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)


def shingle_hashes(text: str) -> NDArray[np.uint64]:
    """Distinct 64-bit hashes of the runs, sorted; a text without letters or digits has one."""
    padded = f" {normalized(text)} ".ljust(SHINGLE)
    codes = np.frombuffer(padded.encode("utf-32-le", "surrogatepass"), "<u4").astype(_U64)
    total = np.zeros(len(codes) - SHINGLE + 1, _U64)
    with np.errstate(over="ignore"):
        for offset in range(SHINGLE):
            total = total * _U64(0x100000001B3) + codes[offset : offset + len(total)]
    return np.unique(_mix(total))


def _bands(shingles: NDArray[np.uint64]) -> list[bytes]:
    """One key a band: equal keys make a candidate."""
    smallest = np.full(len(_SALTS), 2**64 - 1, _U64)
    for start in range(0, len(shingles), _CHUNK):
        salted = shingles[None, start : start + _CHUNK] ^ _SALTS[:, None]
        np.minimum(smallest, _mix(salted).min(axis=1), out=smallest)
    by_band = smallest.astype("<u8").reshape(NUM_BANDS, BAND_ROWS)
    return [bytes([band]) + row.tobytes() for band, row in enumerate(by_band)]


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of splitmix64: every bit of the input moves every bit of the output."""
    with np.errstate(over="ignore"):
        value = (value ^ (value >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> _U64(27))) * _U64(0x94D049BB133111EB)
        return value ^ (value >> _U64(31))


_SALTS = _mix(np.arange(1, NUM_BANDS * BAND_ROWS + 1, dtype=_U64) * _U64(0x9E3779B97F4A7C15))
