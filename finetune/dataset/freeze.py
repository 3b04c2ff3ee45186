"""Makes a snapshot: reads the log newest first, filters, renders, compares with what is held out, and freezes.

The held-out side comes first, because no question that nearly equals one of it may be trained on. Rows go through a
spool on the disk, so that memory holds a few numbers an example. Written into a partial folder and moved into place in
one step: whoever is killed in between leaves nothing that anybody sees.
"""

import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import IO

from finetune.dataset.candidates import Candidates
from finetune.dataset.errors import NothingToLearnError
from finetune.dataset.filters import Drop
from finetune.dataset.jsonl import Written, new_folder, settle, write_file, write_lines
from finetune.dataset.near import NearTexts, near_groups, same_groups
from finetune.dataset.render import Renderer
from finetune.dataset.replay import replay_rows
from finetune.dataset.rows import ExampleRow, HeldOutRow, canonical_json, example_row, to_line
from finetune.dataset.shares import key_limit, newest_of_each, scan_limit
from finetune.dataset.snapshot import FILES, FORMAT, MANIFEST, Manifest, Part, Selection, Snapshot, folder_name
from finetune.dataset.source import count_by_key, count_traces, last_seq, read_traces
from server.storage.database import Database
from server.traces.lineage import Lineage


@dataclass(frozen=True, slots=True)
class _Kept:
    """An example in the spool."""

    seq: int
    turn: int
    key_id: str
    start: int
    length: int


@dataclass
class _Part:
    """One file's rows, and what the manifest tells of them."""

    written: Written | None = None
    traces: dict[str, int] = field(default_factory=dict)  # id: sequence number
    tools: set[str] = field(default_factory=set)
    kinds: Counter[str] = field(default_factory=Counter)
    num_tokens: int = 0
    dropped: Counter[Drop] = field(default_factory=Counter)

    def write(self, path: Path, rows: Iterable[ExampleRow | HeldOutRow]) -> None:
        self.written = write_lines(path, (self._told(row) for row in rows))

    def _told(self, row: ExampleRow | HeldOutRow) -> bytes:
        if row.seq:
            self.traces[row.trace_id] = row.seq
        self.kinds[row.kind] += 1
        if isinstance(row, ExampleRow):
            self.tools |= set(row.tools)
            self.num_tokens += row.num_tokens
        return to_line(row)


def freeze(
    database: Database,
    renderer: Renderer,
    selection: Selection,
    root: Path,
    *,
    earlier: Sequence[Snapshot] = (),
    general: Iterable[ExampleRow] = (),
    until_seq: int | None = None,
    until_feedback: int | None = None,
    not_before: datetime | None = None,
) -> Snapshot:
    """The snapshot of the log as it is now, in `root/<adapter>/`. `earlier`: of which examples are replayed.

    `until_seq`: the newest trace that it may hold, and `until_feedback` the newest feedback: a round that is taken up
    or begins anew does so on the same log.
    `not_before`: when the oldest came.

    Raises NothingToLearnError with the number of traces that each filter dropped.
    """
    until = last_seq(database) if until_seq is None else until_seq
    candidates = Candidates(renderer, selection, not_before=not_before)
    parts: dict[Part, _Part] = {part: _Part() for part in FILES}
    folder = root / selection.adapter
    with new_folder(folder) as partial, tempfile.TemporaryFile(dir=partial) as spool:
        near, held_out = _held_out(database, candidates, until, until_feedback, parts["held_out"].dropped)
        kept, reached = _train(database, candidates, near, until, until_feedback, spool, parts["train"].dropped)
        if len(kept) < selection.min_examples:
            dropped = {str(reason): count for reason, count in sorted(parts["train"].dropped.items())}
            raise NothingToLearnError(selection.adapter, len(kept), selection.min_examples, dropped)
        replayed = replay_rows(
            database, candidates, near, earlier, reached, parts["replay"].dropped, until_feedback=until_feedback
        )
        parts["train"].write(partial / FILES["train"], _spooled(spool, kept))
        parts["replay"].write(partial / FILES["replay"], replayed)
        parts["general"].write(partial / FILES["general"], general)
        parts["held_out"].write(partial / FILES["held_out"], held_out)
        manifest = _manifest(selection, renderer, parts)
        write_file(partial / MANIFEST, canonical_json(asdict(manifest)))
        # First, so that no content is ever on the disk of which nobody would hear that a trace in it was deleted.
        Lineage(database).add_snapshot(
            manifest.digest, selection.adapter, {part: manifest.seqs[part] for part in ("train", "replay", "held_out")}
        )
        settle(partial, folder / folder_name(manifest.digest))
    return Snapshot.open(folder / folder_name(manifest.digest))


def _held_out(
    database: Database, candidates: Candidates, until: int, until_feedback: int | None, dropped: Counter[Drop]
) -> tuple[NearTexts, list[HeldOutRow]]:
    """The questions that nothing near to may be trained on (of every held-out trace: what has no label today may have
    one tomorrow), and the rows, oldest first: of more than fit gold, which alone decides, then the newest. No key fills
    what there is room for: the gate is to have others' labels too."""
    selection = candidates.selection
    near, known = NearTexts(selection.near_threshold), set()
    gold: list[HeldOutRow] = []
    others: list[HeldOutRow] = []
    share, floor = selection.max_key_share, selection.min_key_examples
    num_keys = len(count_by_key(database, selection.adapter, "held_out", until_seq=until))
    limit = scan_limit(num_keys, selection.max_held_out, max_share=share, min_count=floor)
    counts: Counter[str] = Counter()
    scanned = read_traces(database, selection.adapter, "held_out", until_seq=until, until_feedback=until_feedback)
    for num_scanned, trace in enumerate(scanned):
        if num_scanned == selection.max_scanned:
            total = count_traces(database, selection.adapter, "held_out", until_seq=until)
            dropped[Drop.OVER_BUDGET] += total - num_scanned
            break
        question = candidates.question(trace)
        if question and question not in known:
            known.add(question)
            near.add(question)
        row = candidates.held_out(trace)
        if isinstance(row, Drop):
            dropped[row] += 1
        elif len(gold if row.is_gold else others) >= selection.max_held_out:
            dropped[Drop.OVER_BUDGET] += 1
        elif not row.is_gold:
            others.append(row)
        elif counts[trace.key_id] >= limit:
            dropped[Drop.KEY_SHARE] += 1
        else:
            counts[trace.key_id] += 1
            gold.append(row)
    room = selection.max_held_out - len(gold)
    if len(others) > room:
        dropped[Drop.OVER_BUDGET] += len(others) - room
    rows = sorted([*gold, *others[:room]], key=lambda row: row.seq)
    return near, _with_clusters(rows, selection.near_threshold)


def _with_clusters(rows: Sequence[HeldOutRow], near_threshold: float) -> list[HeldOutRow]:
    """Traces of one episode, of episodes with the same first question and of nearly equal questions are one cluster,
    which goes by the group of its oldest trace."""
    near = near_groups([row.question for row in rows], near_threshold)
    roots = same_groups([row.cluster for row in rows], near) if rows else []
    return [replace(row, cluster=rows[root].cluster) for row, root in zip(rows, roots, strict=True)]


def _train(
    database: Database,
    candidates: Candidates,
    near: NearTexts,
    until: int,
    until_feedback: int | None,
    spool: IO[bytes],
    dropped: Counter[Drop],
) -> tuple[list[_Kept], int]:
    """Fills the spool; returns what is kept of it, oldest first, and the oldest trace that was looked at (0: all)."""
    selection = candidates.selection
    share, floor = selection.max_key_share, selection.min_key_examples
    num_keys = len(count_by_key(database, selection.adapter, "train", until_seq=until))
    limit = scan_limit(num_keys, selection.max_examples, max_share=share, min_count=floor)
    counts: Counter[str] = Counter()
    seen: set[bytes] = set()
    kept: list[_Kept] = []
    reached, newest = 0, until + 1
    scanned = read_traces(database, selection.adapter, "train", until_seq=until, until_feedback=until_feedback)
    for num_scanned, trace in enumerate(scanned):
        if num_scanned == selection.max_scanned or len(kept) >= selection.max_examples:
            total = count_traces(database, selection.adapter, "train", until_seq=until)
            dropped[Drop.OVER_BUDGET] += total - num_scanned
            reached = newest
            break
        newest = trace.seq
        if counts[trace.key_id] >= limit:
            dropped[Drop.KEY_SHARE] += 1
            continue
        rows = candidates.examples(trace, near, seen)
        if isinstance(rows, Drop):
            dropped[rows] += 1
            continue
        for turn, row in enumerate(rows):
            line = to_line(row)
            kept.append(_Kept(trace.seq, turn, trace.key_id, spool.tell(), len(line)))
            spool.write(line)
        counts[trace.key_id] += len(rows)
    return _within_shares(kept, key_limit(counts, max_share=share, min_count=floor), dropped), reached


def _within_shares(kept: Sequence[_Kept], limit: int, dropped: Counter[Drop]) -> list[_Kept]:
    """`kept`: newest first. The newest of each key stay."""
    chosen = newest_of_each(kept, lambda one: one.key_id, limit)
    if len(chosen) < len(kept):
        dropped[Drop.KEY_SHARE] += len(kept) - len(chosen)
    return sorted(chosen, key=lambda one: (one.seq, one.turn))


def _spooled(spool: IO[bytes], kept: Sequence[_Kept]) -> Iterator[ExampleRow]:
    for one in kept:
        spool.seek(one.start)
        yield example_row(spool.read(one.length))


def _manifest(selection: Selection, renderer: Renderer, parts: dict[Part, _Part]) -> Manifest:
    train = parts["train"]
    files = {part: asdict(one.written) for part, one in parts.items() if one.written is not None}
    return Manifest(
        format=FORMAT,
        selection=asdict(selection),
        identity=asdict(renderer.identity),
        files=files,
        traces={part: list(one.traces) for part, one in parts.items()},
        seqs={part: list(one.traces.values()) for part, one in parts.items()},
        tools=sorted(train.tools | parts["replay"].tools),
        kinds=dict(sorted(train.kinds.items())),
        num_train_tokens=train.num_tokens,
        dropped={
            part: {str(reason): count for reason, count in sorted(one.dropped.items())} for part, one in parts.items()
        },
    )
