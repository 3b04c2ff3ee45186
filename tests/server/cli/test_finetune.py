"""`sterna finetune`: its verbs, their faults, and what is said where the extra is missing."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from finetune.gate.settings import GateSettings
from finetune.rounds.lease import take
from finetune.rounds.round import Result
from finetune.rounds.store import RoundStore
from server import cli
from server.storage.database import open_database
from tests.finetune.rounds.decisions import a_decision
from tests.tiny_models import write_tiny_gguf


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STERNA_DATA_DIR", str(tmp_path))


@pytest.fixture
def _two_rounds(tmp_path: Path) -> None:
    database = open_database(f"sqlite:///{tmp_path}/sterna.db")
    store, lease = RoundStore(database), take(database, "tools")
    settings: dict[str, Any] = {"cause": "200 new labelled traces", "base_digest": "sha256:b", "settings": {"rank": 4}}
    round = store.begin(lease, **settings)
    facts = {"kept": {"train": 90, "held_out": 120}, "dropped": {"train": {"unlabelled": 7}}}
    round = store.advance(lease, round, facts, snapshot="sha256:s")
    trained = {"num_steps": 9, "num_tokens": 9000, "first_loss": 2.0, "last_loss": 0.25, "is_exact": True}
    round = store.advance(lease, round, trained)
    decision = json.loads(a_decision(GateSettings()).to_json())
    store.finish(lease, store.note(lease, round, {}, version=1, decision=decision), Result.CANARY, "it calls better")
    store.finish(lease, store.begin(lease, parent=1, **settings), Result.NOTHING_TO_LEARN, "nothing to learn")
    database.close()


def run(*arguments: str) -> int:
    return cli.main(["finetune", *arguments])


def fault(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = run(*arguments)
    captured = capsys.readouterr()
    assert captured.out == ""
    return code, captured.err


@pytest.mark.parametrize("verb", ["", "run", "rounds", "report", "plan"])
def test_help_has_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = f"finetune {verb}".rstrip()
    with pytest.raises(SystemExit) as caught:
        cli.main([*command.split(), "--help"])
    assert caught.value.code == 0
    output = capsys.readouterr().out
    assert output.startswith(f"usage: sterna {command} ")
    assert f"example:\n  sterna {command}" in output


@pytest.mark.usefixtures("_two_rounds")
def test_rounds(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("rounds") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["ROUND", "RESULT", "VERSION", "BEGUN", "CAUSE", "REASON"]
    assert lines[1].startswith("tools-r2  nothing to learn")
    assert lines[2].startswith("tools-r1  canary            tools@1  ")
    assert run("rounds", "--json", "--adapter", "tools", "--limit", "1") == 0
    (one,) = json.loads(capsys.readouterr().out)
    assert (one["id"], one["parent"], one["version"]) == ("tools-r2", "tools@1", None)
    assert run("rounds", "--adapter", "others") == 0
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("_two_rounds")
def test_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("report", "tools-r1") == 0
    page = capsys.readouterr().out
    assert page.startswith("# Round tools-r1: canary\n\nit calls better\n")
    assert "- examples: 90 train, 120 held_out\n- dropped (train): 7 unlabelled\n" in page
    assert "- training: 9 steps, 9000 tokens, loss 2.0000 at first, 0.2500 at last" in page
    assert "## tools@1 against base (the base: no version is live): promote" in page
    assert run("report", "tools-r1", "--json") == 0
    body = json.loads(capsys.readouterr().out)
    assert body["decision"]["primary"]["difference"] == 0.5
    assert fault(capsys, "report", "tools-r9") == (1, "sterna: there is no round tools-r9\n")
    assert fault(capsys, "report", "tools@1")[0] == 2


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["go"], "no verb 'go'; there are run, rounds, report, plan"),
        (["run"], "the following arguments are required: ADAPTER"),
        (["run", "tools", "--from", "others@1"], "--from: 'others@1' is no version of tools"),
        (["run", "tools", "--rnak", "4"], "--rnak: no such flag; did you mean --rank?"),
        (["run", "tools", "--rank", "0"], "--rank: '0' is not accepted"),
        (["--webhook-urls", "https://x"], "webhook_urls needs webhook_secret"),
        (["--webhook-urls", "http://[::1/hook", "--webhook-secret", "s"], "it is no URL"),
    ],
)
def test_a_wrong_line_is_told(arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = fault(capsys, *arguments)
    assert code == 2
    assert reason in said


def test_all_problems_of_all_sources_at_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("sterna.toml").write_text("porrt = 1\n[finetune]\nranc = 4\n")
    monkeypatch.setenv("STERNA_FINETUNE_EPOCHS", "many")
    code, said = fault(capsys, "run", "tools", "--learning-rate", "0", "--qqq")
    assert code == 2
    assert set(said.splitlines()) == {
        "sterna: --qqq: no such flag",
        "sterna: --learning-rate: '0' is not accepted: expected greater than 0",
        "sterna: STERNA_FINETUNE_EPOCHS: 'many' is not accepted: expected a valid number, unable to parse string as a "
        "number",
        "sterna: sterna.toml: finetune.ranc: no such setting; did you mean sterna.toml: finetune.rank?",
        "sterna: sterna.toml: porrt: no such setting; did you mean sterna.toml: port?",
    }


def test_the_sidecars_settings_are_none_of_the_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune.config import load_finetune_settings
    from server.config import load_settings

    Path("sterna.toml").write_text("port = 1\n[finetune]\nport = 2\nadapters = ['a', 'b']\n")
    environ = {"STERNA_FINETUNE_RANK": "4", "STERNA_THREADS": "2"}
    settings, own = load_settings(environ=environ), load_finetune_settings({"seed": "7"}, environ=environ)
    assert (settings.port, settings.threads) == (1, 2)
    assert (own.port, own.rank, own.seed, own.adapters) == (2, 4, 7, ("a", "b"))
    assert load_finetune_settings(environ={"STERNA_FINETUNE_ADAPTERS": "a"}).adapters == ("a",)


def test_a_round_keeps_its_own_settings() -> None:
    from finetune.config import FinetuneSettings

    kept = FinetuneSettings(rank=4, seed=3, port=1).of_round()
    later = FinetuneSettings(rank=8, port=2).with_round(kept)
    assert (later.rank, later.seed, later.port) == (4, 3, 2)


@pytest.mark.parametrize("arguments", [["finetune"], ["finetune", "run", "tools"], ["up"]])
def test_without_the_extra_one_line_names_the_command(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else find(name))
    assert cli.main(arguments) == 1
    assert capsys.readouterr().err == "sterna: training needs torch: pip install 'sterna[finetune]'\n"


def test_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune.sidecar import plan

    # The peak of this process counts as the command's own, and after some gigabytes of other tests nothing would fit.
    monkeypatch.setattr(plan, "peak_bytes", lambda: 300 << 20)
    model = str(write_tiny_gguf(tmp_path / "tiny.gguf"))
    assert run("plan", "--model", model, "--memory", "2GiB", "--json") == 0
    body = json.loads(capsys.readouterr().out)
    assert body["budget_bytes"] == 2 << 30
    totals = [row["total"] for row in body["plans"]]
    assert totals == sorted(totals)
    assert [row["num_tokens"] for row in body["plans"]] == [1024, 2048, 4096, 32768, 524288]
    plain, checkpointed = body["longest"]
    assert [plain["checkpointing"], checkpointed["checkpointing"]] == [False, True]
    assert min(plain["num_tokens"], checkpointed["num_tokens"]) > 1024  # with two layers recomputing one saves nothing
    assert run("plan", "--model", model, "--memory", "2GiB", "--checkpointing", "--json") == 0
    recomputed = json.loads(capsys.readouterr().out)
    assert recomputed["longest"] == body["longest"]
    assert [row["activations"] for row in recomputed["plans"]] != [row["activations"] for row in body["plans"]]
    assert run("--plan", "--model", model) == 0
    output = capsys.readouterr().out
    assert output.startswith("TOKENS  WEIGHTS  ADAPTER")
    assert "recomputing each layer: " in output
    assert (
        fault(capsys, "plan", "--memory", "much")[1] == "sterna: --memory: 'much' is no size; expected one like 8GiB\n"
    )
