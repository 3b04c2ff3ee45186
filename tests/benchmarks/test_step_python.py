"""The benchmark of a step's Python drives the engine's parts itself, so it breaks when they change."""

from pathlib import Path

from benchmarks.step_python import measure
from tests.tiny_models import write_tiny_gguf


def test_every_part_of_a_step_takes_its_time(tmp_path: Path) -> None:
    found = measure(write_tiny_gguf(tmp_path / "tiny.gguf", context_length=512), batch=2, steps=5, threads=1)
    parts = [found[name] for name in ("schedule", "arrays", "tokens")]
    assert min(parts) > 0
    assert max(*parts, found["best"]) <= found["sum"]
