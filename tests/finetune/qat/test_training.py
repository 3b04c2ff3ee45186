"""Runs of a model that trains quantized: resumed bit for bit, cut anyhow, in 16 bits, on two processes, refused."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from finetune.dataset.packing import pack
from finetune.errors import DivergedError, TrainingError
from finetune.packed import Example
from finetune.qat.model import Objective, QatModel
from finetune.qat.trainer import Stepped, Trainer
from finetune.train import scaling
from finetune.train.checkpoint import Progress
from finetune.train.settings import TrainSettings
from tests.finetune.model.builders import plain
from tests.finetune.qat.learning import alphabet, alphabet_steps, copied, run, tiny_shape
from tests.patience import PATIENCE_SECONDS


class KilledError(Exception):
    pass


def progressive(step: int) -> list[Stepped]:
    """Ternary little by little over the first eight steps."""
    return [replace(one, share=min(1.0, step / 8)) for one in alphabet_steps(step)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_killed_run_goes_on_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    options: dict[str, Any] = {"batches": progressive, "trainer": {"objective": Objective(entropy_weight=0.05)}}
    shape = tiny_shape(residual_streams=2)
    _, undisturbed, expected = run(tmp_path / "one", QatModel(shape, dtype=dtype), **options)
    calls = 0

    def kill() -> None:
        nonlocal calls
        calls += 1
        if calls > 14:  # in step 8
            raise KilledError

    with pytest.raises(KilledError):
        run(tmp_path / "two", QatModel(shape, dtype=dtype), pause=kill, **options)
    result, resumed, found = run(tmp_path / "two", QatModel(shape, dtype=dtype, seed=1), **options)
    assert result.is_exact
    assert resumed[0].step == 6
    assert [log.loss for log in resumed] == [log.loss for log in undisturbed[5:]]
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_how_a_step_is_cut_does_not_matter(tmp_path: Path) -> None:
    """Four sequences in one micro-batch, or each in its own."""
    shape = tiny_shape()
    _, whole, one = run(tmp_path / "1", QatModel(shape, dtype=torch.float64), num_steps=3, batches=together)
    _, again, two = run(tmp_path / "2", QatModel(shape, dtype=torch.float64), num_steps=3, batches=apart)
    assert all(math.isclose(a.loss, b.loss, rel_tol=1e-9) for a, b in zip(whole, again, strict=True))
    assert all(torch.allclose(one[name], two[name], rtol=1e-6, atol=1e-9) for name in one)


def four(step: int, max_tokens: int) -> list[Stepped]:
    examples = []
    for first in range(4):
        ids = np.array(alphabet(step + 5 * first), np.int32)
        examples.append(Example(str(first), ids, np.r_[0, np.ones(len(ids) - 1)].astype(np.float32), str(first)))
    return [Stepped(one) for one in pack(examples, max_tokens, seed=0, epoch=0)]


def together(step: int) -> list[Stepped]:
    (one,) = four(step, 100)
    return [one]


def apart(step: int) -> list[Stepped]:
    found = four(step, 24)
    assert len(found) == 4
    return found


def test_float16_with_a_loss_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "FIRST_SCALE", 2.0**40)  # overflows: the first steps are skipped, the scale falls
    result, logs, _ = run(tmp_path, QatModel(tiny_shape(), dtype=torch.float16), num_steps=45)
    skipped = [log.step for log in logs if not math.isfinite(log.grad_norm)]
    assert skipped
    assert skipped == list(range(1, len(skipped) + 1))
    assert result.progress.loss_scale == 2.0 ** (40 - len(skipped))
    assert logs[-1].loss < logs[0].loss - 1


def test_the_scale_of_good_steps_doubles() -> None:
    progress = Progress(step=1, loss_scale=4.0, num_good=scaling.GROWTH_STEPS - 1)
    assert scaling.scaled_on(progress, is_finite=True) == replace(progress, loss_scale=8.0, num_good=0)
    with pytest.raises(DivergedError, match="bfloat16"):
        scaling.scaled_on(replace(progress, loss_scale=1.0), is_finite=False)


def test_it_learns_from_a_teacher(tmp_path: Path) -> None:
    """The targets are noise; the teacher knows the alphabet."""
    teacher = QatModel(tiny_shape())
    run(tmp_path / "teacher", teacher, num_steps=25)

    def wrong(step: int) -> list[Stepped]:
        packed = plain(alphabet(step))
        return [Stepped(replace(packed, loss_targets=(packed.loss_targets * 7 + step) % 300))]

    student = QatModel(tiny_shape(), seed=2)
    trainer = {"objective": Objective(distillation=1.0), "teacher": teacher}
    run(tmp_path / "student", student, num_steps=40, batches=wrong, trainer=trainer)
    answers = student.logits(alphabet(3)).argmax(1).tolist()
    assert sum(a == b for a, b in zip(answers, alphabet(4), strict=True)) > 20


def test_vectors_do_not_decay(tmp_path: Path) -> None:
    settings = TrainSettings(num_steps=1, learning_rate=1e-3, weight_decay=0.5)
    model = QatModel(tiny_shape())
    norm = "blk.0.attn_norm.weight"
    run(tmp_path, model, settings=settings, batches=lambda step: [Stepped(plain([1, 2]))])
    assert torch.all((model.parameters()[norm] - 1).abs() < 1.1e-3)  # a step of AdamW, and no decay of 5e-4 besides


def test_entropy_and_held_out_measures() -> None:
    trainer = Trainer(QatModel(tiny_shape(), dtype=torch.float64))
    batches = alphabet_steps(0)
    trainer.backward(batches[0], 1.0)
    entropy = trainer.take_entropy()
    assert entropy == pytest.approx(math.log(384), abs=0.6)
    assert trainer.take_entropy() == 0.0
    held = trainer.measure([one.packed for one in batches])
    assert held.loss == pytest.approx(math.log(384), abs=0.6)
    assert 0 <= held.accuracy < 0.2


def test_what_cannot_be_resumed(tmp_path: Path) -> None:
    run(tmp_path, QatModel(tiny_shape()), num_steps=2)
    with pytest.raises(TrainingError, match="shape differ"):
        run(tmp_path, QatModel(tiny_shape(num_layers=1)), num_steps=2)
    with pytest.raises(TrainingError, match="settings differ"):
        run(tmp_path, QatModel(tiny_shape()), num_steps=3)
    newest = tmp_path / "step-00000002"
    whole = (newest / "parameters.safetensors").read_bytes()
    (newest / "parameters.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TrainingError, match=r"step-00000002/parameters\.safetensors cannot be read"):
        run(tmp_path, QatModel(tiny_shape()), num_steps=2)
    (newest / "state.json").write_text('{"identity"')
    with pytest.raises(TrainingError, match=r"state\.json cannot be read"):
        run(tmp_path, QatModel(tiny_shape()), num_steps=2)


def test_weights_that_are_not_finite_end_a_run(tmp_path: Path) -> None:
    model = copied(QatModel(tiny_shape()))
    with torch.no_grad():
        model.parameters()["token_embd.weight"][65] = float("inf")
    with pytest.raises(DivergedError, match="loss in step 1 is nan"):
        run(tmp_path, model)


TWO_PROCESSES = """
import json, sys
import torch
from pathlib import Path
from safetensors.torch import save_file
from finetune.qat.model import QatModel
from finetune.train.ranks import joined
from tests.finetune.qat.learning import run, tiny_shape
from tests.finetune.qat.test_training import apart

torch.set_num_threads(1)
folder = Path(sys.argv[1])
with joined() as ranks:
    assert ranks.world_size == 2
    model = QatModel(tiny_shape(), dtype=torch.float64)
    _, logs, found = run(folder, model, num_steps=4, batches=apart, ranks=ranks)
    if ranks.rank == 0:
        save_file(found, folder / "out.safetensors")
        (folder / "out.json").write_text(json.dumps([log.loss for log in logs]))
"""


@pytest.mark.slow
def test_two_processes_equal_one_with_double_accumulation(tmp_path: Path) -> None:
    model = QatModel(tiny_shape(), dtype=torch.float64)
    _, logs, alone = run(tmp_path / "alone", model, num_steps=4, batches=apart)
    folder, script = tmp_path / "two", tmp_path / "two.py"
    folder.mkdir()
    script.write_text(TWO_PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--standalone"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    subprocess.run([*command, str(script), str(folder)], check=True, timeout=PATIENCE_SECONDS, env=environment)
    found: dict[str, Tensor] = load_file(folder / "out.safetensors")
    assert json.loads((folder / "out.json").read_text()) == pytest.approx([log.loss for log in logs], rel=1e-9)
    assert all(torch.allclose(alone[name], found[name], rtol=1e-6, atol=1e-9) for name in alone)
    moments, gathered = (
        load_file(one / "step-00000004" / "optimizer.safetensors") for one in (tmp_path / "alone", folder)
    )
    assert moments.keys() == gathered.keys()
    assert all(torch.allclose(moments[name], gathered[name], rtol=1e-6, atol=1e-9) for name in moments)
