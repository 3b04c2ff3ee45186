"""Live traffic while a version goes from canary to live: who answers, how fast, and whether anything fails.

A few clients ask questions of the training side again and again, streamed, each in an episode of its own, as users
would; nobody judges these answers. The view is one line of the terminal that is written again every second; what it
showed is kept for the picture. Not here: who decides (the sidecar's watch).
"""

import itertools
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx

from finetune.demo.traffic import Asked

NUM_CLIENTS = 4
MAX_TOKENS = 64
BASE = "base"
_BAR = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True, slots=True)
class Answered:
    """One request of the live traffic."""

    at_seconds: float
    """When it ended, since the traffic began."""
    version: str
    """Who answered."""
    seconds: float
    first_token_seconds: float
    fault: str | None


@dataclass
class Traffic:
    """What has been answered so far. Written by the clients, read by the view."""

    answered: list[Answered] = field(default_factory=list)
    events: list[tuple[float, str]] = field(default_factory=list)
    """(seconds, what happened): canary, live."""
    start: float = field(default_factory=time.monotonic)

    def now(self) -> float:
        return time.monotonic() - self.start

    @property
    def faults(self) -> list[str]:
        return [one.fault for one in self.answered if one.fault is not None]

    def as_json(self) -> dict[str, Any]:
        return {"answered": [asdict(one) for one in self.answered], "events": self.events}


@contextmanager
def live_traffic(url: str, adapter: str, requests: Sequence[Asked]) -> Iterator[Traffic]:
    """Until the block ends."""
    traffic, stop = Traffic(), threading.Event()
    numbers = itertools.count()

    def client() -> None:
        # A proxy cannot reach our loopback.
        with httpx.Client(base_url=url, timeout=120.0, trust_env=False) as http:
            while not stop.is_set():
                number = next(numbers)
                traffic.answered.append(_ask(http, adapter, requests[number % len(requests)], number, traffic))

    threads = [threading.Thread(target=client, daemon=True) for _ in range(NUM_CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        yield traffic
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def _ask(http: httpx.Client, adapter: str, one: Asked, number: int, traffic: Traffic) -> Answered:
    body = one.body | {"model": adapter, "max_completion_tokens": MAX_TOKENS, "stream": True}
    start, first, version, fault, last = time.monotonic(), None, BASE, None, ""
    try:
        headers = {"X-Sterna-Episode": f"live-{number}"}
        with http.stream("POST", "/v1/chat/completions", json=body, headers=headers) as reply:
            version = reply.headers.get("X-Sterna-Adapter-Version", BASE)
            for line in reply.iter_lines():
                if line and first is None:
                    first = time.monotonic() - start
                last = line or last
            if not reply.is_success or last != "data: [DONE]":
                fault = f"{reply.status_code}: {last[:200]}"
    except httpx.HTTPError as error:
        fault = f"{type(error).__name__}: {error}"
    seconds = time.monotonic() - start
    return Answered(traffic.now(), version, seconds, seconds if first is None else first, fault)


def watch_until(
    traffic: Traffic, look: Callable[[], str], is_over: Callable[[str], bool], *, limit_seconds: float
) -> bool:
    """Shows the traffic until what `look` says (the adapter's state in words) is the end, or time is up (False)."""
    state = ""
    while traffic.now() < limit_seconds:
        found = look()
        if found != state:
            state = found
            traffic.events.append((traffic.now(), state))
            _write(f"\r\x1b[K  {traffic.now():6.1f} s  {state}\n", f"{traffic.now():6.1f} s  {state}\n")
        if is_over(state):
            return True
        _write(f"\r\x1b[K  {view(traffic)}", "")
        time.sleep(1.0)
    return False


def view(traffic: Traffic, *, window_seconds: float = 20.0) -> str:
    """The last seconds in one line: a bar for each version's share of every second, and the figures."""
    now = traffic.now()
    recent = [one for one in traffic.answered if one.at_seconds > now - window_seconds]
    parts = [f"{now:6.1f} s"]
    for version in sorted({one.version for one in recent}, key=lambda name: (name != BASE, name)):
        counts = Counter(int(now - one.at_seconds) for one in recent if one.version == version)
        most = max(counts.values())
        bar = "".join(
            _BAR[(len(_BAR) - 1) * counts[age] // most] if counts[age] else " "
            for age in reversed(range(int(window_seconds)))
        )
        parts.append(f"{version} {bar} {sum(counts.values())}")
    if recent:
        parts.append(f"p50 {statistics.median(one.seconds for one in recent):.2f} s")
    return " | ".join([*parts, f"failed {len(traffic.faults)}"])


def _write(on_terminal: str, otherwise: str) -> None:
    sys.stderr.write(on_terminal if sys.stderr.isatty() else otherwise)
    sys.stderr.flush()
