"""Cores and memory from copies of /proc and /sys as laptops, containers and old kernels show them."""

import os
from pathlib import Path

import pytest

from server.machine import available_memory_bytes, physical_cores

GIB = 1 << 30


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def topology(*pairs: str) -> dict[str, str]:
    return {f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list": text for cpu, text in enumerate(pairs)}


@pytest.fixture
def _four_logical_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)


@pytest.mark.usefixtures("_four_logical_cpus")
@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 4),
        (topology("0,2", "1,3", "0,2", "1,3"), 2),
        (topology("0", "1", "2", "3"), 4),
        (
            {
                **topology("0", "1", "2", "3"),
                "proc/self/cgroup": "0::/box",
                "sys/fs/cgroup/box/cpu.max": "150000 100000",
            },
            2,
        ),
        (
            {
                **topology("0", "1", "2", "3"),
                "proc/self/cgroup": "0::/a/b",
                "sys/fs/cgroup/a/cpu.max": "100000 100000",
                "sys/fs/cgroup/a/b/cpu.max": "max 100000",
            },
            1,
        ),
        (
            {
                **topology("0", "1", "2", "3"),
                "proc/self/cgroup": "3:cpu,cpuacct:/box",
                "sys/fs/cgroup/cpu/box/cpu.cfs_quota_us": "20000",
                "sys/fs/cgroup/cpu/box/cpu.cfs_period_us": "100000",
            },
            1,
        ),
        (
            {**topology("0", "1", "2", "3"), "proc/self/cgroup": "3:cpu:/", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1"},
            4,
        ),
    ],
    ids=["no-topology", "hyper-threads", "plain", "quota-rounds-up", "parent-quota", "v1-quota", "v1-no-quota"],
)
def test_physical_cores(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    assert physical_cores(write(tmp_path, files)) == expected


def test_affinity_limits_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 3}, raising=False)
    assert physical_cores(write(tmp_path, topology("0,2", "1,3", "0,2", "1,3"))) == 1


MEMINFO = {"proc/meminfo": "MemTotal: 33554432 kB\nMemFree: 1 kB\nMemAvailable: 16777216 kB"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (MEMINFO, 16 * GIB),
        (
            {
                **MEMINFO,
                "proc/self/cgroup": "0::/box",
                "sys/fs/cgroup/box/memory.max": str(4 * GIB),
                "sys/fs/cgroup/box/memory.current": str(3 * GIB),
                "sys/fs/cgroup/box/memory.stat": f"anon 5\ninactive_file {2 * GIB}",
            },
            3 * GIB,
        ),
        (
            {
                **MEMINFO,
                "proc/self/cgroup": "0::/box",
                "sys/fs/cgroup/box/memory.max": "max",
                "sys/fs/cgroup/box/memory.current": "5",
            },
            16 * GIB,
        ),
        (
            {
                **MEMINFO,
                "proc/self/cgroup": "5:memory:/box",
                "sys/fs/cgroup/memory/box/memory.limit_in_bytes": str(2 * GIB),
                "sys/fs/cgroup/memory/box/memory.usage_in_bytes": str(GIB),
            },
            GIB,
        ),
    ],
    ids=["bare", "v2-limit", "v2-no-limit", "v1-limit"],
)
def test_available_memory(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    assert available_memory_bytes(write(tmp_path, files)) == expected


def test_this_machine_answers() -> None:
    assert 1 <= physical_cores() <= (os.cpu_count() or 1)
    assert available_memory_bytes() > 0
