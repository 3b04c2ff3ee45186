"""The sidecar's life: opened in order, rounds one after the other, watches and webhooks beside them, closed in reverse.

Three threads besides the port's: rounds (this one), watches, webhooks; each is a top loop that logs what nobody foresaw
and goes on. A signal stops a round between two micro-batches or answers; the next start takes it up there. Not here:
what a round does (finetune/rounds), and when one is due (triggers.py).
"""

import logging
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta
from types import FrameType

import httpx

from finetune.config import FinetuneSettings
from finetune.errors import FinetuneError
from finetune.rounds.errors import LeaseHeldError, StoppedError
from finetune.rounds.lease import Lease, held
from finetune.rounds.runner import Runner, open_runner
from finetune.rounds.store import Request
from finetune.rounds.watching import Watcher
from finetune.serving.http import may_use_proxy
from finetune.sidecar.app import build_app, serving
from finetune.sidecar.metrics import SidecarMetrics
from finetune.sidecar.triggers import due
from finetune.sidecar.webhooks import LEASE as WEBHOOK_LEASE
from finetune.sidecar.webhooks import Webhooks
from server.config import Remote, Settings
from server.errors import SternaError
from server.storage.clock import utc_now

logger = logging.getLogger(__name__)

FIRST_SIGNALS = (signal.SIGTERM, signal.SIGINT)
WEBHOOK_SECONDS = 1.0


class Stop:
    """Set by a signal or by somebody's `set`; waits end at once, and sleeps of a round raise."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def sleep(self, seconds: float) -> None:
        """Raises StoppedError."""
        if self.event.wait(seconds):
            raise StoppedError("stopped; an unfinished round goes on where it was when it is run again")


def run_sidecar(
    settings: Settings, own: FinetuneSettings, remote: Remote, *, on_ready: Callable[[str], None], stop: Stop
) -> None:
    """Until it is stopped. Raises ConfigError, ModelFileError, DatabaseUnavailableError before it is ready."""
    metrics = SidecarMetrics()
    with ExitStack() as stack:
        runner = stack.enter_context(
            open_runner(
                settings,
                own,
                remote,
                metrics,
                is_stopping=stop.event.is_set,
                sleep=stop.sleep,
                on_away=lambda reason: logger.warning("the server is away: %s", reason),
                on_paused=metrics.on_paused,
            )
        )
        runner.engine.sweep()
        for name in {round.ref.adapter for round in runner.store.list()}:
            _show_last(runner, metrics, name)
        wake = threading.Event()

        def request_round(adapter: str, parent: int | None) -> None:
            runner.check_known(adapter)
            runner.store.request(adapter, parent)
            wake.set()

        app = build_app(runner.store, metrics, request_round=request_round, may_ask=lambda key: may_ask(remote, key))
        url = stack.enter_context(serving(app, own.host, own.port))
        stack.enter_context(_thread("watches", lambda: _watch(runner, own, metrics, stop)))
        if own.webhook_urls:
            stack.enter_context(_thread("webhooks", lambda: _tell(runner, own, metrics, stop)))
        stack.callback(stop.event.set)  # first of all: the threads above end
        on_ready(url)
        while not stop.event.is_set():
            wake.clear()
            _one_turn(runner, own)
            _wait(own.poll_seconds, wake, stop)


def _one_turn(runner: Runner, own: FinetuneSettings) -> None:
    """What was asked for, what is unfinished, what is due. One adapter's fault is no other's."""
    asked: Sequence[Request] = ()
    with _faults_told("the sidecar"):
        asked = runner.store.requests()
    for request in asked:
        with _faults_told(request.adapter):
            for round in runner.run_requested(request.adapter, cause="asked for over HTTP"):
                logger.info("%s ended: %s", round.ref, round.result)
    names: Sequence[str] = own.adapters
    with _faults_told("the sidecar"):
        names = names or runner.api.adapter_names()
    for adapter in names:
        with _faults_told(adapter):
            runner.forget(adapter)
            cause = _cause(runner, own, adapter)
            if cause is not None:
                round = runner.run(adapter, cause=cause, is_waiting=False, is_bug_final=True)
                logger.info("%s ended: %s", round.ref, round.result)


@contextmanager
def _faults_told(what: str) -> Iterator[None]:
    """A top loop's: whatever happens, the next turn comes."""
    try:
        yield
    except StoppedError as error:
        logger.info("%s", error)
    except LeaseHeldError as error:  # the usual case where two sidecars run
        logger.info("%s: %s", what, error)
    except (SternaError, FinetuneError) as error:
        logger.warning("%s: %s", what, error)
    except Exception:
        logger.exception("%s: an error that nobody foresaw", what)


def _cause(runner: Runner, own: FinetuneSettings, adapter: str) -> str | None:
    """None: nothing is to be done."""
    if runner.store.unfinished(adapter) is not None:
        return "taken up"
    if runner.undecided(adapter) is not None:
        return None
    every = None if own.every_hours is None else timedelta(hours=own.every_hours)
    found = due(
        runner.database,
        adapter,
        min_new_traces=own.min_new_traces,
        every=every,
        keep_unlabelled=own.keep_unlabelled,
        now=utc_now(),
    )
    return None if found is None else found.cause


def _watch(runner: Runner, own: FinetuneSettings, metrics: SidecarMetrics, stop: Stop) -> None:
    watcher = Watcher(
        runner.database,
        runner.api,
        hold_back_share=own.hold_back_share,
        idle=timedelta(minutes=own.episode_idle_minutes),
        on_look=metrics.on_look,
    )
    while not stop.event.is_set():
        names: Sequence[str] = own.adapters
        with _faults_told("the watch"):
            names = names or runner.api.adapter_names()
        for adapter in names:
            with _faults_told(f"the watch of {adapter}"), _watched(runner, adapter) as lease:
                watcher.look(lease, adapter)
        stop.event.wait(own.poll_seconds)


def _watched(runner: Runner, adapter: str) -> AbstractContextManager[Lease]:
    return held(runner.database, f"watch {adapter}", is_waiting=False)


def _tell(runner: Runner, own: FinetuneSettings, metrics: SidecarMetrics, stop: Stop) -> None:
    assert own.webhook_secret is not None, "checked by the settings"
    secret = own.webhook_secret.get_secret_value()
    hooks = Webhooks(runner.database, own.webhook_urls, secret, on_delivery=metrics.on_delivery)
    try:
        while not stop.event.is_set():
            with _faults_told("webhooks"), held(runner.database, WEBHOOK_LEASE, sleep=stop.sleep) as lease:
                while not stop.event.wait(WEBHOOK_SECONDS):
                    lease.check()
                    hooks.deliver(lease)
            stop.event.wait(WEBHOOK_SECONDS)
    finally:
        hooks.close()


def may_ask(remote: Remote, authorization: str | None) -> tuple[int, str] | None:
    """What the server says to a caller who asks it for its adapters."""
    headers = {} if authorization is None else {"Authorization": authorization}
    if authorization is not None and not authorization.isascii():
        return 401, "the Authorization header has characters that no API key has"
    try:
        reply = httpx.get(
            f"{remote.url}/v1/adapters", headers=headers, timeout=10.0, trust_env=may_use_proxy(remote.url)
        )
    except httpx.HTTPError as error:
        return 503, f"the server at {remote.url} is away: {error}"
    if reply.is_success:
        return None
    try:
        return reply.status_code, str(reply.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return reply.status_code, f"the server said {reply.status_code}"


def _show_last(runner: Runner, metrics: SidecarMetrics, adapter: str) -> None:
    """Scores of the last gate, so that a restart leaves no hole in the graphs."""
    last = next((round for round in runner.store.list(adapter) if round.decision is not None), None)
    if last is not None:
        metrics.show_decision(last)


@contextmanager
def stopped_by_signals(stop: Stop) -> Iterator[None]:
    """SIGTERM and Ctrl-C stop; a second one ends the process as it would without us."""

    def handle(number: int, frame: FrameType | None) -> None:
        stop.event.set()
        for one in FIRST_SIGNALS:
            signal.signal(one, signal.SIG_DFL)

    before = {one: signal.signal(one, handle) for one in FIRST_SIGNALS}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


@contextmanager
def _thread(name: str, target: Callable[[], None]) -> Iterator[None]:
    thread = threading.Thread(target=target, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join(30)


def _wait(seconds: float, wake: threading.Event, stop: Stop) -> None:
    """Until a round is asked for, or we are to stop: looked at twice a second."""
    left = seconds
    while left > 0 and not wake.is_set() and not stop.event.is_set():
        stop.event.wait(min(left, 0.5))
        left -= 0.5
