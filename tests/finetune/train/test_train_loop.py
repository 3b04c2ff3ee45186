"""The loop on a small network: it learns, resumes bit for bit, stops early, refuses what diverges, splits exactly."""

import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from finetune.errors import DivergedError, TrainingError
from finetune.train.checkpoint import Checkpoints, Machine
from finetune.train.loop import StepLog, TrainResult, train
from finetune.train.schedule import learning_rate
from finetune.train.settings import TrainSettings
from tests.patience import PATIENCE_SECONDS

IDENTITY = {"data": "sha256:1"}
Batch = tuple[Tensor, Tensor]


class Classifier:
    """Two layers in float64; a batch is (inputs [N, 8], labels [N]) with unit weights."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(1)
        shapes = {"hidden.weight": (16, 8), "head.weight": (4, 16), "head.bias": (4,)}
        self._parameters = {
            name: (torch.randn(shape, generator=generator, dtype=dtype) / 4).requires_grad_()
            for name, shape in shapes.items()
        }

    def parameters(self) -> dict[str, Tensor]:
        return self._parameters

    def weight_of(self, batch: Batch) -> float:
        return float(len(batch[0]))

    def tokens_of(self, batch: Batch) -> int:
        return len(batch[0])

    def loss(self, batch: Batch) -> Tensor:
        hidden = torch.tanh(batch[0] @ self._parameters["hidden.weight"].T)
        logits = hidden @ self._parameters["head.weight"].T + self._parameters["head.bias"]
        return torch.nn.functional.cross_entropy(logits, batch[1], reduction="sum")

    def backward(self, batch: Batch, normalizer: float) -> float:
        loss = self.loss(batch) / normalizer
        loss.backward()
        return loss.item()


def data(step: int, num_parts: int = 1, dtype: torch.dtype = torch.float64) -> list[Batch]:
    generator = torch.Generator().manual_seed(1000 + step)
    inputs = torch.randn((24, 8), generator=generator, dtype=torch.float64)
    labels = inputs[:, :4].argmax(1)
    sizes = {1: [24], 2: [12, 12], 3: [5, 8, 11]}[num_parts]
    return list(zip(inputs.to(dtype).split(sizes), labels.split(sizes), strict=True))


def run(
    directory: Path,
    batches: Callable[[int], Sequence[Batch]] = data,
    *,
    model: Classifier | None = None,
    settings: TrainSettings | None = None,
    **options: Any,
) -> tuple[TrainResult, list[StepLog], dict[str, Tensor]]:
    model = model or Classifier()
    logs: list[StepLog] = []
    options = {"identity": IDENTITY, **options}
    settings = settings or TrainSettings(num_steps=30, learning_rate=0.02, checkpoint_every=7)
    result = train(model, batches, settings, directory, on_step=logs.append, **options)
    return result, logs, {name: tensor.detach().clone() for name, tensor in model.parameters().items()}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_it_learns(tmp_path: Path, optimizer: Any) -> None:
    settings = TrainSettings(num_steps=60, learning_rate=0.05, optimizer=optimizer)
    result, logs, _ = run(tmp_path, settings=settings)
    assert logs[0].loss > 1.2
    assert logs[-1].loss < 0.4
    assert result.progress.num_tokens == 60 * 24
    assert [log.step for log in logs] == list(range(1, 61))
    assert all(log.grad_norm > 0 for log in logs)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_named_matrices_get_their_share_of_the_rate(tmp_path: Path, optimizer: Any) -> None:
    settings = TrainSettings(num_steps=1, learning_rate=0.02, optimizer=optimizer, warmup_share=0.0, weight_decay=0.1)
    before = {name: tensor.detach().clone() for name, tensor in Classifier().parameters().items()}
    moved = []
    for share in (1.0, 0.25):
        _, _, after = run(
            tmp_path / f"{share}",
            settings=settings,
            adamw_names=frozenset({"head.weight"}),
            rates={"head.weight": share},
        )
        moved.append({name: after[name] - before[name] for name in before})
    assert moved[1]["head.weight"].allclose(moved[0]["head.weight"] / 4)
    assert moved[0]["head.weight"].abs().min() > 0.01
    assert all(moved[1][name].equal(moved[0][name]) for name in ("hidden.weight", "head.bias"))


class KilledError(Exception):
    pass


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("kill_at", [3, 7, 8, 20])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, optimizer: Any, kill_at: int) -> None:
    settings = TrainSettings(
        num_steps=30, learning_rate=0.02, optimizer=optimizer, checkpoint_every=7, weight_decay=0.1
    )
    _, undisturbed, expected = run(tmp_path / "one", settings=settings)
    calls = 0

    def kill() -> None:
        nonlocal calls
        calls += 1
        if calls > kill_at:
            raise KilledError

    with pytest.raises(KilledError):
        run(tmp_path / "two", settings=settings, pause=kill)
    result, resumed, found = run(tmp_path / "two", settings=settings)
    assert result.is_exact
    assert resumed[0].step == kill_at // 7 * 7 + 1
    assert [log.loss for log in resumed] == [log.loss for log in undisturbed[-len(resumed) :]]
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_how_a_step_is_cut_does_not_matter(tmp_path: Path) -> None:
    _, whole_logs, whole = run(tmp_path / "whole")
    for num_parts in (2, 3):
        _, logs, parts = run(tmp_path / f"{num_parts}", lambda step, n=num_parts: data(step, n))  # type: ignore[misc]
        assert all(math.isclose(a.loss, b.loss, rel_tol=1e-12) for a, b in zip(whole_logs, logs, strict=True))
        assert all(torch.allclose(whole[name], parts[name], rtol=1e-10, atol=1e-12) for name in whole)


def test_it_stops_early_and_gives_back_the_best(tmp_path: Path) -> None:
    settings = TrainSettings(num_steps=100, learning_rate=0.02, eval_every=5, patience=3)
    losses = iter([3.0, 2.0, 1.0, 1.5, 1.6, 1.7, 0.5])
    kept: list[Tensor] = []
    model = Classifier()

    def evaluate() -> float:
        kept.append(model.parameters()["head.weight"].detach().clone())
        return next(losses)

    result, logs, found = run(tmp_path, model=model, settings=settings, evaluate=evaluate)
    assert result.stopped_early
    assert (result.progress.step, result.progress.best_step, result.progress.best_loss) == (30, 15, 1.0)
    assert torch.equal(found["head.weight"], kept[2])
    assert [log.validation_loss for log in logs if log.validation_loss is not None] == [3.0, 2.0, 1.0, 1.5, 1.6, 1.7]
    _, logs, found = run(tmp_path, settings=settings, evaluate=evaluate)
    assert logs == []
    assert torch.equal(found["head.weight"], kept[2])


def test_what_is_no_number_ends_the_run(tmp_path: Path) -> None:
    def poisoned(step: int) -> list[Batch]:
        (inputs, labels), *_ = data(step)
        return [(inputs * math.nan, labels)] if step == 9 else [(inputs, labels)]

    with pytest.raises(DivergedError, match="loss in step 10 is nan"):
        run(tmp_path, poisoned)
    newest = Checkpoints(
        tmp_path,
        {"settings": TrainSettings(num_steps=30, learning_rate=0.02, checkpoint_every=7).as_json(), **IDENTITY},
    ).newest()
    assert newest is not None
    assert newest.progress.step == 7
    assert all(tensor.isfinite().all() for tensor in newest.parameters.values())


def test_a_loss_that_runs_away_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match="runs away"):
        run(tmp_path, settings=TrainSettings(num_steps=200, learning_rate=50.0))


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(TrainingError, match="data differ"):
        run(tmp_path, identity={"data": "sha256:2"})
    with pytest.raises(TrainingError, match="settings differ"):
        run(tmp_path, settings=TrainSettings(num_steps=31))


def test_another_thread_count_is_no_exact_resumption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def killed_at(step: int) -> None:
        def batches(at: int) -> Sequence[Batch]:
            if at == step:
                raise KilledError
            return data(at)

        with pytest.raises(KilledError):
            run(tmp_path, batches)

    here = Machine.here()
    killed_at(10)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(Machine, "here", lambda: replace(here, num_threads=here.num_threads + 1))
        killed_at(20)
    assert [one.levelname for one in caplog.records] == ["WARNING"]
    assert f"num_threads={here.num_threads + 1}" in caplog.text
    assert not run(tmp_path)[0].is_exact, "back where it began, but some steps were not made here"


def test_half_a_checkpoint_is_none(tmp_path: Path) -> None:
    run(tmp_path)
    (tmp_path / ".writing-1").mkdir()
    (tmp_path / ".writing-1" / "state.json").write_text("{")
    assert run(tmp_path)[0].progress.step == 30
    assert not list(tmp_path.glob(".writing-*"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000028", "step-00000030"]


def test_schedules() -> None:
    cosine = TrainSettings(num_steps=100, learning_rate=1.0, warmup_share=0.1, floor_share=0.1)
    rates = [learning_rate(cosine, step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert max(rates) == rates[10] == 1.0
    assert rates[-1] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    stable = replace(cosine, schedule="wsd", decay_share=0.2)
    rates = [learning_rate(stable, step) for step in range(100)]
    assert rates[10:80] == [1.0] * 70
    assert rates[-1] == pytest.approx(0.1)
    assert rates[89] == pytest.approx((1 + 0.1) / 2, abs=0.05)
    assert learning_rate(TrainSettings(num_steps=1, learning_rate=1.0), 0) > 0


def test_settings_are_checked_all_at_once() -> None:
    with pytest.raises(TrainingError, match=r"num_steps is 0.*learning_rate is -1"):
        TrainSettings(num_steps=0, learning_rate=-1)


TWO_PROCESSES = """
import torch
from pathlib import Path
from safetensors.torch import save_file
from finetune.train.ranks import joined
from tests.finetune.train.test_train_loop import data, run

torch.set_num_threads(1)
with joined() as ranks:
    assert ranks.world_size == 2
    _, logs, found = run(Path({directory!r}), lambda step: data(step, 2), ranks=ranks)
    if ranks.rank == 0:
        losses = torch.tensor([log.loss for log in logs], dtype=torch.float64)
        save_file({{"losses": losses, **found}}, {directory!r} + "/out.safetensors")
"""


@pytest.mark.slow
def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    _, logs, alone = run(tmp_path / "alone", lambda step: data(step, 2))
    root = str(Path(__file__).parents[3])
    (tmp_path / "two").mkdir()
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES.format(directory=str(tmp_path / "two")))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--master-port=0",
        "--standalone",
        str(script),
    ]
    subprocess.run(command, check=True, timeout=PATIENCE_SECONDS, env={**os.environ, "PYTHONPATH": root})
    found = load_file(tmp_path / "two" / "out.safetensors")
    assert torch.allclose(found["losses"], torch.tensor([log.loss for log in logs], dtype=torch.float64), rtol=1e-12)
    assert all(torch.allclose(alone[name], found[name], rtol=1e-10, atol=1e-12) for name in alone)
