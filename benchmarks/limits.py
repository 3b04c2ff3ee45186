"""What this machine can do at most: int8 multiply-adds from registers, bytes read in order from memory and from caches.

The probes are instructions of the kernels' own (quant/kernels/probes.inc), run by as many threads as the kernels get,
so that a share of the limit compares like with like in the same run. Best of several: a limit is what is possible.

usage: python -m benchmarks.limits [--threads 2] [--isa auto]
"""

import argparse
import functools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import numpy as np

import _sterna

_MEMORY_BYTES = 512 << 20
_RUN_SECONDS = 0.004


@dataclass(frozen=True)
class Limits:
    """Of `threads` threads together."""

    threads: int
    isa: str
    dot_gmacs: float
    """int8, 10^9 multiply-adds a second."""
    memory_gb_s: float
    l3_gb_s: float
    """An array of 8 MiB for each thread."""
    l2_gb_s: float
    """256 KiB for each."""


def seconds_together(jobs: Sequence[Callable[[], object]], repeats: int) -> float:
    """The best of `repeats` runs: each job in a thread of its own, begun together, until the slowest has ended.

    The clock is each thread's own CPU time: wall time where every thread has a core, and of use still where it has not.
    The jobs must release the GIL.
    """
    return min(_run_together(jobs) for _ in range(repeats))


def _run_together(jobs: Sequence[Callable[[], object]]) -> float:
    if len(jobs) == 1:
        return _seconds(jobs[0])
    barrier = threading.Barrier(len(jobs))

    def work(job: Callable[[], object]) -> float:
        barrier.wait()
        return _seconds(job)

    with ThreadPoolExecutor(len(jobs)) as pool:
        return max(pool.map(work, jobs))


def _seconds(job: Callable[[], object]) -> float:
    start = time.thread_time()
    job()
    return time.thread_time() - start


def best_isa() -> str:
    return _sterna.available_isas()[0]


def measure(threads: int, isa: str = "auto", *, repeats: int = 20) -> Limits:
    isa = best_isa() if isa == "auto" else isa
    if threads > (cores := len(os.sched_getaffinity(0))):
        print(f"{threads} threads on {cores} cores: figures are as if each thread had its own", file=sys.stderr)
    rounds = rounds_for(lambda n: _sterna.probe_dot(isa, n))
    macs = _sterna.probe_dot(isa, rounds) * threads
    dot = macs / seconds_together([lambda: _sterna.probe_dot(isa, rounds)] * threads, repeats)

    def cached(bytes_each: int) -> float:
        arrays = [np.ones(bytes_each, np.uint8) for _ in range(threads)]
        passes = rounds_for(lambda n: _sterna.probe_read(arrays[0], isa, n))
        jobs = [functools.partial(_sterna.probe_read, array, isa, passes) for array in arrays]
        return bytes_each * threads * passes / seconds_together(jobs, repeats)

    return Limits(
        threads, isa, dot / 1e9, _memory(threads, isa, repeats) / 1e9, cached(8 << 20) / 1e9, cached(256 << 10) / 1e9
    )


def _memory(threads: int, isa: str, repeats: int) -> float:
    """Bytes a second, of whole passes over an array far above any cache, a part of it for each thread."""
    parts = np.ones((threads, _MEMORY_BYTES // threads), np.uint8)
    jobs = [functools.partial(_sterna.probe_read, part, isa) for part in parts]
    return parts.size / seconds_together(jobs, max(repeats // 4, 3))


def rounds_for(run: Callable[[int], object]) -> int:
    """How often `run` must be repeated to take some milliseconds: far above the clock's step, below a time slice."""
    count = 1
    while (took := _seconds(functools.partial(run, count))) < _RUN_SECONDS / 8:
        count = max(count * 2, int(count * _RUN_SECONDS / 8 / max(took, 1e-6)))
    return max(1, int(count * _RUN_SECONDS / took))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--isa", default="auto")
    args = parser.parse_args()
    print(
        json.dumps(
            {k: round(v, 1) if isinstance(v, float) else v for k, v in asdict(measure(args.threads, args.isa)).items()}
        )
    )


if __name__ == "__main__":
    main()
