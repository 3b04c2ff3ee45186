"""Tiny products are fastest on one thread, most of all beside other test runs; and a tiny model as a GGUF file."""

from pathlib import Path

import pytest

from tests.tiny_models import write_tiny_gguf

torch = pytest.importorskip("torch", reason="test extra")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf")
