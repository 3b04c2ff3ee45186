"""One version's watch, from canary to retirement: an episode in, a verdict out, the state as JSON in between.

As a canary: promoted when all "no harm beyond the margin" tests have succeeded, rolled back when there is evidence of
harm; then live, watched against the held-back predecessor by the same e-process, so that the 1 % of false rollbacks is
spent once per version and not once per phase. Neither depends on when anybody looks. Episodes are taken in the order of
their positions, each once; those that went to a version by name instead of by the draw must not be given.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum

import numpy as np
from pydantic import TypeAdapter

from finetune.errors import FinetuneError
from finetune.watch.processes import MAX_STRATA, Metric, Processes, harm_tests, safety_tests
from finetune.watch.settings import WatchSettings


class WatchError(FinetuneError):
    """An observation or a stored state that cannot be taken."""


class Phase(StrEnum):
    CANARY = "canary"
    LIVE = "live"
    ENDED = "ended"
    """Rolled back: the verdict is final."""


class Verdict(StrEnum):
    GO_ON = "go_on"
    PROMOTE = "promote"
    ROLL_BACK = "roll_back"


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """What one ended episode has shown; None: not measured. Shares of requests above 1 count as 1."""

    position: int
    """Increases from one to the next; what is not above the last one taken is ignored, so a replay does no harm."""
    is_new: bool
    """Answered by the version that is watched; else by the one that it is compared with."""
    share_new: float
    """Of episodes that were drawn to the watched version when this one began."""
    stratum: str
    """The tools that were offered: known before the answer, which may not choose its own stratum."""
    call_rate: float | None = None
    """Of its requests with tools offered, the share answered with a call; None without such a request."""
    tool_errors: float | None = None
    """Results that report an error, per request with tools; retries likewise."""
    retries: float | None = None
    malformed: float | None = None
    """Share of its requests with tools whose answer holds a malformed call."""
    feedback: float | None = None
    """Mean score, 0 to 1, of what came before the episode was taken."""
    latency_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Evidence:
    """How one test stands. E-values: 1 is nothing, and 1/x is shown at level x, whenever one looks."""

    metric: str
    what: str
    """"rise" or "fall": harm of that kind; "rise excluded" or "fall excluded": none beyond the margin."""
    e_value: float
    needed: float
    new_mean: float | None
    old_mean: float | None


class Watch:
    def __init__(self, version: str, settings: WatchSettings | None = None, *, phase: Phase = Phase.CANARY) -> None:
        self.version = version
        self.settings = settings or WatchSettings()
        self.phase = phase
        self.position = -1
        self.num_episodes = [0, 0]
        """Old, new."""
        self._strata: dict[str, int] = {}
        self._sums = np.zeros((2, len(Metric)))
        self._counts = np.zeros((2, len(Metric)))
        self._processes = Processes(self.settings)

    def take(self, episode: Episode) -> Verdict:
        """Raises WatchError. After ROLL_BACK nothing more is taken."""
        if self.phase is Phase.ENDED:
            return Verdict.ROLL_BACK
        if episode.position <= self.position:
            return Verdict.GO_ON
        values = _values(episode)
        self.position = episode.position
        if not 0 < episode.share_new < 1:  # no draw, so it tells nothing
            return Verdict.GO_ON
        number = self._strata.setdefault(episode.stratum, len(self._strata)) if self._has_room(episode) else MAX_STRATA
        self._processes.update(
            values[None], np.array([episode.is_new]), np.array([episode.share_new]), np.array([number])
        )
        arm = int(episode.is_new)
        self.num_episodes[arm] += 1
        self._sums[arm] += np.nan_to_num(values)
        self._counts[arm] += ~np.isnan(values)
        return self._judge()

    def _has_room(self, episode: Episode) -> bool:
        return episode.stratum in self._strata or len(self._strata) < MAX_STRATA

    def _judge(self) -> Verdict:
        if self._processes.log_harm[0] >= math.log(1 / self.settings.false_rollback):
            self.phase = Phase.ENDED
            return Verdict.ROLL_BACK
        if self.phase is Phase.CANARY and self._is_safe():
            self.phase = Phase.LIVE
            return Verdict.PROMOTE
        return Verdict.GO_ON

    def _is_safe(self) -> bool:
        return bool((self._processes.best_safety[0] >= math.log(1 / self.settings.false_promotion)).all())

    @property
    def e_value(self) -> float:
        """Of harm anywhere; a rollback at 1 / false_rollback."""
        return _exp(self._processes.log_harm[0])

    def evidence(self) -> list[Evidence]:
        """Every test; of harm, the e-value that this test alone would need for a rollback."""
        harm, safety = harm_tests(self.settings), safety_tests(self.settings)
        tests = [*harm, *safety]
        logs = [*self._processes.log_by_test[0], *self._processes.best_safety[0]]
        result = []
        for test, log in zip(tests, logs, strict=True):
            is_harm = test.weight > 0
            what = ("rise" if test.direction > 0 else "fall") if is_harm else _EXCLUDED[test.direction]
            needed = 1 / (self.settings.false_rollback * test.weight) if is_harm else 1 / self.settings.false_promotion
            old, new = (self._mean(arm, test.metric) for arm in (0, 1))
            result.append(Evidence(test.metric.name.lower(), what, _exp(log), needed, new, old))
        return result

    def _mean(self, arm: int, metric: Metric) -> float | None:
        count = self._counts[arm, metric]
        return float(self._sums[arm, metric] / count) if count else None

    def to_json(self) -> str:
        """Everything: `from_json` goes on as if nothing had happened, to the last bit."""
        stored = _Stored(
            version=self.version,
            settings=self.settings,
            phase=self.phase,
            position=self.position,
            num_episodes=self.num_episodes,
            strata=list(self._strata),
            sums=self._sums.tolist(),
            counts=self._counts.tolist(),
            processes=self._processes.state(),
        )
        return _STORED.dump_json(stored).decode()

    @staticmethod
    def from_json(text: str | bytes) -> "Watch":
        """Raises WatchError."""
        try:
            stored = _STORED.validate_json(text)
            watch = Watch(stored.version, stored.settings, phase=stored.phase)
            watch._processes.restore(stored.processes)
        except (ValueError, KeyError) as error:
            raise WatchError(f"this is no state of a watch: {error}") from error
        watch.position = stored.position
        watch.num_episodes = list(stored.num_episodes)
        watch._strata = {name: number for number, name in enumerate(stored.strata)}
        watch._sums, watch._counts = np.array(stored.sums), np.array(stored.counts)
        return watch


def _exp(log: float) -> float:
    return math.exp(min(log, 700.0))  # of what has been shown for long; e^710 is no float any more


_EXCLUDED: Mapping[int, str] = {-1: "rise excluded", 1: "fall excluded"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stored:
    version: str
    settings: WatchSettings
    phase: Phase
    position: int
    num_episodes: list[int]
    strata: list[str]
    sums: list[list[float]]
    counts: list[list[float]]
    processes: dict[str, list]


_STORED: TypeAdapter[_Stored] = TypeAdapter(_Stored)

_SHARES = ("call_rate", "tool_errors", "retries", "feedback", "malformed")


def _values(episode: Episode) -> np.ndarray:
    """[metrics]; NaN where not measured."""
    given = asdict(episode)
    for name in (*_SHARES, "latency_seconds", "share_new"):
        value = given[name]
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise WatchError(f"'{name}' is a number from 0 on, not {value}")
    if episode.share_new > 1:
        raise WatchError(f"'share_new' lies between 0 and 1, not {episode.share_new}")
    shares = [math.nan if given[name] is None else min(given[name], 1.0) for name in _SHARES]
    return np.array([*shares, math.nan if episode.latency_seconds is None else episode.latency_seconds])
