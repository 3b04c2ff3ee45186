"""Leases: who works on an adapter, on any machine, with a heartbeat and a fencing token in the database.

No clock is compared: a holder counts its beats up, and who waits takes over when it has seen the same beat for
LEASE_SECONDS of its own monotonic clock, or at once when the holder is a process of this machine that is gone. Every
taking over raises the token, and every write checks the token in its own transaction, so that a holder who was stopped
for an hour and wakes up writes nothing (LeaseLostError).

    with held(database, "tools", on_wait=print) as lease: ...    # beats on a thread meanwhile
"""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy import Connection, insert, select, update

from finetune.rounds.errors import LeaseHeldError, LeaseLostError
from finetune.rounds.tables import leases
from server.errors import ServerUnavailableError
from server.storage.database import Database

BEAT_SECONDS = 5.0
LEASE_SECONDS = 30.0
"""Six missed beats: a machine that swaps or a database that restarts is not a dead holder yet."""
LOOK_SECONDS = 1.0
LOCK = "finetune_leases"


@dataclass(frozen=True, slots=True)
class Lease:
    name: str
    token: int
    holder: str
    lost: threading.Event = field(default_factory=threading.Event, compare=False)

    def check(self) -> None:
        """Raises LeaseLostError when a beat has found that it is."""
        if self.lost.is_set():
            raise _lost(self.name)


@dataclass(frozen=True, slots=True)
class Held:
    """By somebody else."""

    holder: str
    token: int
    beat: int


def check_lease(connection: Connection, lease: Lease) -> None:
    """In the transaction that writes. Raises LeaseLostError."""
    query = select(leases.c.token, leases.c.holder).where(leases.c.name == lease.name).with_for_update()
    row = connection.execute(query).one_or_none()
    if row is None or (row.token, row.holder) != (lease.token, lease.holder):
        lease.lost.set()
        raise _lost(lease.name)


def try_take(database: Database, name: str, holder: str, *, seen: Held | None = None) -> Lease | Held:
    """Free, ours already, of a dead process, or still as `seen`, whose patience is over: it is ours."""
    with database.write(lock=LOCK) as connection:
        row = connection.execute(select(leases).where(leases.c.name == name)).one_or_none()
        if row is None:
            connection.execute(insert(leases).values(name=name, token=1, holder=holder, beat=0))
            return Lease(name, 1, holder)
        found = Held(row.holder, row.token, row.beat)
        if found.holder and found.holder != holder and found != seen and not is_gone(found.holder):
            return found
        this = update(leases).where(leases.c.name == name)
        connection.execute(this.values(token=row.token + 1, holder=holder, beat=0))
        return Lease(name, row.token + 1, holder)


def beat(database: Database, lease: Lease) -> None:
    """Still alive. Raises LeaseLostError."""
    with database.write(lock=LOCK) as connection:
        check_lease(connection, lease)
        connection.execute(update(leases).where(leases.c.name == lease.name).values(beat=leases.c.beat + 1))


def release(database: Database, lease: Lease) -> None:
    """Free for the next one at once. Not ours any more: nothing happens."""
    mine = (leases.c.name == lease.name) & (leases.c.token == lease.token) & (leases.c.holder == lease.holder)
    with database.write(lock=LOCK) as connection:
        connection.execute(update(leases).where(mine).values(holder=""))


def take(
    database: Database,
    name: str,
    *,
    holder: str | None = None,
    is_waiting: bool = True,
    on_wait: Callable[[str], None] = lambda holder: None,
    sleep: Callable[[float], object] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Lease:
    """`on_wait` hears once who holds it. Raises LeaseHeldError unless it `is_waiting`."""
    holder = holder or this_process()
    seen: Held | None = None
    since = clock()
    while True:
        is_over = seen is not None and clock() - since >= LEASE_SECONDS
        found = try_take(database, name, holder, seen=seen if is_over else None)
        if isinstance(found, Lease):
            return found
        if not is_waiting:
            raise LeaseHeldError(f"{describe(found.holder)} works on {name}")
        if seen is None or seen.holder != found.holder:
            on_wait(describe(found.holder))
        if found != seen:
            seen, since = found, clock()
        sleep(LOOK_SECONDS)


@contextmanager
def held(
    database: Database,
    name: str,
    *,
    is_waiting: bool = True,
    on_wait: Callable[[str], None] = lambda holder: None,
    sleep: Callable[[float], object] = time.sleep,
    beat_seconds: float = BEAT_SECONDS,
) -> Iterator[Lease]:
    """Taken, kept alive, and given back at the end. `sleep` may raise to give up waiting. Raises LeaseHeldError."""
    lease = take(database, name, is_waiting=is_waiting, on_wait=on_wait, sleep=sleep)
    is_over = threading.Event()

    def keep() -> None:
        while not is_over.wait(beat_seconds):
            try:
                beat(database, lease)
            except LeaseLostError:  # it has been noted
                return
            except ServerUnavailableError:  # writes are fenced, so working on without the database harms nobody
                continue

    thread = threading.Thread(target=keep, name=f"lease of {name}", daemon=True)
    thread.start()
    try:
        yield lease
    finally:
        is_over.set()
        thread.join()
        with suppress(ServerUnavailableError):  # it runs out by itself
            release(database, lease)


# -- processes --------------------------------------------------------------------------------------------------------


def this_process() -> str:
    """Machine and process by what no other one has, also after a reboot, in a container, or under a reused number.

    Unique a call: two leases of one process are two holders.
    """
    return " ".join([socket.gethostname(), *_place(), str(os.getpid()), _start_time(os.getpid()), os.urandom(4).hex()])


def is_gone(holder: str) -> bool:
    """A process of this machine (and PID namespace) that has ended. Whatever cannot be known is not gone."""
    parts = holder.split(" ")
    if len(parts) != 6 or tuple(parts[1:3]) != _place() or "?" in parts:
        return False
    return _start_time(int(parts[3])) != parts[4]


def describe(holder: str) -> str:
    parts = holder.split(" ")
    return f"process {parts[3]} on {parts[0]}" if len(parts) == 6 else holder


def _place() -> tuple[str, str]:
    """This boot, and this PID namespace; "?" where there is no such thing."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return boot, os.readlink("/proc/self/ns/pid")
    except OSError:
        return "?", "?"


def _start_time(pid: int) -> str:
    """In ticks since the boot; "?" when there is no such process, or no /proc."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return "?"
    state, *rest = stat.rpartition(")")[2].split()
    return "?" if state in "ZX" else rest[18]  # a zombie does nothing any more


def _lost(name: str) -> LeaseLostError:
    return LeaseLostError(f"somebody else works on {name} now; this process leaves it alone")
