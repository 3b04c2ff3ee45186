"""Puts a round's parts together: the database, the server, the model, and the engine over them.

    with open_runner(settings, own, remote, observer, ...) as runner:
        runner.run("tools", cause="somebody asked")

A round that is unfinished is taken up first, with the settings that it began with.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from zipfile import BadZipFile

from finetune.config import FinetuneSettings
from finetune.dataset.render import Renderer
from finetune.dataset.snapshot import erase_deleted
from finetune.dataset.source import has_traces
from finetune.rounds.engine import Observer, RoundEngine
from finetune.rounds.errors import CanaryHeldError, RoundError, UnknownAdapterError
from finetune.rounds.lease import Lease, held
from finetune.rounds.promotion import abandon
from finetune.rounds.round import Round
from finetune.rounds.store import RoundStore
from finetune.rounds.work import Work
from finetune.serving.api import ServerApi
from finetune.serving.http import Http
from finetune.sidecar.pause import Pause
from server.adapters.registry import Registry
from server.config import Remote, Settings
from server.errors import ConfigError
from server.machine import physical_cores
from server.models.catalog import resolve_model
from server.storage.database import Database, open_database
from server.traces.lineage import Lineage

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Runner:
    database: Database
    api: ServerApi
    engine: RoundEngine
    store: RoundStore
    settings: FinetuneSettings
    base_digest: str
    snapshots: Path
    sleep: Callable[[float], object]

    def run(
        self,
        adapter: str,
        *,
        cause: str,
        parent: int | None = None,
        is_waiting: bool = True,
        on_wait: Callable[[str], None] = lambda holder: None,
        is_bug_final: bool = False,
    ) -> Round:
        """The unfinished round of the adapter to its end, or else a new one. `on_wait` hears who works on it already.

        `is_bug_final`: an error that nobody foresaw ends the round, so that it is not run into for ever.
        Raises UnknownAdapterError, CanaryHeldError, LeaseHeldError, StoppedError, LeaseLostError,
        ServerUnavailableError.
        """
        with held(self.database, adapter, is_waiting=is_waiting, on_wait=on_wait, sleep=self.sleep) as lease:
            round = self.store.unfinished(adapter)
            if round is None:
                self.check_known(adapter)
                if (canary := self.undecided(adapter)) is not None:
                    raise CanaryHeldError(
                        f"{canary} is a canary and undecided: a round begins once it is live or rejected "
                        f"(sterna adapters promote {canary}, or reject)"
                    )
                round = self.store.begin(
                    lease, cause=cause, base_digest=self.base_digest, settings=self.settings.of_round(), parent=parent
                )
            elif parent is not None and round.parent != parent:
                raise RoundError(f"{round.ref} is unfinished and did not begin with {adapter}@{parent}: run it first")
            return self._to_the_end(lease, round, is_bug_final=is_bug_final)

    def run_requested(self, adapter: str, *, cause: str) -> Sequence[Round]:
        """What is unfinished and then what was asked for, each to its end; nothing where somebody else has begun it.
        While a canary is undecided the request waits.

        Raises as `run`, but never waits for another holder.
        """
        done = []
        with held(self.database, adapter, is_waiting=False, sleep=self.sleep) as lease:
            unfinished = self.store.unfinished(adapter)
            if unfinished is not None:
                done.append(self._to_the_end(lease, unfinished, is_bug_final=True))
            if self.undecided(adapter) is not None:
                return done
            round = self.store.begin_requested(
                lease, cause=cause, base_digest=self.base_digest, settings=self.settings.of_round()
            )
            if round is not None:
                done.append(self._to_the_end(lease, round, is_bug_final=True))
        return done

    def check_known(self, adapter: str) -> None:
        """Raises UnknownAdapterError. What was imported for a name may be learned from before there is an adapter."""
        known = [one.name for one in Registry(self.database).adapters()]
        if adapter not in known and not has_traces(self.database, adapter):
            raise UnknownAdapterError(
                f"there is no adapter '{adapter}', and no trace in the log is of one; adapters here: "
                f"{', '.join(known) or 'none'} (sterna adapters create {adapter})"
            )

    def undecided(self, adapter: str) -> str | None:
        """The adapter's canary. A round beside it would compare with what may not answer any more when it ends."""
        if adapter not in self.api.adapter_names():
            return None
        canary: str | None = self.api.adapter(adapter)["canary"]
        return canary

    def forget(self, adapter: str) -> None:
        """Erase what snapshots hold of traces that were deleted since."""
        for snapshot in erase_deleted(self.snapshots, adapter, self.database):
            logger.info("the content of snapshot %s was erased: a trace in it was deleted", snapshot.digest)

    def _to_the_end(self, lease: Lease, round: Round, *, is_bug_final: bool) -> Round:
        try:
            return self.engine.run(lease, round)
        except (
            AssertionError,
            AttributeError,
            LookupError,
            TypeError,
            ValueError,
            RuntimeError,
            MemoryError,
            EOFError,
            ArithmeticError,
            BadZipFile,
        ) as error:
            if is_bug_final:
                self.engine.fail(lease, self.store.get(round.ref), f"{type(error).__name__}: {error}")
            raise


@contextmanager
def open_runner(
    settings: Settings,
    own: FinetuneSettings,
    remote: Remote,
    observer: Observer,
    *,
    is_stopping: Callable[[], bool] = lambda: False,
    sleep: Callable[[float], object] = time.sleep,
    on_away: Callable[[str], None] = lambda reason: None,
    on_paused: Callable[[float], None] = lambda seconds: None,
) -> Iterator[Runner]:
    """`sleep` may raise to stop. Raises ConfigError, ModelFileError, DatabaseUnavailableError."""
    if settings.quantize is not None:
        raise ConfigError("a model that is quantized on load cannot be trained on: serve a GGUF file instead")
    model = resolve_model(settings.model, settings.cache_dir)
    template = None if settings.chat_template is None else settings.chat_template.read_text("utf-8")
    renderer = Renderer.open(model.path, template_text=template, digest_cache=settings.cache_dir / "digests")
    data = settings.data_dir.expanduser()
    with ExitStack() as stack:
        database = open_database(settings.database_url)
        stack.callback(database.close)
        patience = 60 * own.server_patience_minutes
        http = Http(remote, patience_seconds=patience, sleep=sleep, on_away=on_away)
        stack.callback(http.close)
        api = ServerApi(http)

        def make_pause(check: Callable[[], None]) -> Callable[[], None]:
            return Pause(
                api.num_requests,
                busy_requests=own.busy_requests,
                busy_share=own.busy_share,
                check=check,
                on_paused=on_paused,
                sleep=sleep,
            )

        snapshots, threads = data / "snapshots", settings.threads or physical_cores()
        max_age = None if settings.trace_max_age_days is None else timedelta(days=settings.trace_max_age_days)
        work = Work(database, api, model.path, renderer, snapshots, own, threads, max_age, make_pause)
        store = RoundStore(database)
        engine = RoundEngine(
            store,
            work.stages(),
            _folder(data / "rounds"),
            deleted_from=Lineage(database).deleted_from,
            abandon=lambda round, reason: abandon(api, round, reason),
            observer=observer,
            is_stopping=is_stopping,
        )
        yield Runner(database, api, engine, store, own, renderer.identity.base_digest, snapshots, sleep)


def _folder(path: Path) -> Path:
    """For its owner only: it holds what people said while a round runs."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path
