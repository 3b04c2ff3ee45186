"""The rows of a snapshot's files, as plain data and as JSON lines.

An example holds token ids and no text but its question (for near-duplicates of later snapshots); a held-out trace holds
the request, to be asked again by the gate, and its label. Not here: the files (jsonl.py), weights (examples.py).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from finetune.gate.results import GOLD, Label, label_of

Kind = Literal["call", "no_call", "chat"]
"""A tool is called; tools were offered and none is called; no tools were offered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExampleRow:
    """One answer to learn."""

    id: str  # "<trace id>:<turn>", behind "replay:" where an earlier snapshot had it; "general:<n>"
    seq: int  # the trace's sequence number; 0: no trace
    cluster: str
    kind: Kind
    origin: str  # "served", "correction", "import" or "base"
    source: str  # of the feedback that judged it
    question: str
    tools: Sequence[str]  # names of those offered
    prompt_ids: Sequence[int]
    answer_ids: Sequence[int]
    classes: str  # a digit an answer token: token_classes.TokenClass
    rejected_ids: Sequence[int] | None = None  # what was served instead, end of turn included: a preference pair

    @property
    def trace_id(self) -> str:
        return self.id.removeprefix("replay:").rpartition(":")[0]

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.answer_ids)

    def token_classes(self) -> NDArray[np.uint8]:
        """[answer tokens]"""
        return class_array(self.classes)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutRow:
    """One trace to be tested on."""

    id: str
    seq: int
    created_at: str  # ISO 8601, UTC
    cluster: str
    kind: Kind
    request: Mapping[str, Any]  # messages, tools, tool_choice, response_format, sampling: as they were logged
    target: Mapping[str, Any]  # the assistant message that is right
    origin: str
    source: str  # of the feedback that `target` comes from; "import" for an imported answer
    is_audit: bool
    feedback: Sequence[Mapping[str, Any]]  # all of it, oldest first: source, score, correction, label, comment
    served: Mapping[str, Any] | None  # the message that was answered
    version: str | None  # by which version; None: the base
    question: str
    prompt_ids: Sequence[int]
    answer_ids: Sequence[int]  # of `target`
    classes: str
    key_id: str = ""  # of who asked

    @property
    def trace_id(self) -> str:
        return self.id

    @property
    def label(self) -> Label:
        if self.source == "import":  # never served: its answer is known
            return Label.KNOWN_ANSWER
        is_audited = any(given["source"] == "audit_sample" for given in self.feedback)
        return label_of(self.source, is_audit=self.is_audit, is_audited=is_audited)

    @property
    def is_gold(self) -> bool:
        return self.label in GOLD


def to_line(row: ExampleRow | HeldOutRow) -> bytes:
    """Equal rows are equal bytes. Keys stay in their order: that of a tool's parameters is the prompt's, and the gate
    asks with what is written here. (Not `asdict`, which copies every token id: half of the time.)"""
    written = {field.name: getattr(row, field.name) for field in fields(row)}
    return json.dumps(written, separators=(",", ":"), allow_nan=False).encode("ascii") + b"\n"


def example_row(line: bytes) -> ExampleRow:
    return ExampleRow(**json.loads(line))


def held_out_row(line: bytes) -> HeldOutRow:
    return HeldOutRow(**json.loads(line))


def canonical_json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def class_digits(classes: NDArray[np.uint8]) -> str:
    return "".join(map(str, classes.tolist()))


def class_array(digits: str) -> NDArray[np.uint8]:
    return np.frombuffer(digits.encode("ascii"), np.uint8) - np.uint8(ord("0"))
