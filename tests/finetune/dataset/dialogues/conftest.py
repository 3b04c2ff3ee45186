"""A tiny data set, made once, and the report of a changed copy."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.dataset.dialogues.examples import Dialogue, read_dialogues
from finetune.dataset.dialogues.generate import FILES, Options, generate
from finetune.dataset.dialogues.quality import report

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


def changed_copy(tiny: Path, tmp_path: Path, name: str, change: Callable[[list[dict[str, Any]]], Any]) -> Path:
    """Of the set, with the rows of one file changed."""
    folder = tmp_path / "changed"
    shutil.copytree(tiny, folder)
    rows = [json.loads(line) for line in (folder / name).read_text("utf-8").splitlines()]
    change(rows)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / name).write_text(text, "utf-8")
    return folder


def changed_report(
    tiny: Path, tmp_path: Path, name: str, change: Callable[[list[dict[str, Any]]], Any]
) -> dict[str, Any]:
    return report(changed_copy(tiny, tmp_path, name, change)).body()
