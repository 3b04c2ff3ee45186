"""Keeps freed memory in the process: each micro-batch frees and takes the same hundreds of megabytes.

glibc gives large blocks back to the kernel at once, and every page of the next pass faults anew: 5 % of a step of 1,024
tokens on the default model. The settings are the whole process's, so a program chooses them, never an import.
"""

import ctypes
import os
import sys
from collections.abc import Callable

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST = 2**31 - 1

_MAX_KERNELS = "256"
"""That oneDNN keeps, at 0.3 MB each; it would keep 1,024. A micro-batch has a hundred of its own: one for each size of
attention's products."""


def keep_freed_memory() -> bool:
    """To be called before anything is computed. False where the C library has no such setting (macOS, musl)."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", _MAX_KERNELS)
    mallopt = _of_glibc("mallopt")
    if mallopt is None:
        return False
    # glibc takes no mmap threshold above half a heap (32 MB on 64 bits) and then refuses the whole call.
    return bool(mallopt(_M_MMAP_THRESHOLD, 32 << 20)) and bool(mallopt(_M_TRIM_THRESHOLD, _LARGEST))


def return_holes() -> None:
    """To the kernel: the pages that are free within the heap. Micro-batches differ in their sizes and the holes that
    they leave add up."""
    trim = _of_glibc("malloc_trim")
    if trim is not None:
        trim(0)


def _of_glibc(name: str) -> Callable[..., int] | None:
    """None where the C library has no such function."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
