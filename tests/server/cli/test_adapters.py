"""`sterna adapters` against a live application: every verb, for people and as JSON, and every fault in one line."""

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quant.gguf_reader import read_header
from server import cli
from tests.server.adapters.make import adapter_dir
from tests.server.cli.live_app import LiveApp, live_app

VERBS = ["list", "show", "history", "create", "import", "export", "diff", "shadow", "canary", "share", "promote",
         "reject", "rollback", "pin", "unpin", "delete"]  # fmt: skip
NO_NAME = "is no adapter name: 1 to 64 of a-z, 0-9, '_', '.' and '-', the first a letter or digit"
NO_ZIP = "the zip file is damaged or of a kind that is not read: File is not a zip file"


@pytest.fixture(scope="module")
def app() -> Iterator[LiveApp]:
    with live_app() as app:
        yield app


class Terminal:
    """Runs commands as a user of one server would, in an empty folder."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, line: str) -> str:
        """What a command that works prints."""
        code = cli.main(["adapters", *line.split()])
        output = self._capsys.readouterr()
        assert (code, output.err) == (0, "")
        return output.out

    def json(self, line: str) -> Any:
        output = self(f"{line} --json")
        assert output.count("\n") == 1
        return json.loads(output)

    def fault(self, line: str, code: int = 1) -> str:
        """The one line of a command that fails."""
        assert cli.main(["adapters", *line.split()]) == code
        output = self._capsys.readouterr()
        assert output.err.startswith("sterna: ")
        assert output.err.count("\n") == 1
        return output.err.removeprefix("sterna: ").rstrip("\n")


@pytest.fixture
def sterna(
    app: LiveApp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Terminal:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STERNA_URL", app.url)
    monkeypatch.delenv("STERNA_API_KEY", raising=False)
    return Terminal(capsys)


@pytest.fixture
def two(sterna: Terminal, request: pytest.FixtureRequest) -> str:
    """The name of an adapter with two versions, another one for each test."""
    name = request.node.name.removeprefix("test_").split("[")[0][:60]
    for content in (1, 2):
        sterna(f"import {name} {adapter_dir(Path(f'peft-{content}'), content)}")
    return str(name)


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_an_example_that_the_verb_accepts(
    verb: str, sterna: Terminal, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["adapters", verb, "--help"])
    assert caught.value.code == 0
    output = capsys.readouterr().out
    assert output.startswith(f"usage: sterna adapters {verb} ")
    example = output.split("example:\n")[1].strip()
    assert example.startswith(f"sterna adapters {verb}")
    if verb not in ("list", "create"):  # it is understood, and then there is nothing that it names
        assert sterna.fault(example.split(" --reason")[0].removeprefix("sterna adapters ")).startswith(
            ("there is no adapter 'tools'", "./checkpoint-100", "checkpoint-100")
        )


def test_from_import_to_delete(sterna: Terminal) -> None:
    folder = adapter_dir(Path("peft-1"))
    (folder / "README.md").write_text("PEFT writes this")
    assert sterna(f"import life {folder}").startswith("life@1: imported, rank 2, ")
    assert sterna(f"import life {folder}").startswith("life@1: is this content already, candidate, rank 2, ")
    assert sterna(f"import life {adapter_dir(Path('peft-2'), 2)}").startswith("life@2: imported")

    assert sterna("shadow life@1 --share 0.5") == "life: the base answers, shadow life@1 (50 %) (change 3)\n"
    assert sterna("canary life@1 --share 0.1") == "life: the base answers, canary life@1 (10 %) (change 4)\n"
    assert sterna("share life canary 0.25") == "life: the base answers, canary life@1 (25 %) (change 5)\n"
    assert sterna("promote life@1") == "life: life@1 answers (change 6)\n"
    promoted = sterna("promote life@2 --override --hold-back-share 0.05 --reason better")
    assert promoted == "life: life@2 answers, held back on life@1 (5 %) (change 8)\n"
    assert sterna("rollback life") == "life: life@1 answers (change 10)\n"
    assert sterna("rollback life --to 2") == "life: life@2 answers (change 12)\n"
    assert sterna("pin life@1") == "life@1: pinned\n"
    assert sterna("unpin life@1") == "life@1: not pinned\n"
    assert sterna("rollback life") == "life: life@1 answers (change 16)\n"
    assert sterna("delete life@2") == "life@2: deleted\n"

    listed = sterna("list").splitlines()
    assert listed[0].split("  ")[0] == "name"
    assert [line.split() for line in listed if line.startswith("life ")] == [
        ["life", "life@1", "-", "-", "-", "1", "17"]
    ]
    shown = sterna("show life").splitlines()
    assert shown[0] == "life: life@1 answers (change 17)"
    assert [line.split()[:3] for line in shown[3:]] == [["life@2", "retired", "2"], ["life@1", "live", "2"]]
    assert "deleted" in shown[3]
    assert shown[4].endswith("  peft-1")
    history = sterna("history life --limit 5").splitlines()
    assert [line.split()[0] for line in history] == ["change", "17", "16", "15", "14", "13"]
    assert "sterna adapters delete" in history[1]
    assert "loopback" in history[1]


def test_a_name_before_its_first_version(sterna: Terminal) -> None:
    assert sterna("create empty") == "empty: created\n"
    assert sterna("create empty") == "empty: is there already\n"
    assert sterna.json("create empty --reason again")["is_new"] is False
    assert sterna("show empty").startswith("empty: the base answers (change ")
    assert sterna("history empty").splitlines()[1].split()[3:6] == ["empty", "create", "-"]
    assert sterna.fault("create Empty").startswith("'Empty' is no adapter name: ")
    assert sterna.fault("create tiny") == "'tiny' is the base model's name; an adapter needs another"
    assert sterna.fault("rollback empty") == "empty has no live version to roll back"
    assert sterna.fault("promote empty@1").startswith("there is no version empty@1")
    sterna(f"import empty {adapter_dir(Path('peft'))}")
    assert sterna.json("show empty")["num_versions"] == 1


def test_json_is_what_the_server_says(sterna: Terminal, two: str) -> None:
    assert sterna.json(f"show {two}@2")["version"] == f"{two}@2"
    assert sterna.json(f"canary {two}@1 --share 0.5")["canary_share"] == 0.5
    assert sterna.json(f"share {two} canary 0.75")["canary_share"] == 0.75
    assert sterna.json(f"promote {two}@1 --hold-back-share 0.5")["hold_back_share"] == 0.5
    assert sterna.json(f"shadow {two}@2")["shadow"] == f"{two}@2"
    assert sterna.json(f"reject {two}@2")["shadow"] is None
    assert sterna.json(f"rollback {two}")["live"] is None
    assert sterna.json(f"pin {two}@1")["is_pinned"] is True
    assert sterna.json(f"unpin {two}@1")["is_pinned"] is False
    assert sterna.json(f"delete {two}@1")["is_deleted"] is True
    assert sterna.json(f"show {two}")["num_versions"] == 1
    assert [row["name"] for row in sterna.json("list") if row["name"] == two] == [two]
    assert [row["action"] for row in sterna.json(f"history {two}")][:2] == ["delete", "unpin"]
    exported = sterna.json(f"export {two}@2 there.zip")
    assert (exported["version"], exported["path"]) == (f"{two}@2", "there.zip")
    again = sterna.json(f"import {two} there.zip")
    assert (again["version"], again["is_new"]) == (f"{two}@2", False)


def test_show_a_version(sterna: Terminal, two: str) -> None:
    sterna(f"import other-{two} peft-1 --parent {two}@1 --reason because")
    facts = {tuple(line.split(maxsplit=1)) for line in sterna(f"show other-{two}@1").splitlines()}
    assert {("version", f"other-{two}@1"), ("state", "candidate"), ("parent", f"{two}@1")} <= facts


def test_exports_come_back_as_the_same(sterna: Terminal, two: str) -> None:
    assert sterna(f"export {two}@1") == f"{two}@1: exported to {two}@1.zip\n"
    with zipfile.ZipFile(f"{two}@1.zip") as archive:
        names = set(archive.namelist())
    assert sterna(f"export {two}@1 folder") == f"{two}@1: exported to folder\n"
    assert set(os.listdir("folder")) == names
    weights = "adapter_model.safetensors"
    assert Path("folder", weights).read_bytes() == Path("peft-1", weights).read_bytes()
    for source in (f"{two}@1.zip", "folder"):
        assert sterna.json(f"import {two} {source}")["is_new"] is False
    assert {path.name for path in Path().iterdir()} == {"peft-1", "peft-2", "folder", f"{two}@1.zip"}
    assert sterna.fault(f"export {two}@1") == f"{two}@1.zip exists already"
    assert sterna.fault(f"export {two}@1 folder") == "folder exists already"
    assert sterna.fault(f"export {two}@1 no/such/folder") == "no/such/folder: No such file or directory"


def test_a_failed_export_leaves_nothing(sterna: Terminal, two: str) -> None:
    sterna(f"reject {two}@1")
    sterna(f"delete {two}@1")
    for target in ("x.zip", "x"):
        assert sterna.fault(f"export {two}@1 {target}") == f"{two}@1 was deleted; import it again"
    assert {path.name for path in Path().iterdir()} == {"peft-1", "peft-2"}


def test_exports_for_llama_cpp(sterna: Terminal, two: str) -> None:
    assert sterna(f"export {two}@1 --gguf one.gguf") == f"{two}@1: exported to one.gguf\n"
    header = read_header(Path("one.gguf").read_bytes(), Path("one.gguf"))
    assert (header.metadata["general.type"], header.metadata["sterna.version"]) == ("adapter", f"{two}@1")
    assert len(header.tensors) == 2 * 2 * 3

    folder = adapter_dir(Path("peft-3"), 3, alpha_pattern={"layers.1.self_attn.v_proj": 2})
    sterna(f"import {two} {folder}")
    said = sterna(f"export {two}@3 --gguf three").splitlines()
    assert said[0] == f"{two}@3: exported to three"
    assert said[1] == "  matrices whose values hold a part of their scale, as a file has one alpha for all: 1"
    exported = sterna.json(f"export {two}@3 --gguf four")
    assert (exported["path"], exported["folded"]) == ("four", ["blk.1.attn_v.weight"])

    assert sterna.fault(f"export {two}@1 --gguf one.gguf") == "one.gguf exists already"
    assert sterna.fault(f"export {two}@1 --gguf no/such/folder") == "no/such/folder: No such file or directory"
    assert sterna.fault(f"export {two}@9 --gguf nine").startswith(f"there is no version {two}@9")
    assert sterna.fault(f"export {two}@1 here --gguf there", code=2).startswith("two targets, here and --gguf there;")
    assert {path.name for path in Path().iterdir()} == {
        "peft-1", "peft-2", "peft-3", "one.gguf", "three", "four"
    }  # fmt: skip


def test_an_export_of_the_live_version(sterna: Terminal, two: str) -> None:
    assert sterna.fault(f"export {two}") == f"{two} has no live version; name one, such as {two}@1"
    assert sterna.fault("export nothing") == "there is no adapter 'nothing'"
    sterna(f"promote {two}@2 --override")
    assert sterna(f"export {two}") == f"{two}@2: exported to {two}@2.zip\n"
    assert sterna(f"export {two} --gguf x.gguf") == f"{two}@2: exported to x.gguf\n"


def test_diff(sterna: Terminal, two: str) -> None:
    sterna(f"import {two} {adapter_dir(Path('peft-3'), 1, lora_alpha=12)}")
    scaled = sterna(f"diff {two}@1 {two}@3").splitlines()
    assert scaled[0].split() == ["configuration", f"{two}@1", f"{two}@3"]
    assert scaled[1].split() == ["lora_alpha", "6", "12"]
    assert [line.split()[0] for line in scaled[4:]] == ["q_proj", "v_proj", "all"]
    assert scaled[-1].endswith("50.0 %")
    layers = sterna(f"diff {two}@1 {two}@2 --layers").splitlines()
    assert [line.split()[1:3] for line in layers[1:3]] == [["0", "q_proj"], ["0", "v_proj"]]
    assert len(layers) == 1 + 6 + 1
    assert layers[-1].endswith("75.0 %")
    assert sterna(f"diff {two}@1 {two}@1") == f"{two}@1 and {two}@1 are the same content\n"
    assert sterna.json(f"diff {two}@1 {two}@2")["object"] == "adapter.diff"


def test_somebody_was_faster(sterna: Terminal, two: str) -> None:
    seen = sterna.json(f"show {two}")["change"]
    sterna(f"canary {two}@1 --share 0.1 --expected-change {seen}")
    assert sterna.fault(f"promote {two}@2 --override --expected-change {seen}").startswith(
        f"{two} is at change {seen + 1}, not {seen} any more"
    )


def test_a_promotion_that_the_server_cannot_follow_is_a_fault(
    sterna: Terminal, two: str, app: LiveApp, capsys: pytest.CaptureFixture[str]
) -> None:
    versions = app.harness.records.versions
    assert versions is not None
    version = versions.registry.adapter(two).versions[1]
    (versions.path(version) / "adapter_model.safetensors").write_bytes(b"not any more")
    assert cli.main(["adapters", "promote", f"{two}@1", "--override"]) == 1
    output = capsys.readouterr()
    assert output.out.startswith(f"{two}: {two}@1 answers (change ")
    assert output.err.startswith("sterna: the registry has the change, but this server cannot load ")
    assert output.err.count("\n") == 1
    assert "this server cannot load" in sterna(f"show {two}")
    sterna(f"rollback {two}")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("show nothing", "there is no adapter 'nothing'"),
        ("show ../etc", f"'../etc' {NO_NAME}"),
        ("show nothing@1", "there is no adapter 'nothing'"),
        ("history nothing", "there is no adapter 'nothing'"),
        ("history nothing --limit 0", "'limit' must be 1 to 1000, got '0'"),
        ("rollback nothing", "there is no adapter 'nothing'"),
        ("import new no-such-folder", "no-such-folder: No such file or directory"),
        ("import new /dev/null", "/dev/null is neither a directory nor a zip file"),
        ("import New peft", f"'New' {NO_NAME}"),
        ("import tiny peft", "'tiny' is the base model's name; an adapter needs another"),
        ("import new peft --base-digest sha256:x", "'base_digest' must be 'sha256:' and 64 hexadecimal digits"),
        ("import new peft --parent nothing@1", "there is no adapter 'nothing'"),
        ("import new empty", "empty: adapter_config.json is missing"),
        ("import new pickle", "pickle: adapter_model.bin is a pickle and is never read; save as safetensors"),
        ("import new linked/adapter", "linked/adapter is neither a directory nor a zip file"),
        ("import new links", "links/adapter_model.safetensors: it is a symbolic link; copy the file itself"),
        ("import new dora", "use_dora is 'True'; this key is not supported"),
        ("import new text.zip", f"text.zip: {NO_ZIP}"),
    ],
)  # fmt: skip
def test_faults_are_the_server_s_own_words(line: str, words: str, sterna: Terminal) -> None:
    adapter_dir(Path("peft"))
    adapter_dir(Path("dora"), use_dora=True)
    for folder in ("empty", "linked"):
        Path(folder).mkdir()
    adapter_dir(Path("pickle")).joinpath("adapter_model.bin").write_bytes(b"x")
    weights = adapter_dir(Path("links")) / "adapter_model.safetensors"
    weights.rename("elsewhere")
    weights.symlink_to(Path("elsewhere").absolute())
    Path("linked/adapter").symlink_to(Path("peft").absolute())
    Path("text.zip").write_text("no zip")
    assert sterna.fault(line) == words
    assert "new" not in [adapter["name"] for adapter in sterna.json("list")]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "a verb is missing; there are list, show, "),
        ("lst", "no verb 'lst'; there are list, show, "),
        ("promote tools", "argument VERSION: 'tools' names no version; a version is called like tools@2 (sterna "),
        ("promote tools@1 --shre 1", "unrecognized arguments: --shre 1 (sterna adapters promote --help)"),
        ("canary tools@1", "the following arguments are required: --share (sterna adapters canary --help)"),
        ("canary tools@1 --share 1.5", "argument --share: '1.5' is no share; it must be between 0 and 1"),
        ("canary tools@1 --share nan", "argument --share: 'nan' is no share; it must be between 0 and 1"),
        ("canary tools@1 --share x", "argument --share: 'x' is no share; it must"),
        ("share tools retired 0.5", "argument state: invalid choice: 'retired'"),
        ("promote tools@1 --reason \udcff", "argument --reason: '\\udcff' is not UTF-8 text"),
        ("list --url ftp://x", "--url: 'ftp://x' is not accepted: expected http:// or https:// and a host"),
    ],
)
def test_a_wrong_line_is_exit_code_2(line: str, words: str, sterna: Terminal) -> None:
    assert sterna.fault(line, code=2).startswith(words)


def test_help_of_the_whole(sterna: Terminal) -> None:
    text = sterna("--help")
    assert all(f"\n  {verb:<10}" in text for verb in VERBS)


def test_no_server(sterna: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STERNA_URL", "http://127.0.0.1:1")
    assert sterna.fault("list").startswith("no server answers at http://127.0.0.1:1: ")


def test_another_server(sterna: Terminal, app: LiveApp) -> None:
    url = f"{app.url}/elsewhere"
    assert sterna.fault(f"list --url {url}") == "Unknown path; the served paths are listed at /openapi.json."


def test_api_keys(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with live_app(is_loopback=False) as app:
        sterna = Terminal(capsys)
        monkeypatch.setenv("STERNA_URL", f"{app.url}/v1")  # as OpenAI's clients are configured
        assert "needs an API key with the scope 'train'" in sterna.fault("list")
        _, train = app.harness.records.keys.create("sidecar", ["train"])
        assert sterna.fault("list").endswith("(--api-key or STERNA_API_KEY)")
        assert sterna(f"list --api-key {train}") == "no adapters\n"
        monkeypatch.setenv("STERNA_API_KEY", train)
        sterna(f"import tools {adapter_dir(Path('peft'))}")
        assert sterna.fault("promote tools@1 --override") == ("The API key 'sidecar' does not have the scope 'admin'.")
        assert sterna.json("history tools")[0]["asked_by"] == "key 'sidecar'"


def test_asking_a_server_loads_no_numpy_and_no_server() -> None:
    script = (
        "import sys\nfrom server import cli\ncli.main(['adapters', 'list', '--url', 'http://127.0.0.1:1'])\n"
        "heavy = {'numpy', 'fastapi', 'uvicorn', 'sqlalchemy', 'tokenizers', 'torch'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, stderr=subprocess.DEVNULL)
