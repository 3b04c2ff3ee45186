"""What this machine lets the process have: physical cores and free memory, within affinity and cgroup limits.

Read from /proc and /sys, because os.cpu_count() counts hyper-threads and ignores a container's quota. Elsewhere than
on Linux only the number of logical cores and the physical memory are known.
"""

import os
import resource
from pathlib import Path

_ROOT = Path("/")


def physical_cores(root: Path = _ROOT) -> int:
    """Cores to compute on: hyper-threads of one core count once, a CPU quota rounds up, at least 1."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cores = set()
    for cpu in os.sched_getaffinity(0):
        siblings = _read(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings or str(cpu))
    quota = _cpu_quota(root)
    return len(cores) if quota is None else max(1, min(len(cores), -int(-quota // 1)))


def available_memory_bytes(root: Path = _ROOT) -> int:
    """Memory that can be taken without swapping: the system's, or the container's rest if that is less."""
    for line in (_read(root / "proc/meminfo") or "").splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
            break
    else:
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = [_rest_of_limit(folder) for folder in _cgroup_folders(root, "memory")]
    return min([available, *(limit for limit in limits if limit is not None)])


def peak_bytes() -> int:
    """Of this process by now. Not getrusage where Linux says better: that begins with what the parent process held."""
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _cpu_quota(root: Path) -> float | None:
    """The tightest quota of this cgroup and its parents, in cores."""
    quotas = []
    for folder in _cgroup_folders(root, "cpu"):
        v2 = (_read(folder / "cpu.max") or "").split()
        v1 = (_read(folder / "cpu.cfs_quota_us") or "-1", _read(folder / "cpu.cfs_period_us") or "100000")
        if len(v2) == 2 and v2[0] != "max":
            quotas.append(int(v2[0]) / int(v2[1]))
        elif int(v1[0]) > 0:
            quotas.append(int(v1[0]) / int(v1[1]))
    return min(quotas, default=None)


def _rest_of_limit(folder: Path) -> int | None:
    """Limit less use; page cache that the kernel can drop does not count as used."""
    for limit_name, used_name, stat_key in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        limit, used = _read(folder / limit_name), _read(folder / used_name)
        if limit is None or used is None or limit == "max":
            continue
        droppable = 0
        for line in (_read(folder / "memory.stat") or "").splitlines():
            key, _, value = line.partition(" ")
            if key == stat_key:
                droppable = int(value)
        return max(0, int(limit) - int(used) + droppable)
    return None


def _cgroup_folders(root: Path, controller: str) -> list[Path]:
    """This process's cgroup and its parents, in the v2 tree or in the v1 tree of `controller`."""
    folders = []
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / (controller if controllers else "")
        parts = Path(path.lstrip("/")).parts
        folders += [top.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]
    return folders


def _read(path: Path) -> str | None:
    """The text of a small kernel file, or None where this kernel has no such file or does not show it."""
    try:
        return path.read_text().strip()
    except OSError:
        return None
