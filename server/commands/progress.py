"""Progress on standard error, silent when that is not a terminal."""

import sys

from tqdm import tqdm


class Bar:
    """Implements server.models.pull.Progress."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def begin(self, what: str, total_bytes: int) -> None:
        self._bar = tqdm(desc=what, total=total_bytes, unit="B", unit_scale=True, disable=None, dynamic_ncols=True)

    def at(self, num_bytes: int) -> None:
        assert self._bar is not None
        self._bar.update(min(num_bytes, self._bar.total) - self._bar.n)

    def end(self) -> None:
        assert self._bar is not None
        self._bar.close()
        self._bar = None


def show_status(text: str) -> None:
    """Replace the last line by what is being done; an empty text clears it."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
