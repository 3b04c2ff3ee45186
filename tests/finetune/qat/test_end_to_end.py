"""The documented commands at a tiny size: generate, report, train, export, serve, evaluate, and the model card.

What is asked of the model is nothing: so small, and trained for a minute, it answers at random. That a trained one does
its job is in test_shipped_model.py and its card.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from finetune.qat.metrics import Metrics
from server import cli
from tests.patience import PATIENCE_SECONDS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
FLAGS = (
    "--layers 1 --intermediate-size 256 --vocab-size 600 --max-steps 24 --tokens-per-step 2048 --threads 1"
    " --micro-batch-tokens 2048 --evaluate-every 12 --max-held-out 20 --log-every 4"
)


@contextmanager
def serving(model: str, folder: Path) -> Iterator[str]:
    """`sterna serve MODEL`; its URL."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("STERNA_")}
    environment |= {"PYTHONPATH": str(ROOT), "STERNA_DATA_DIR": str(folder / "data")}
    command = [sys.executable, "-m", "server.cli", "serve", model, "--port", "0", "--threads", "1"]
    with (
        (folder / "errors").open("w") as errors,
        subprocess.Popen(
            [*command, "--kv-memory", "64MiB"],
            cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True,
        ) as process,
    ):  # fmt: skip
        try:
            assert process.stdout is not None
            found = re.search(r"Sterna serves (\S+) on (\S+)", process.stdout.readline())
            assert found is not None, (folder / "errors").read_text()
            assert found[1] == Path(model).name
            yield found[2]
        finally:
            process.terminate()
            process.wait(PATIENCE_SECONDS)


def said(capsys: pytest.CaptureFixture[str], line: str) -> str:
    """What `sterna LINE` prints; it has to end well."""
    assert cli.main(line.split()) == 0
    return capsys.readouterr().out


def test_generate_report_train_export_evaluate_serve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    said(capsys, "dataset generate dialogues --templates 100")
    assert "schema valid" in said(capsys, "dataset report dialogues")
    facts = json.loads(said(capsys, f"train dialogues nano {FLAGS} --json"))
    assert (facts["num_steps"], facts["num_parameters"]) == (24, 547_584)
    lines = Metrics(tmp_path / "nano" / "metrics.jsonl", lambda text: None).lines()
    assert lines[-1].loss < lines[0].loss - 1
    large = facts["model_bytes"]
    facts = json.loads(said(capsys, f"train dialogues nano {FLAGS} --type tq1_0 --json"))  # the file anew, nothing else
    assert facts["model_bytes"] < large
    with serving("nano", tmp_path) as url:
        text = said(capsys, f"dataset score dialogues --limit 12 --url {url} --json")
    (tmp_path / "scores.json").write_text(text)
    said(capsys, "dataset card dialogues nano shipped/tiny-tools --scores scores.json")
    check_card(tmp_path / "shipped" / "tiny-tools", json.loads(text), capsys)
    check_card_of_two_runs(capsys)
    with (
        serving("shipped/tiny-tools", tmp_path) as url,
        OpenAI(base_url=f"{url}/v1", api_key="unused") as client,
    ):
        tool: Any = {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}
        answer = client.chat.completions.create(
            model="tiny-tools",
            messages=[{"role": "user", "content": "What time is it?"}],
            tools=[tool],
            tool_choice="required",
            max_tokens=60,
        )
    assert answer.usage is not None
    assert 0 < answer.usage.completion_tokens <= 60


def check_card_of_two_runs(capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, f"train dialogues later {FLAGS} --max-steps 4 --weights-from nano --answer-weight 0.5 --json")
    assert cli.main(["dataset", "card", "dialogues", "later", "x", "--scores", "scores.json"]) == 1
    assert "score this one" in capsys.readouterr().err
    scores, facts = json.loads(Path("scores.json").read_text()), json.loads(said(capsys, "models inspect later --json"))
    Path("later.json").write_text(json.dumps(scores | {"system_fingerprints": [facts["system_fingerprint"]]}))
    said(capsys, "dataset card dialogues later two-runs --scores later.json")
    card = Path("two-runs/README.md").read_text()
    assert "| training | 28 steps, " in card
    first, second = (one for one in card.splitlines() if one.startswith("$ sterna train"))
    assert first.startswith("$ sterna train ./dialogues ./nano-1 ")
    assert "--max-steps 24" in first
    assert second.startswith("$ sterna train ./dialogues ./nano ")
    assert "--weights-from ./nano-1" in second
    assert "--answer-weight 0.5" in second
    assert "--max-steps 4" in second
    assert "run 2" in Path("two-runs/curve.svg").read_text()


def check_card(folder: Path, scores: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    card = (folder / "README.md").read_text()
    assert card.startswith("# tiny-tools\n")
    assert hashlib.sha256((folder / "model.gguf").read_bytes()).hexdigest() in card
    assert scores["dataset"] in card
    assert "--layers 1" in card
    assert "--max-steps 24" in card
    assert "--threads 1 --type tq1_0" in card
    assert f"On {scores['num_dialogues']} of " in card
    assert f"$ sterna dataset score ./dialogues --limit {scores['limit']} --json" in card
    share = scores["scores"]["nearest"]["families"]["right_tool"]["share"]
    row = next(line for line in card.splitlines() if line.startswith("| seen tools, unseen families | right tool"))
    assert row.endswith(f"| {share:.1%} |")
    assert (folder / "curve.svg").read_text().startswith("<svg")
    other = scores | {"dataset": "sha256:other"}
    Path("other.json").write_text(json.dumps(other))
    assert cli.main(["dataset", "card", "dialogues", "nano", "x", "--scores", "other.json"]) == 1
    assert "other.json is of the data set sha256:other" in capsys.readouterr().err
    shutil.copytree("dialogues", "changed")
    with Path("changed/train.jsonl").open("ab") as file:
        file.write(b"\n")
    assert cli.main(["dataset", "card", "changed", "nano", "x", "--scores", "scores.json"]) == 1
    assert "was trained on other data" in capsys.readouterr().err
    assert cli.main(["dataset", "card", "dialogues", "dialogues", "x", "--scores", "scores.json"]) == 1
    assert "is no finished run" in capsys.readouterr().err
    assert not Path("x").exists()
