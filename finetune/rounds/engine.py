"""Takes a round from phase to phase until it is over, whatever dies on the way.

Each phase is a function that may be cut off anywhere and begun again: it leaves its files in the round's directory,
and its result is in the row before the next phase begins. Between phases, and whenever a phase calls `task.check()`,
the round stops when it is told to, when somebody else has the lease, and begins anew when one of its traces was
deleted. Whatever is the data's or the operator's fault ends it with one reason; a server or database that is away does
not: the round stays where it is. Not here: what the phases do (work.py).
"""

import logging
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from finetune.dataset.errors import NothingToLearnError
from finetune.errors import DivergedError, FinetuneError
from finetune.rounds.errors import LeaseLostError, SnapshotChangedError, StoppedError
from finetune.rounds.lease import Lease
from finetune.rounds.round import Phase, Result, Round, RoundRef
from finetune.rounds.store import RoundStore
from quant.errors import ModelFileError
from server.errors import ServerUnavailableError, SternaError

logger = logging.getLogger(__name__)

DELETION_LOOK_SECONDS = 5.0
"""A deletion stops the training on what was deleted within this. One look is a query on an index."""


class Observer(Protocol):
    """Who wants to see a round go on: metrics, a terminal."""

    def on_phase(self, round: Round) -> None:
        """It is in this phase now, or over."""

    def on_progress(self, round: Round, num_done: int, num_in_all: int, **values: float) -> None:
        """Of the phase; `values`: loss, learning_rate, grad_norm, tokens_per_second, ..."""


@dataclass(frozen=True, slots=True)
class Done:
    """A phase is done. `columns`: of the row (snapshot, version, decision)."""

    facts: Mapping[str, Any]
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Over:
    """The round is."""

    result: Result
    reason: str
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Task:
    """One phase of one round, as the function that does it sees it."""

    round: Round
    folder: Path
    check: Callable[[], None]
    """To be called often. Raises whatever cuts the phase off."""
    note: Callable[[Mapping[str, Any]], Round]
    """Writes facts that must be found again when the phase is cut off."""
    progress: Callable[..., None]
    """(num_done, num_in_all, **values)"""


Stage = Callable[[Task], Done | Over]


class RoundEngine:
    def __init__(
        self,
        store: RoundStore,
        stages: Mapping[Phase, Stage],
        root: Path,
        *,
        deleted_from: Callable[[str], list[str]],
        abandon: Callable[[Round, str], None],
        observer: Observer,
        is_stopping: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`deleted_from`: traces of a snapshot (by digest) that were deleted since. `abandon`: rejects what a round has
        imported, if it has; may be called twice."""
        self._store = store
        self._stages = stages
        self._root = root
        self._deleted_from = deleted_from
        self._abandon = abandon
        self._observer = observer
        self._is_stopping = is_stopping
        self._clock = clock
        self._last_look = -float("inf")

    def run(self, lease: Lease, round: Round) -> Round:
        """Until it is over. Raises StoppedError, LeaseLostError, ServerUnavailableError: then it can be run again."""
        while round.result is None:
            self._clean(round)
            try:
                round = self._one_phase(lease, round)
            except SnapshotChangedError as error:
                logger.warning("%s begins anew: %s", round.ref, error)
                round = self._anew(lease, round, str(error))
            except NothingToLearnError as error:
                self._abandon(round, f"{round.ref} began anew and found nothing to learn: {error}")
                round = self._over(lease, round, Over(Result.NOTHING_TO_LEARN, str(error)))
            except (StoppedError, LeaseLostError, ServerUnavailableError):
                raise
            except (FinetuneError, SternaError, ModelFileError, OSError) as error:
                round = self.fail(lease, round, _reason(error))
        self._observer.on_phase(round)
        return round

    def fail(self, lease: Lease, round: Round, reason: str) -> Round:
        """Nothing of it is promoted."""
        logger.error("%s failed in phase '%s': %s", round.ref, round.phase, reason)
        self._abandon(round, f"{round.ref} failed: {reason}")
        return self._over(lease, round, Over(Result.FAILED, reason))

    def folder(self, round: Round) -> Path:
        """A round that begins anew does so in a new folder: nothing of the old one can be taken for its own."""
        return self._root / str(round.ref) / f"attempt-{round.num_restarts}"

    def sweep(self) -> None:
        """Remove the files of rounds that are over; killed in between, they were left behind."""
        for folder in self._root.glob("*/attempt-*"):
            ref = RoundRef.parse(folder.parent.name)
            unfinished = None if ref is None else self._store.unfinished(ref.adapter)
            if unfinished is None or folder != self.folder(unfinished):
                shutil.rmtree(folder)

    def _one_phase(self, lease: Lease, round: Round) -> Round:
        folder = self.folder(round)
        if round.phase not in (Phase.SNAPSHOT, Phase.PROMOTE) and not folder.is_dir():  # the last needs no file
            raise SnapshotChangedError(f"its files ({folder}) are not on this machine")
        folder.mkdir(parents=True, exist_ok=True)
        self._observer.on_phase(round)
        self._last_look = -float("inf")

        def check() -> None:
            self._check(lease, round)

        def note(facts: Mapping[str, Any]) -> Round:
            nonlocal round
            round = self._store.note(lease, round, facts)
            return round

        def progress(num_done: int, num_in_all: int, **values: float) -> None:
            self._observer.on_progress(round, num_done, num_in_all, **values)

        check()
        done = self._stages[round.phase](Task(round, folder, check, note, progress))
        if isinstance(done, Over):
            return self._over(lease, round, done)
        return self._store.advance(lease, round, done.facts, **done.columns)

    def _check(self, lease: Lease, round: Round) -> None:
        if self._is_stopping():
            raise StoppedError(f"{round.ref} stops in phase '{round.phase}', and goes on there when it is run again")
        lease.check()
        now = self._clock()
        if round.snapshot is None or now - self._last_look < DELETION_LOOK_SECONDS:
            return
        self._last_look = now
        deleted = self._deleted_from(round.snapshot)
        if deleted:
            raise SnapshotChangedError(f"{len(deleted)} of its traces were deleted")

    def _anew(self, lease: Lease, round: Round, reason: str) -> Round:
        old = self.folder(round)
        round = self._store.restart(lease, round, reason)
        shutil.rmtree(old, ignore_errors=True)
        return round

    def _over(self, lease: Lease, round: Round, over: Over) -> Round:
        round = self._store.finish(lease, round, over.result, over.reason, over.facts)
        logger.info("%s: %s: %s", round.ref, over.result, over.reason)
        self._clean(round)
        return round

    def _clean(self, round: Round) -> None:
        """What earlier attempts left; of a finished round everything: it holds what people said."""
        for folder in (self._root / str(round.ref)).glob("attempt-*"):
            if round.result is not None or folder != self.folder(round):
                shutil.rmtree(folder)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return f"training diverged: {text}" if isinstance(error, DivergedError) else text
