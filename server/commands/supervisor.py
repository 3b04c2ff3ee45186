"""Two child processes under one roof: started in order, restarted when they crash, ended in order.

A child is ready when it has printed a line that names its URL. One that ends before it was ever ready has a fault that
starting again does not heal: everything ends, with its exit code. Later it is started again after a wait that doubles
from 1 s to 60 s and begins anew when it has lived for a minute. The first signal ends the children one after the other,
the first one first; the second one kills them. Children die with their parent (Linux). Not here: what they are (up.py).
"""

import asyncio
import ctypes
import re
import signal
import sys
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

FIRST_WAIT_SECONDS = 1.0
LONGEST_WAIT_SECONDS = 60.0
STEADY_SECONDS = 60.0
LAST_WORDS_SECONDS = 5.0
"""For what a child has said before it ended; a process of its own may hold the pipe open for longer."""
_PR_SET_PDEATHSIG = 1
_URL = re.compile(r" on (https?://[^\s,]+)")


@dataclass(slots=True)
class Child:
    name: str
    command: Sequence[str]
    grace_seconds: float
    """After SIGTERM; then it is killed."""
    needs_url: str | None = None
    """The flag by which it is told the URL of the child before it."""
    url: str | None = None
    """As of its last start."""
    process: asyncio.subprocess.Process | None = None
    ready: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.returncode is None


class Supervisor:
    def __init__(
        self,
        children: Sequence[Child],
        *,
        is_prefixed: bool = True,
        on_ready: Callable[[Sequence[str]], None] = lambda urls: None,
        first_wait_seconds: float = FIRST_WAIT_SECONDS,
    ) -> None:
        """`on_ready` hears the URLs when all of them are, the first time."""
        self._children = children
        self._is_prefixed = is_prefixed
        self._on_ready = on_ready
        self._first_wait = first_wait_seconds
        self._stopping = asyncio.Event()
        self._num_signals = 0
        self._code = 0

    async def run(self) -> int:
        """The exit code: 0 after a signal, else that of the child that could not start."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        keepers: list[asyncio.Task[None]] = []
        try:
            before: Child | None = None
            for child in self._children:
                keepers.append(asyncio.create_task(self._keep(child, before)))
                keepers[-1].add_done_callback(lambda task: self._stopping.set())
                await self._first(child.ready.wait(), self._stopping.wait())
                before = child
            if not self._stopping.is_set():
                self._on_ready([child.url or "" for child in self._children])
            await self._stopping.wait()
            for child in self._children:
                await self._end(child)
            await asyncio.wait(keepers, timeout=LAST_WORDS_SECONDS)
        finally:
            for child in self._children:
                _kill(child)
            for keeper in keepers:
                keeper.cancel()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)
        for keeper in keepers:
            if keeper.done():
                keeper.result()  # raises what nobody foresaw
        return self._code

    def _on_signal(self, number: int) -> None:
        self._num_signals += 1
        if self._num_signals > 1:  # quit at once
            self._code = 128 + number
            for child in self._children:
                _kill(child)
        self._stopping.set()

    async def _keep(self, child: Child, before: Child | None) -> None:
        """Start it, again and again, until we stop."""
        wait = self._first_wait
        while not self._stopping.is_set():
            started = asyncio.get_running_loop().time()
            code = await self._live(child, before)
            if self._stopping.is_set():
                return
            if not child.ready.is_set():
                self._say(f"{child.name} could not start (exit code {code})")
                self._code = code if code > 0 else 1
                self._stopping.set()
                return
            if asyncio.get_running_loop().time() - started >= STEADY_SECONDS:
                wait = self._first_wait
            self._say(f"{child.name} ended (exit code {code}); started again in {wait:g} s")
            await self._first(asyncio.sleep(wait), self._stopping.wait())
            wait = min(2 * wait, LONGEST_WAIT_SECONDS)

    async def _live(self, child: Child, before: Child | None) -> int:
        """One life of it, from start to end."""
        command = list(child.command)
        if child.needs_url is not None and before is not None and before.url is not None:
            command += [child.needs_url, before.url]
        child.process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is ours to pass on, in order
            preexec_fn=_die_with_parent,
            limit=1 << 20,
        )
        assert child.process.stdout is not None
        assert child.process.stderr is not None
        await asyncio.gather(
            self._copy(child, child.process.stdout, sys.stdout, is_watched=True),
            self._copy(child, child.process.stderr, sys.stderr, is_watched=False),
        )
        return await child.process.wait()

    async def _copy(self, child: Child, source: asyncio.StreamReader, target: IO[str], *, is_watched: bool) -> None:
        """Line by line; a line that never ends is cut."""
        prefix = f"{child.name:<8} | " if self._is_prefixed else ""
        while line := await _line(source):
            text = line.decode(errors="replace").rstrip("\n")
            print(f"{prefix}{text}", file=target, flush=True)
            found = _URL.search(text) if is_watched else None
            if found is not None:
                self._is_at(child, found[1])

    def _is_at(self, child: Child, url: str) -> None:
        """Ready. Who was told another address must hear of the new one."""
        moved = child.url is not None and child.url != url
        child.url = url
        child.ready.set()
        for other in self._children[self._children.index(child) + 1 :] if moved else ():
            if other.needs_url is not None and other.is_running and other.process is not None:
                other.process.terminate()

    async def _end(self, child: Child) -> None:
        if not child.is_running or child.process is None:
            return
        child.process.terminate()
        try:
            async with asyncio.timeout(child.grace_seconds):
                await child.process.wait()
        except TimeoutError:
            self._say(f"{child.name} did not end within {child.grace_seconds:g} s and is killed")
            _kill(child)

    def _say(self, text: str) -> None:
        print(f"sterna: {text}", file=sys.stderr, flush=True)

    @staticmethod
    async def _first(*waits: Coroutine[Any, Any, Any]) -> None:
        """Until one of them is over."""
        tasks = [asyncio.create_task(one) for one in waits]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()


async def _line(source: asyncio.StreamReader) -> bytes:
    try:
        return await source.readuntil(b"\n")
    except asyncio.IncompleteReadError as error:
        return error.partial
    except asyncio.LimitOverrunError as error:
        return await source.readexactly(error.consumed)


def _kill(child: Child) -> None:
    if child.is_running and child.process is not None:
        child.process.kill()


def _die_with_parent() -> None:
    """Runs in the child before it becomes another program: SIGTERM when the supervisor is gone, however it went."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
