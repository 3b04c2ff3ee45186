"""One round as plain data: its phases in order, how it can end, and what has been found out so far.

Nothing here changes a round; store.py does, and engine.py says when.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, NamedTuple, Self

from server.adapters.version import VersionRef


class Phase(StrEnum):
    """What is to be done next; each leaves its result behind before the next one begins."""

    SNAPSHOT = "snapshot"
    TRAIN = "train"
    EXPORT = "export"
    IMPORT = "import"
    GATE = "gate"
    PROMOTE = "promote"
    """What the gate decided, done: a canary begins, or the version is rejected."""


PHASES = tuple(Phase)
DECISIONS = "decisions"
"""Among a round's facts of its beginning: what the gate decided before the round began anew."""


class Result(StrEnum):
    CANARY = "canary"
    """The gate let it pass; the watch decides from here on."""
    REJECTED = "rejected"
    NOT_ENOUGH_EVIDENCE = "not_enough_evidence"
    """The version stays a candidate: a named human may still promote it."""
    NOTHING_TO_LEARN = "nothing_to_learn"
    FAILED = "failed"


class RoundRef(NamedTuple):
    """`tools-r3`: the third round of the adapter `tools`; also its directory's name."""

    adapter: str
    number: int

    def __str__(self) -> str:
        return f"{self.adapter}-r{self.number}"

    @classmethod
    def parse(cls, text: str) -> Self | None:
        match = re.fullmatch(r"(.{1,64})-r([1-9][0-9]{0,8})", text)
        return cls(match[1], int(match[2])) if match else None


@dataclass(frozen=True, slots=True)
class Round:
    ref: RoundRef
    phase: Phase
    result: Result | None
    """None: unfinished."""
    reason: str
    """Why it ended so; of an unfinished one, why it began anew."""
    cause: str
    """Why it was begun: a trigger, or who asked."""
    parent: int | None
    """A warm start: the version whose weights the training begins with."""
    base_digest: str
    settings: Mapping[str, Any]
    """Those it began with (finetune/config.py, `of_round`)."""
    last_seq: int
    """The newest trace that it may use."""
    snapshot: str | None
    version: int | None
    facts: Mapping[str, Any]
    """By phase: counts, losses, digests. For people and reports."""
    decision: Mapping[str, Any] | None
    """The gate's, with all its numbers."""
    num_restarts: int
    created_at: datetime
    updated_at: datetime

    @property
    def version_ref(self) -> VersionRef | None:
        return None if self.version is None else VersionRef(self.ref.adapter, self.version)
