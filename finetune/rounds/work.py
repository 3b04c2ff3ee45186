"""The phases of a round, each over the part that does it: snapshot, train, export, import, gate, promote.

The settings are the round's own, kept since it began. Nothing here decides anything, and nothing is remembered between
two phases but what is in the row and in the directory.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from finetune.config import FinetuneSettings
from finetune.dataset.freeze import freeze
from finetune.dataset.general import recent_tool_sets
from finetune.dataset.jsonl import remove_partial
from finetune.dataset.prompts import read_prompts, read_regression_prompts
from finetune.dataset.render import Renderer
from finetune.dataset.rows import ExampleRow
from finetune.dataset.snapshot import Selection, Snapshot, erase_deleted, folder_name
from finetune.gate.results import RegressionScore
from finetune.gate.settings import GateSettings
from finetune.model.allocator import keep_freed_memory
from finetune.rounds.engine import Done, Over, Stage, Task
from finetune.rounds.errors import RoundError, SnapshotChangedError
from finetune.rounds.gating import run_gate
from finetune.rounds.promotion import carry_out, take_in
from finetune.rounds.regression import general_examples, regression_scores
from finetune.rounds.round import Phase, Round
from finetune.rounds.store import RoundStore
from finetune.rounds.weights import ARCHIVE, PEFT, Parent, pack
from finetune.serving.api import ServerApi
from server.adapters.version import VersionRef
from server.storage.clock import utc_now
from server.storage.database import Database
from server.traces.lineage import Lineage

LONG_ROUND = timedelta(days=1)
"""What the log forgets within it is not learned from: the round would begin anew with each trace that goes."""


@dataclass(frozen=True)
class Work:
    database: Database
    api: ServerApi
    model: Path
    renderer: Renderer
    snapshots: Path
    """Where snapshots are kept, a folder an adapter."""
    settings: FinetuneSettings
    """Of a round only what is not its own: concurrency."""
    threads: int
    """That training computes with, from the first to the last step."""
    max_age: timedelta | None
    """After which the log forgets a trace."""
    make_pause: Callable[[Callable[[], None]], Callable[[], None]]
    """From the task's check to the training loop's pause."""

    def stages(self) -> Mapping[Phase, Stage]:
        return {
            Phase.SNAPSHOT: self.snapshot,
            Phase.TRAIN: self.train,
            Phase.EXPORT: self.export,
            Phase.IMPORT: self.take_in,
            Phase.GATE: self.gate,
            Phase.PROMOTE: self.promote,
        }

    def snapshot(self, task: Task) -> Done:
        """Raises NothingToLearnError."""
        own, round = self._own(task.round), task.round
        self._check_base(round)
        erase_deleted(self.snapshots, round.ref.adapter, self.database)
        remove_partial(self.snapshots / round.ref.adapter)  # a kill left what no deletion would find
        selection = Selection(
            adapter=round.ref.adapter,
            min_score=own.min_score,
            keep_unlabelled=own.keep_unlabelled,
            min_examples=own.min_examples,
            max_tokens=own.max_example_tokens,
        )
        frozen = freeze(
            self.database,
            self.renderer,
            selection,
            self.snapshots,
            earlier=self._earlier(round),
            until_seq=round.last_seq,
            until_feedback=round.facts["begin"]["last_feedback_seq"],
            general=self._general(task, own),
            not_before=None if self.max_age is None else utc_now() - self.max_age + min(LONG_ROUND, self.max_age / 2),
        )
        manifest = frozen.manifest
        kept = {part: file["num_rows"] for part, file in manifest.files.items()}
        facts = {"kept": kept, "dropped": {part: dict(counts) for part, counts in manifest.dropped.items()}}
        return Done(facts, {"snapshot": frozen.digest})

    def train(self, task: Task) -> Done:
        """Raises DivergedError, TrainingError, RoundError."""
        round = task.round
        parent = None
        if round.parent is not None:
            ref = VersionRef(round.ref.adapter, round.parent)
            base = self.api.version(ref)["base_digest"]
            if base != round.base_digest:
                raise RoundError(f"{ref} was trained on another base, {base}; this one is {round.base_digest}")
            parent = Parent(str(ref), self.api.export_version(ref))
        import torch  # 200 MB and two seconds, which a sidecar without a round does not need

        from finetune.rounds.training import run_training

        torch.set_num_threads(self.threads)
        keep_freed_memory()
        pause = self.make_pause(task.check)
        return run_training(task, self._frozen(round), self.model, self._own(round), parent=parent, pause=pause)

    def export(self, task: Task) -> Done:
        archive = task.folder / ARCHIVE
        pack(task.folder / PEFT, archive)
        return Done({"num_bytes": archive.stat().st_size})

    def take_in(self, task: Task) -> Done:
        """Raises RoundError, RefusedError, ServerDownError."""
        return take_in(task, self.api, Lineage(self.database), task.folder / ARCHIVE)

    def gate(self, task: Task) -> Done:
        """Raises RefusedError, ServerDownError."""
        own = self._own(task.round)
        earlier = RoundStore(self.database).list(task.round.ref.adapter, limit=None)
        return run_gate(
            task,
            self.api,
            self._frozen(task.round),
            earlier,
            settings=GateSettings(min_clusters=own.min_clusters, min_stratum_clusters=own.min_stratum_clusters),
            max_tokens=own.gate_max_tokens,
            max_traces=own.gate_max_traces,
            concurrency=self.settings.gate_concurrency,
            regression=self._regression,
        )

    def promote(self, task: Task) -> Over:
        """Raises RoundError, RefusedError, ServerDownError."""
        return carry_out(task, self.api, canary_share=self._own(task.round).canary_share)

    def _regression(
        self, task: Task, api: ServerApi, models: tuple[str, str]
    ) -> tuple[RegressionScore, RegressionScore]:
        prompts = read_regression_prompts()
        return regression_scores(task, api, models, self.renderer, prompts, concurrency=self.settings.gate_concurrency)

    def _general(self, task: Task, own: FinetuneSettings) -> Iterator[ExampleRow]:
        adapter, until = task.round.ref.adapter, task.round.last_seq
        tool_sets = recent_tool_sets(self.database, adapter, until_seq=until)
        concurrency = self.settings.gate_concurrency
        prompts = read_prompts()[: own.general_prompts]
        return general_examples(
            task, self.api, self.renderer, prompts, tool_sets, seed=own.seed, concurrency=concurrency
        )

    def _own(self, round: Round) -> FinetuneSettings:
        return self.settings.with_round(round.settings)

    def _check_base(self, round: Round) -> None:
        """Whatever else this adapter has was made for one base; another one is another adapter's."""
        found = self.renderer.identity.base_digest
        if found != round.base_digest:
            raise RoundError(f"the base changed: {self.model} is {found} now, the round began with {round.base_digest}")
        self.api.create_adapter(round.ref.adapter, str(round.ref))  # also so that a sidecar finds it after a kill
        adapter = self.api.adapter(round.ref.adapter)
        for version in adapter["versions"]:
            if version["version"] in (adapter["live"], adapter["canary"]) and version["base_digest"] != found:
                raise RoundError(
                    f"the base changed: {version['version']} was trained on {version['base_digest']}, {self.model} is "
                    f"{found}; roll it back (sterna adapters rollback {round.ref.adapter}), or begin another adapter"
                )

    def _earlier(self, round: Round) -> list[Snapshot]:
        """Those of earlier rounds whose content is still here, oldest first."""
        rounds = RoundStore(self.database).list(round.ref.adapter, limit=None)
        found = []
        for one in sorted(rounds, key=lambda one: one.ref.number):
            if one.snapshot is not None and one.ref.number < round.ref.number:
                path = self.snapshots / one.ref.adapter / folder_name(one.snapshot)
                if path.is_dir() and not (snapshot := Snapshot.open(path)).is_erased:
                    found.append(snapshot)
        return found

    def _frozen(self, round: Round) -> Snapshot:
        assert round.snapshot is not None
        path = self.snapshots / round.ref.adapter / folder_name(round.snapshot)
        if not path.is_dir():
            raise SnapshotChangedError(f"its snapshot ({path}) is not on this machine")
        snapshot = Snapshot.open(path)
        if snapshot.is_erased:
            raise SnapshotChangedError("its snapshot was erased, because traces in it were deleted")
        return snapshot
