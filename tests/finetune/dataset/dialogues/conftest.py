"""A tiny data set, made once."""

from pathlib import Path

import pytest

from finetune.dataset.dialogues.examples import Dialogue, read_dialogues
from finetune.dataset.dialogues.generate import FILES, Options, generate

TINY = Options(templates=120, seed=7, thinking=True)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    folder = tmp_path_factory.mktemp("dialogues") / "tiny"
    generate(folder, TINY)
    return folder


@pytest.fixture(scope="session")
def tiny_dialogues(tiny: Path) -> list[Dialogue]:
    return [one for name in FILES for one in read_dialogues(tiny / name)]
