"""Keeps freed memory in the process: each micro-batch frees and takes the same hundreds of megabytes.

glibc gives large blocks back to the kernel at once, and every page of the next pass faults anew: 5 % of a step of 1,024
tokens on the default model. The setting is the whole process's, so a program chooses it, never an import.
"""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """False where the C library has no such setting (macOS, musl)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    # glibc takes no mmap threshold above half a heap (32 MB on 64 bits) and then refuses the whole call.
    return bool(mallopt(_M_MMAP_THRESHOLD, 32 << 20)) and bool(mallopt(_M_TRIM_THRESHOLD, _LARGEST))
