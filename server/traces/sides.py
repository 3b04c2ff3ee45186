"""Which side of the train/held-out split an episode is on.

Drawn once, when the episode's first trace is written, from a keyed digest of its first user message and tools: equal
questions fall on one side, whoever asks them, and no client can choose. A group that is known keeps its side even when
the configured share changes. Not here: inheritance and merging (episode_rows.py).
"""

import hashlib

from server.traces.record import Side

DEFAULT_HELD_OUT_SHARE = 1 / 3
"""The gate needs a hundred held-out episodes before it decides; with a third, three hundred episodes give them."""


class SideDraw:
    """`secret`: the database's, so that all its servers draw alike."""

    def __init__(self, secret: bytes, held_out_share: float = DEFAULT_HELD_OUT_SHARE) -> None:
        assert 0 <= held_out_share <= 1
        self._secret = secret
        self._limit = held_out_share * 2**64

    def group_digest(self, group: bytes) -> bytes:
        """What is stored of a group: without the secret nobody can test guesses of a first message against it."""
        return hashlib.blake2b(group, key=self._secret, digest_size=16, person=b"group").digest()

    def draw(self, group: bytes) -> Side:
        number = hashlib.blake2b(group, key=self._secret, digest_size=8, person=b"side").digest()
        return "held_out" if int.from_bytes(number, "big") < self._limit else "train"
