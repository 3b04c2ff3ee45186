"""Stop strings over a stream of text pieces that know nothing of their boundaries.

The answer ends where the first stop string is completed, exactly as if the text had come a character at a time: of
several, the one that ends first; of those that end together, the longest. The stop string itself is never part of the
answer. Text is held back only while it could be the beginning of a stop string.
"""

from collections.abc import Sequence


def held_back_length(text: str, patterns: Sequence[str]) -> int:
    """Length of the longest end of `text` that is a proper beginning of one of `patterns`."""
    longest = 0
    for pattern in patterns:
        for length in range(min(len(pattern) - 1, len(text)), longest, -1):
            if text.endswith(pattern[:length]):
                longest = length
                break
    return longest


class StopMatcher:
    """One answer's matcher. Empty stop strings are refused above (they would end every answer at once)."""

    def __init__(self, stop_strings: Sequence[str]) -> None:
        assert all(stop_strings)
        self._stop_strings = tuple(stop_strings)
        self._held = ""
        self.stopped_by: str | None = None
        """The stop string that ended the answer."""

    def push(self, text: str) -> tuple[str, str | None]:
        """Returns (text that is certain, stop string that ended the answer or None). Empty once stopped."""
        if self.stopped_by is not None:
            return "", self.stopped_by
        if not self._stop_strings:
            return text, None
        buffer = self._held + text
        match = self._first_match(buffer)
        if match is not None:
            start, self.stopped_by = match
            self._held = ""
            return buffer[:start], self.stopped_by
        certain = len(buffer) - held_back_length(buffer, self._stop_strings)
        self._held = buffer[certain:]
        return buffer[:certain], None

    def flush(self) -> str:
        """The answer's end: what was held back."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, buffer: str) -> tuple[int, str] | None:
        matches = [(buffer.find(stop), stop) for stop in self._stop_strings if stop in buffer]
        return min(matches, key=lambda match: (match[0] + len(match[1]), match[0]), default=None)
