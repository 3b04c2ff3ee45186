"""A snapshot: the frozen dataset of one training run, a folder that is named by the digest of its content.

`manifest.json` tells the adapter, the filters and how many traces each of them dropped, what the token ids depend on,
every trace of each part, and the digests of the files beside it. Nothing in it depends on when or where it was made, so
the same traces give the same snapshot. Immutable; only `erase` takes the content away, when a trace in it had to be
forgotten, and leaves the manifest, which names traces but quotes none. Not here: making one (freeze.py).
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

from finetune.dataset.errors import SnapshotError
from finetune.dataset.jsonl import PARTIAL, Written, digest_of, read_lines
from finetune.dataset.near import THRESHOLD
from finetune.dataset.render import Identity
from finetune.dataset.rows import ExampleRow, HeldOutRow, canonical_json, example_row, held_out_row
from finetune.dataset.shares import MAX_SHARE, MIN_COUNT
from server.storage.database import Database
from server.traces.lineage import Lineage

FORMAT = 1
MANIFEST = "manifest.json"
Part = Literal["train", "replay", "general", "held_out"]
FILES: dict[Part, str] = {
    "train": "train.jsonl.gz",
    "replay": "replay.jsonl.gz",
    "general": "general.jsonl.gz",
    "held_out": "held_out.jsonl.gz",
}


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which traces a snapshot takes."""

    adapter: str
    min_score: float = 0.5
    """Of an answer's latest score: below it, nothing is learned from it."""
    keep_unlabelled: bool = False
    """Also answers that nobody judged."""
    all_import_turns: bool = False
    """Every assistant message of an imported conversation; otherwise the last one, as exports are made."""
    max_tokens: int = 2048
    """Of one example."""
    min_examples: int = 1
    max_examples: int = 20_000
    max_held_out: int = 2_000
    max_scanned: int = 100_000
    """Traces of each side that are looked at, newest first."""
    max_replay: int = 2_000
    max_key_share: float = MAX_SHARE
    min_key_examples: int = MIN_COUNT
    near_threshold: float = THRESHOLD


@dataclass(frozen=True, kw_only=True)
class Manifest:
    format: int
    selection: Mapping[str, Any]
    identity: Mapping[str, str]
    files: Mapping[Part, Mapping[str, Any]]  # part: sha256 of the lines, num_rows
    traces: Mapping[Part, Sequence[str]]  # part: trace ids, oldest first
    seqs: Mapping[Part, Sequence[int]]  # part: their sequence numbers
    tools: Sequence[str]  # names of the tools offered in what is trained on
    kinds: Mapping[str, int]  # examples to train on: call, no_call, chat
    num_train_tokens: int
    dropped: Mapping[Part, Mapping[str, int]]  # part: reason: traces

    @property
    def digest(self) -> str:
        return "sha256:" + hashlib.sha256(canonical_json(asdict(self))).hexdigest()

    @property
    def adapter(self) -> str:
        return str(self.selection["adapter"])


@dataclass(frozen=True)
class Snapshot:
    path: Path
    manifest: Manifest
    digest: str

    @classmethod
    def open(cls, path: Path) -> Self:
        """Raises SnapshotError for what is no snapshot, or whose manifest is not the one it is named by."""
        try:
            manifest = Manifest(**json.loads((path / MANIFEST).read_bytes()))
        except FileNotFoundError:
            raise SnapshotError(f"there is no snapshot at {path}") from None
        except (ValueError, TypeError) as error:
            raise SnapshotError(f"{path / MANIFEST} cannot be read: {error}") from None
        if folder_name(manifest.digest) != path.name:
            raise SnapshotError(f"{path}: its manifest was changed, its digest is {manifest.digest}")
        return cls(path, manifest, manifest.digest)

    @property
    def identity(self) -> Identity:
        return Identity(**self.manifest.identity)

    @property
    def is_erased(self) -> bool:
        return not (self.path / FILES["train"]).exists()

    def train(self) -> Iterator[ExampleRow]:
        return self._examples("train")

    def replay(self) -> Iterator[ExampleRow]:
        return self._examples("replay")

    def general(self) -> Iterator[ExampleRow]:
        """The base's own answers: trained with KL to the base."""
        return self._examples("general")

    def held_out(self) -> Iterator[HeldOutRow]:
        return map(held_out_row, self._lines("held_out"))

    def verify(self) -> None:
        """Reads everything. Raises SnapshotError naming the file that is not what the manifest says."""
        for part, expected in self.manifest.files.items():
            try:
                found = digest_of(self.path / FILES[part])
            except (OSError, EOFError) as error:
                raise SnapshotError(f"{self.path / FILES[part]} cannot be read: {error}") from None
            if found != Written(**expected):
                raise SnapshotError(f"{self.path / FILES[part]} was changed")

    def check_deleted(self, database: Database) -> list[str]:
        """Ids of its traces that had to be forgotten since: a round on it must begin again without them."""
        return Lineage(database).deleted_from(self.digest)

    def erase(self) -> None:
        """Removes all content but the manifest."""
        for name in FILES.values():
            (self.path / name).unlink(missing_ok=True)

    def _examples(self, part: Part) -> Iterator[ExampleRow]:
        return map(example_row, self._lines(part))

    def _lines(self, part: Part) -> Iterator[bytes]:
        if self.is_erased:
            raise SnapshotError(f"the content of {self.path} was erased, because a trace in it was deleted")
        return read_lines(self.path / FILES[part])


def folder_name(digest: str) -> str:
    """Of the snapshot in its adapter's folder: half of the digest is unique enough and shorter to type."""
    return digest.removeprefix("sha256:")[:32]


def snapshots_of(root: Path, adapter: str) -> list[Snapshot]:
    """Those whose content is there, by digest."""
    folder = root / adapter
    paths = sorted(path for path in folder.iterdir() if not path.name.startswith(PARTIAL)) if folder.is_dir() else []
    return [one for one in map(Snapshot.open, paths) if not one.is_erased]


def erase_deleted(root: Path, adapter: str, database: Database) -> list[Snapshot]:
    """Erases the adapter's snapshots that hold a trace which had to be forgotten; returns them."""
    found = [one for one in snapshots_of(root, adapter) if one.check_deleted(database)]
    for one in found:
        one.erase()
    return found
