"""The ablation script on a tiny model: every recipe trains and is measured, and the last line is JSON."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import ablations
from finetune.dataset.freeze import freeze
from finetune.dataset.snapshot import Selection, Snapshot
from finetune.packed import Example
from server.storage.database import Database
from tests.finetune.rounds.test_whole_round import Bench, _with_rejected
from tests.tiny_models import write_tiny_gguf


@pytest.mark.slow
def test_every_recipe_is_trained_and_measured(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_tiny_gguf(tmp_path / "tiny.gguf", context_length=4096)
    bench = Bench(database, model, tmp_path, num_logged=60)
    snapshot = freeze(database, bench.renderer, Selection(adapter="tools"), tmp_path / "snapshots")
    monkeypatch.setattr(Snapshot, "train", _with_rejected(Snapshot.train))
    chosen = ("rank=2", "max_steps=2", "tokens_per_step=512", "learning_rate=0.003")
    flags = [word for one in chosen for word in ("--set", one)]
    ablations.main([str(snapshot.path), "--model", str(model), "--seeds", "1", "--threads", "1", *flags])
    told = capsys.readouterr().out.strip().splitlines()
    assert [line.split("  ")[0] for line in told[1:-1]] == list(ablations.RECIPES)
    found = json.loads(told[-1])
    losses = {name: scores[0]["loss"] for name, scores in found["scores"].items()}
    assert all(math.isfinite(loss) for loss in losses.values())
    assert losses["base"] != losses["dpo"]
    assert found["gains"]["base"]["loss"] == {"mean": 0.0, "half_95": None}


def test_there_are_many_ways_not_to_call() -> None:
    class Model:
        def logits(self, token_ids: np.ndarray, at: np.ndarray) -> torch.Tensor:
            """Each token is followed by the next number."""
            return torch.nn.functional.one_hot(torch.from_numpy((token_ids[at] + 1) % 7).long(), 32).float()

    def answer(is_call: bool, *token_ids: int) -> Example:
        weights = np.array([0, *(1.0 for _ in token_ids[1:])], np.float32)
        return Example("one", np.array(token_ids, np.int32), weights, "cluster", is_call=is_call)

    calls = [answer(True, 1, 2, 3), answer(True, 1, 2, 4)]
    others = [answer(False, 3, 5, 20), answer(False, 1, 9, 20)]
    found = ablations._measure(Model(), [*calls, *others])  # type: ignore[arg-type]
    assert (found["call"], found["no_call"]) == (0.5, 0.5), "after 3 comes 4, no call; after 1 what begins one"


def test_a_gain_is_paired_by_seed() -> None:
    def scores(*losses: float) -> list[ablations.Scores]:
        return [{"loss": loss} for loss in losses]

    assert ablations.gain(scores(1.5, 2.5, 3.5), scores(1.0, 2.0, 3.0), "loss") == {"mean": 0.5, "half_95": 0.0}
    found = ablations.gain(scores(1.0, 3.0, 5.0), scores(0.0, 0.0, 0.0), "loss")
    assert found["half_95"] == pytest.approx(4.30 * 2 / math.sqrt(3))
