"""A run's folder: it goes on with the same run alone, and says which of its files is damaged."""

import shutil
from pathlib import Path
from typing import Any

import pytest

import finetune.qat.curriculum as curriculum
from finetune.errors import DivergedError, TrainingError
from finetune.qat.curriculum import MAX_ATTEMPTS, Stage
from finetune.qat.folder import METRICS, MODEL, RUN
from finetune.qat.phase import Done, Phase, Tools
from finetune.qat.run import run
from tests.finetune.qat.tiny_runs import quiet, tiny, write_birds
from tests.tiny_models import write_tiny_gguf

STAGES = (Stage("foundation", 0.5, 0.5, 0.0, 2.0, 0.0), Stage("mastery", 1.0, 0.5, 0.0, 0.0, 100.0))


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(curriculum.run_curriculum, "__defaults__", (STAGES,))
    return write_birds(tmp_path / "birds.jsonl")


@pytest.mark.parametrize(("was_curriculum", "is_curriculum"), [(True, True), (False, True), (True, False)])
def test_another_run_is_refused_and_nothing_changes(
    was_curriculum: bool, is_curriculum: bool, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run(data, out, tiny(curriculum=was_curriculum), quiet())
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    changed = "curriculum, " if was_curriculum != is_curriculum else ""
    with pytest.raises(TrainingError, match=rf"out holds another run \({changed}learning_rate, seed differ\)"):
        run(data, out, tiny(curriculum=is_curriculum, learning_rate=0.5, seed=7), quiet())
    other = write_birds(tmp_path / "other.jsonl", 40)
    with pytest.raises(TrainingError, match=r"another run \(.*data differ\)"):
        run(other, out, tiny(curriculum=is_curriculum), quiet())
    tokens = {path for path in out.glob("tokens-*") if path not in before}
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path not in tokens} == before


def test_another_base_or_teacher_under_the_same_name_is_refused(data: Path, tmp_path: Path) -> None:
    settings = tiny(base=tmp_path / "base.gguf", teacher=tmp_path / "base.gguf", group=64, max_steps=1)
    write_tiny_gguf(tmp_path / "base.gguf", hidden=64, ffn=128, heads=4, kv_heads=2)
    run(data, tmp_path / "out", settings, quiet())
    write_tiny_gguf(tmp_path / "base.gguf", hidden=64, ffn=128, heads=4, kv_heads=2, seed=1)
    with pytest.raises(TrainingError, match=r"another run \(base_digest, teacher_digest differ\)"):
        run(data, tmp_path / "out", settings, quiet())


def test_a_log_without_checkpoints_is_of_no_run(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(data, out, tiny(), quiet())
    before = (out / METRICS).read_text().splitlines()
    shutil.rmtree(out / "checkpoints")
    run(data, out, tiny(), quiet())
    assert len((out / METRICS).read_text().splitlines()) == len(before)


def test_the_first_run_may_be_gone_once_the_second_goes_on(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path / "first", tiny(), quiet())
    settings = tiny(weights_from=tmp_path / "first", seed=1)
    run(data, tmp_path / "second", settings, quiet())
    before = (tmp_path / "second" / MODEL).read_bytes()
    shutil.rmtree(tmp_path / "first")
    run(data, tmp_path / "second", settings, quiet())
    assert (tmp_path / "second" / MODEL).read_bytes() == before


def test_a_stage_that_always_diverges_ends(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = []

    def run_phase(phase: Phase, tools: Tools) -> Done:
        rates.append(phase.rate_factor)
        raise DivergedError("the loss is nan")

    monkeypatch.setattr(curriculum, "run_phase", run_phase)
    for _ in range(2):  # the second call finds all attempts made
        with pytest.raises(DivergedError, match="foundation diverged 3 times, at last: the loss is nan; lower"):
            run(data, tmp_path / "out", tiny(curriculum=True), quiet())
        assert rates == [1.0, 0.5, 0.25]
    assert MAX_ATTEMPTS == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("checkpoints/mastery/final.safetensors", b"\x10", "final.safetensors cannot be read .*remove its directory"),
        ("checkpoints/mastery/stages.json", b'{"diverged"', "stages.json cannot be read .*remove its directory"),
        ("checkpoints/mastery/stages.json", b"[]", "stages.json cannot be read .*remove its directory"),
        (RUN, b"{", "run.json cannot be read .*remove its folder"),
        (METRICS, b'{"step": 1}\n', r"metrics\.jsonl, line 1: not a line of a run's log"),
    ],
)
def test_a_damaged_file_is_named(name: str, content: bytes, message: str, data: Path, tmp_path: Path) -> None:
    run(data, tmp_path / "out", tiny(curriculum=True), quiet())
    (tmp_path / "out" / name).write_bytes(content)
    with pytest.raises(TrainingError, match=message):
        run(data, tmp_path / "out", tiny(curriculum=True), quiet())


def test_a_file_where_the_folder_should_be(data: Path, tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(TrainingError, match="out cannot be the folder of a run: File exists"):
        run(data, tmp_path / "out", tiny(), quiet())


def test_processes_share_the_cores(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("finetune.qat.run.physical_cores", lambda: 6)
    monkeypatch.setattr("torch.set_num_threads", asked.append)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    run(data, tmp_path / "out", tiny(threads=None, max_steps=1), quiet())
    assert asked == [1]
