"""Whole rounds on a tiny model: real log, snapshot, training and registry; only the answers are a script's."""

import dataclasses
import io
import json
import random
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from finetune.config import FinetuneSettings
from finetune.dataset.render import Renderer
from finetune.dataset.rows import ExampleRow
from finetune.dataset.snapshot import Snapshot, folder_name
from finetune.rounds.engine import RoundEngine
from finetune.rounds.lease import take
from finetune.rounds.promotion import abandon
from finetune.rounds.report import round_page
from finetune.rounds.round import Phase, Result, Round
from finetune.rounds.store import RoundStore
from finetune.rounds.work import Work
from server.adapters.states import State
from server.adapters.version import VersionRef
from server.storage.database import Database, open_database
from server.traces.deletion import TraceDeletion
from server.traces.exchange import import_lines
from server.traces.filters import TraceFilter
from server.traces.lineage import Lineage
from server.traces.store import TraceStore
from server.traces.viewer import ADMIN
from tests.finetune.fake_server import BASE, FakeServer
from tests.finetune.rounds.held_out import TOOL, call, good
from tests.finetune.rounds.stages import Watcher
from tests.server.postgres import migrated_file
from tests.tiny_models import write_tiny_gguf

SETTINGS = FinetuneSettings(
    rank=2, learning_rate=0.003, max_steps=5, checkpoint_every=2, tokens_per_step=512, min_clusters=20,
    min_stratum_clusters=5, gate_max_tokens=16,
)  # fmt: skip


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf", context_length=4096)


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class KilledError(BaseException):
    """Nothing catches it, as nothing catches a kill."""


class Bench:
    def __init__(
        self,
        database: Database,
        model: Path,
        folder: Path,
        settings: FinetuneSettings = SETTINGS,
        *,
        num_logged: int = 120,
    ) -> None:
        self.database, self.folder, self.settings, self.model = database, folder, settings, model
        self.renderer = Renderer.open(model)
        self.base_digest = self.renderer.identity.base_digest
        self.server = FakeServer(database, self.answer, base_digest=self.base_digest)
        self.is_good = True
        self.steps: Callable[[], None] = lambda: None
        self.server.on_request = lambda: self.steps()
        self.store = RoundStore(database)
        self.watcher = Watcher()
        self.num_asked = 0
        self.log(num_logged)

    def answer(self, model: str, body: Mapping[str, Any]) -> Mapping[str, Any]:
        text = body["messages"][-1]["content"]
        if model != BASE and self.is_good and text.split()[0] in ("add", "chat"):
            return good({"messages": [{"content": " ".join(text.split()[:2])}]})
        return {"role": "assistant", "content": "Something short and general."}

    def log(self, num: int) -> None:
        """Imported conversations, each about another thing."""
        lines = []
        for number in range(self.num_asked, self.num_asked + num):
            dice = random.Random(number)
            words = " ".join(f"{dice.getrandbits(40):x}" for _ in range(6))
            word = "chat" if number % 3 == 0 else "add"
            right = call(number) if word == "add" else {"role": "assistant", "content": "No."}
            messages = [{"role": "user", "content": f"{word} {number} {words}"}, right]
            lines.append(json.dumps({"messages": messages, "tools": [TOOL]}))
        import_lines(TraceStore(self.database), ADMIN, lines, adapter="tools")
        self.num_asked += num

    def engine(self) -> RoundEngine:
        api = self.server.api()

        def make_pause(check: Callable[[], None]) -> Callable[[], None]:
            def pause() -> None:
                self.steps()
                check()

            return pause

        work = Work(
            self.database, api, self.model, self.renderer, self.folder / "snapshots", self.settings, 1, None, make_pause
        )
        return RoundEngine(
            self.store,
            work.stages(),
            self.folder / "rounds",
            deleted_from=Lineage(self.database).deleted_from,
            abandon=lambda round, reason: abandon(api, round, reason),
            observer=self.watcher,
        )

    def run(self, *, parent: int | None = None) -> Round:
        lease = take(self.database, "tools", holder=f"holder {random.random()}", sleep=lambda s: None, clock=_far())
        round = self.store.unfinished("tools") or self.store.begin(
            lease, cause="test", base_digest=self.base_digest, settings=self.settings.of_round(), parent=parent
        )
        return self.engine().run(lease, round)

    def snapshot(self, round: Round) -> Snapshot:
        assert round.snapshot is not None
        return Snapshot.open(self.folder / "snapshots" / "tools" / folder_name(round.snapshot))


def _far() -> Callable[[], float]:
    """A clock on which every wait is long enough."""
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 100.0
        return now

    return clock


@pytest.fixture
def bench(database: Database, tiny_model: Path, tmp_path: Path) -> Bench:
    return Bench(database, tiny_model, tmp_path)


def test_from_the_log_to_a_canary(bench: Bench) -> None:
    done = bench.run()
    assert done.result is Result.CANARY, done.reason
    assert bench.server.registry.version(VersionRef("tools", 1)).state is State.CANARY
    facts = done.facts
    assert facts["snapshot"]["kept"]["train"] + facts["snapshot"]["kept"]["held_out"] == 120
    assert facts["snapshot"]["kept"]["general"] > 50
    assert facts["train"]["num_steps"] == 5
    assert len(facts["train"]["losses"]) == 5
    assert facts["train"]["is_exact"]
    assert done.decision is not None
    assert done.decision["regression_candidate"]["num_prompts"] == 60
    train_ids = bench.snapshot(done).manifest.traces["train"]
    (sighting,) = Lineage(bench.database).sightings(train_ids[0])
    assert sighting.versions == ("tools@1",)
    names = zipfile.ZipFile(io.BytesIO(bench.server.archives["tools@1"])).namelist()
    assert names == ["adapter_config.json", "adapter_model.safetensors"]
    assert list((bench.folder / "rounds" / "tools-r1").iterdir()) == []


def test_the_best_checkpoint_is_exported(bench: Bench) -> None:
    bench.settings = SETTINGS.model_copy(update={"evaluate_every": 1, "patience": 2, "learning_rate": 0.3})
    done = bench.run()
    facts = done.facts["train"]
    found = facts["validation"]
    losses = dict(found["losses"])
    assert losses[found["best_step"]] == found["best_loss"] == min(losses.values())
    assert found["stopped_early"] == (facts["num_steps"] < SETTINGS.max_steps)
    assert found["num_examples"] >= 1
    assert "which is exported" in round_page(done)


def test_what_may_be_chosen_reaches_the_weights(bench: Bench) -> None:
    plain = bench.run().facts["train"]["losses"]
    bench.settings = SETTINGS.model_copy(
        update={"ranks": "q_proj=2,down_proj=3", "upcast": True, "checkpointing": True}
    )
    chosen = bench.run().facts["train"]["losses"]
    assert chosen[0][1] == pytest.approx(plain[0][1], rel=0.02), "B is zero: the base's loss, rounded otherwise"
    with zipfile.ZipFile(io.BytesIO(bench.server.archives["tools@2"])) as archive:
        config = json.loads(archive.read("adapter_config.json"))
        tensors = safetensors.torch.load(archive.read("adapter_model.safetensors"))
    assert config["rank_pattern"] == {"q_proj": 2, "down_proj": 3}
    ranks = {name.split(".")[-3]: len(value) for name, value in tensors.items() if "lora_A" in name}
    assert (ranks["q_proj"], ranks["down_proj"], ranks["k_proj"]) == (2, 3, SETTINGS.rank)
    assert all(value.any() for value in tensors.values()), "every factor was trained"


@pytest.mark.slow
def test_two_rounds_in_a_row_hold_nothing_out_twice(bench: Bench) -> None:
    first = bench.run()
    bench.server.registry.promote(VersionRef("tools", 1), asked_by="test", reason="test")
    bench.log(90)
    second = bench.run()
    snapshots = bench.snapshot(first), bench.snapshot(second)
    held_out = {row.question for one in snapshots for row in one.held_out()}
    trained = {row.question for row in (*snapshots[1].train(), *snapshots[1].replay())}
    assert len(held_out) > 50
    assert not held_out & trained
    assert not set(snapshots[0].manifest.traces["held_out"]) & set(snapshots[1].manifest.traces["train"])
    assert second.decision is not None
    used = set(first.decision["clusters"]) if first.decision else set()
    assert not used & set(second.decision["clusters"]), "fresh ones only"
    assert second.decision["opponent"] == "tools@1"


def _on_a_copy(log: Path, model: Path, folder: Path) -> Bench:
    """The same log, to the last secret."""
    shutil.copy(log, folder / "log.db")
    return Bench(open_database(f"sqlite:///{folder}/log.db"), model, folder, num_logged=0)


def _with_rejected(train: Callable[[Snapshot], Iterator[ExampleRow]]) -> Callable[[Snapshot], Iterator[ExampleRow]]:
    """As if every second answer had been corrected: imports have none that was served."""

    def rows(snapshot: Snapshot) -> Iterator[ExampleRow]:
        for number, row in enumerate(train(snapshot)):
            *answer, end = row.answer_ids
            yield row if number % 2 else dataclasses.replace(row, rejected_ids=[*answer[::-1], end])

    return rows


def disturbed(bench: Bench, dice: random.Random, mean: int) -> tuple[Round, int]:
    """Killed again and again until it is over."""
    num_kills = 0
    left = dice.randrange(mean)

    def step() -> None:
        nonlocal left, num_kills
        left -= 1
        if left < 0:
            left = dice.randrange(mean)
            num_kills += 1
            raise KilledError

    bench.steps = step
    while True:
        try:
            return bench.run(), num_kills
        except KilledError:
            continue


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seed", "mean", "changes"),
    [
        (1, 120, {}),
        (2, 40, {}),
        (3, 60, {"evaluate_every": 1, "patience": 1, "learning_rate": 0.3, "dropout": 0.1}),
        (4, 60, {"evaluate_every": 2, "dpo_weight": 1.0, "sequence_weight": 0.5, "call_head_weight": 0.5,
                 "distrust": True, "optimizer": "muon"}),
    ],
)  # fmt: skip
def test_killed_anywhere_it_ends_with_the_same_weights_and_the_same_decision(
    tiny_model: Path,
    tmp_path: Path,
    seed: int,
    mean: int,
    changes: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Snapshot, "train", _with_rejected(Snapshot.train))
    for name in ("undisturbed", "disturbed"):
        (tmp_path / name).mkdir()
    shutil.copy(migrated_file(), tmp_path / "log.db")
    database = open_database(f"sqlite:///{tmp_path}/log.db")
    Bench(database, tiny_model, tmp_path)
    database.close()
    first, second = (
        _on_a_copy(tmp_path / "log.db", tiny_model, tmp_path / name) for name in ("undisturbed", "disturbed")
    )
    first.settings = second.settings = SETTINGS.model_copy(update=changes)
    expected = first.run()
    found, num_kills = disturbed(second, random.Random(seed), mean)
    assert num_kills > 2
    assert (found.result, found.reason, found.facts) == (expected.result, expected.reason, expected.facts)
    assert found.snapshot == expected.snapshot
    assert found.decision == expected.decision
    assert (found.facts["train"].get("num_pairs", 0) > 30) == ("dpo_weight" in changes)
    archives = [bench.server.archives["tools@1"] for bench in (first, second)]
    assert archives[0] == archives[1]
    with zipfile.ZipFile(io.BytesIO(archives[0])) as archive:
        assert b"call_head" not in archive.read("adapter_model.safetensors"), "it is not exported"
    for bench in (first, second):
        bench.database.close()


@pytest.mark.slow
def test_a_deleted_trace_is_unlearned_before_it_is_learned(bench: Bench) -> None:
    num_steps = 0
    gone: list[str] = []

    def delete_one() -> None:
        nonlocal num_steps
        num_steps += 1
        round = bench.store.unfinished("tools")
        if round is not None and round.phase is Phase.TRAIN and not gone:
            gone.append(bench.snapshot(round).manifest.traces["train"][0])
            TraceDeletion(bench.database).delete(ADMIN, TraceFilter(trace_id=gone[0]))

    bench.steps = delete_one
    done = bench.run()
    assert done.num_restarts == 1
    assert done.result is Result.CANARY
    assert gone[0] not in bench.snapshot(done).manifest.traces["train"]
    assert [one.versions for one in Lineage(bench.database).sightings(gone[0])] == [()]


@pytest.mark.slow
def test_a_warm_start_begins_with_its_parent(bench: Bench) -> None:
    bench.is_good = False
    first = bench.run()
    assert first.result is Result.REJECTED
    bench.settings = SETTINGS.model_copy(update={"learning_rate": 1e-9, "rank": 4, "max_steps": 1})
    bench.log(3)
    second = bench.run(parent=1)
    assert (second.parent, second.version) == (1, 2)
    assert bench.server.registry.version(VersionRef("tools", 2)).parent == "tools@1"
    weights = [
        zipfile.ZipFile(io.BytesIO(bench.server.archives[name])).read("adapter_model.safetensors")
        for name in ("tools@1", "tools@2")
    ]
    assert len(weights[0]) == len(weights[1]), "the parent's rank"
    first_ids = bench.snapshot(first).manifest.traces["train"]
    sightings = Lineage(bench.database).sightings(first_ids[0])
    assert sightings[0].versions == ("tools@1", "tools@2"), "what the parent learned, it has learned too"


def test_training_that_diverges(bench: Bench) -> None:
    bench.settings = SETTINGS.model_copy(update={"learning_rate": 1e30})
    done = bench.run()
    assert done.result is Result.FAILED
    assert done.reason.startswith("training diverged: the ")
    with pytest.raises(Exception, match="no version"):
        bench.server.registry.version(VersionRef("tools", 1))


def test_nothing_to_learn(bench: Bench) -> None:
    bench.settings = SETTINGS.model_copy(update={"max_example_tokens": 8})
    done = bench.run()
    assert done.result is Result.NOTHING_TO_LEARN
    assert "too_long" in done.reason


def test_a_base_that_changed_under_the_adapter(bench: Bench, tmp_path: Path) -> None:
    bench.run()
    other = write_tiny_gguf(tmp_path / "other.gguf", context_length=4096, seed=5)
    changed = Bench(bench.database, other, tmp_path / "other")
    bench.server.registry.promote(VersionRef("tools", 1), asked_by="test", reason="test")
    done = changed.run()
    assert done.result is Result.FAILED
    assert done.reason.startswith("the base changed: tools@1 was trained on sha256:")
