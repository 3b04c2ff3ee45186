"""A read-only memory mapping of one file, and views into it that can give their pages back.

The file must not be truncated while it is mapped: the kernel answers that with SIGBUS, which nobody can catch.
"""

import mmap
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quant.errors import ModelFileError

# Touching one page maps its aligned surroundings of this size (Linux fault-around), so a tensor's first page brings
# back the end of the one before it, already released.
_FAULT_AROUND_BYTES = 65536


class MappedFile:
    """One mapped file. `identity` (device, inode, size, mtime) tells whether the path still names the same bytes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                status = os.fstat(file.fileno())
                self.identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
                if status.st_size == 0:
                    raise ModelFileError(path, "the file is empty")
                self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise ModelFileError(path, error.strerror or str(error)) from error
        self.size = status.st_size

    def close(self) -> None:
        """Unmap. Views still in use keep the mapping until the last one goes."""
        try:
            self.data.close()
        except BufferError:
            return


@dataclass(frozen=True, eq=False)
class MappedBytes:
    """`size` bytes of a mapped file from `offset` on."""

    file: MappedFile
    offset: int
    size: int

    def read(self) -> np.ndarray:
        """Zero-copy view: uint8, 1-D, read-only."""
        return np.frombuffer(self.file.data, np.uint8, self.size, self.offset)

    def release(self) -> None:
        """Take the pages out of this process's memory; reading them again maps them again."""
        start = max(0, self.offset - _FAULT_AROUND_BYTES) // mmap.PAGESIZE * mmap.PAGESIZE
        end = (self.offset + self.size) // mmap.PAGESIZE * mmap.PAGESIZE
        if end > start and hasattr(mmap, "MADV_DONTNEED"):
            self.file.data.madvise(mmap.MADV_DONTNEED, start, end - start)
