"""The settings of one server process: a typed, frozen object, and the only place that reads the environment.

Sources, strongest first: command line flags, environment (`STERNA_PORT`), the file `sterna.toml`, the defaults
below. An unknown key is an error in every source. All problems are reported together, one line each, each naming
the source it came from; that is why the layers are merged here and not by pydantic-settings, whose errors do not
say where a bad value stood.

"Not set" is None. What the machine allows (cores, memory) is found in `server/machine.py`, not here.
"""

import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar
from urllib.parse import unquote

from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)

from server.errors import ConfigError, UsageError

ENV_PREFIX = "STERNA_"
DEFAULT_FILE = Path("sterna.toml")
DEFAULT_MODEL = "smollm2-135m-instruct"
PARTS = frozenset({"finetune", "train"})
"""Tables of the file that are another part's settings."""

# Kubernetes gives every pod STERNA_SERVICE_HOST, STERNA_PORT_8000_TCP and so on when a service is called "sterna".
# STERNA_TEST_ is for the tests, whose servers inherit it; STERNA_URL and STERNA_API_KEY are for commands (`Remote`);
# STERNA_FINETUNE_ is the sidecar's (finetune/config.py) and STERNA_TRAIN_ that of `sterna train`
# (finetune/qat/config.py), which read them by the same function.
_NOT_SETTINGS = re.compile(r"STERNA_(SERVICE_(HOST|PORT)|PORT_\d+_|TEST_|FINETUNE_|TRAIN_|(URL|API_KEY)$)")
DEFAULT_URL = "http://127.0.0.1:8000"


AnySettings = TypeVar("AnySettings", bound=BaseModel)


def _default_cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "sterna"


def _default_data_dir() -> Path:
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "sterna"


def one_or_many(value: Any) -> Any:
    """A flag or a variable holds one pattern, the settings file a list of them."""
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


class Settings(BaseModel):
    """Everything an operator can choose. `sterna serve --help` is generated from these fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: Annotated[str, Field(min_length=1)] = Field(
        DEFAULT_MODEL,
        description="a name from `sterna models list`, a .gguf file or its folder, or a Hugging Face directory",
    )
    served_model_name: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="the name that requests use [the model's own name]"
    )
    quantize: Literal["q8_0", "q4_0"] | None = Field(
        None, description="quantize a Hugging Face directory on load [keep its types]"
    )
    chat_template: Path | None = Field(None, description="a Jinja file that replaces the model's chat template")
    host: Annotated[str, Field(min_length=1)] = Field("127.0.0.1", description="address to listen on")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(8000, description="port to listen on; 0 picks a free one")
    threads: Annotated[int, Field(ge=1, le=256)] | None = Field(
        None, description="threads that compute [the physical cores this process may use]"
    )
    isa: Literal["auto", "avx512", "avx2", "scalar"] = Field("auto", description="instruction set of the kernels")
    kv_memory: Annotated[ByteSize, Field(gt=0)] | None = Field(
        None, description="memory for the KV cache, such as 1GiB [from the free memory, at most 1GiB if that serves]"
    )
    max_model_len: Annotated[int, Field(ge=1)] | None = Field(
        None, description="longest prompt and answer together, in tokens [the model's, or what the KV cache holds]"
    )
    max_num_seqs: Annotated[int, Field(ge=1, le=1024)] = Field(64, description="sequences computed at the same time")
    max_num_batched_tokens: Annotated[int, Field(ge=16, le=65536)] = Field(512, description="tokens of one step")
    max_waiting: Annotated[int, Field(ge=0)] = Field(256, description="waiting requests; one more is answered 429")
    enable_prefix_caching: bool = Field(True, description="reuse the KV cache of equal prompt beginnings")
    max_draft_tokens: Annotated[int, Field(ge=0, le=64)] = Field(
        8, description="tokens a step may guess for a sequence, where that pays; the answer stays the same; 0: none"
    )
    drain_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        30.0, description="how long running requests may take to finish after SIGTERM"
    )
    backend: Literal["native", "openai"] = Field(
        "native",
        description="who answers: this process, or (openai) the server at --upstream, whose answers are logged",
    )
    upstream: Annotated[str, Field(pattern=r"^https?://[^/\s]+")] | None = Field(
        None, description="base URL of an OpenAI-compatible server for --backend openai, such as http://host:8000/v1"
    )
    upstream_api_key: SecretStr | None = Field(
        None, description="its API key; better as STERNA_UPSTREAM_API_KEY, where no process list shows it"
    )
    database: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="URL of the database of traces, keys and adapters [an SQLite file in data_dir]"
    )
    adapter_store: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="folder or fsspec URL of the adapter versions [adapters/ in data_dir]"
    )
    max_loras: Annotated[int, Field(ge=1, le=1024)] = Field(
        32, description="adapter versions that are loaded at the same time"
    )
    adapter_memory: Annotated[ByteSize, Field(gt=0)] = Field(
        ByteSize(1 << 30), description="memory for loaded adapter versions, such as 512MiB [1GiB]"
    )
    log_requests: bool = Field(True, description="log what is asked and answered; off: nothing is learned from")
    trace_durability: Literal["durable", "relaxed"] = Field(
        "durable", description="durable: no answer ends before it is logged; relaxed: the log never delays or fails one"
    )
    trace_max_age_days: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="delete traces that are older [never]"
    )
    trace_max_size: Annotated[ByteSize, Field(gt=0)] | None = Field(
        None, description="delete the oldest traces above this size, such as 10GiB [never]"
    )
    held_out_share: Annotated[float, Field(ge=0, le=1)] = Field(
        1 / 3, description="share of episodes kept from training, to judge adapters by [0.33]"
    )
    audit_share: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="share of traces marked at random for labelling"
    )
    redact: Annotated[tuple[str, ...], BeforeValidator(one_or_many)] = Field(
        (), description="a regular expression (a list of them in sterna.toml) whose matches are never logged [none]"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least level that is logged")
    log_format: Literal["text", "json"] = Field("text", description="log lines for people or for machines")
    cache_dir: Path = Field(
        default_factory=_default_cache_dir, description="where pulled models are kept [~/.cache/sterna]"
    )
    data_dir: Path = Field(
        default_factory=_default_data_dir, description="where the database and the adapters are [~/.local/share/sterna]"
    )

    @model_validator(mode="after")
    def _every_sequence_fits_a_step(self) -> Self:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) is less than max_num_seqs "
                f"({self.max_num_seqs}): a step must hold one token of every sequence"
            )
        return self

    @model_validator(mode="after")
    def _an_upstream_belongs_to_the_openai_backend(self) -> Self:
        if (self.backend == "openai") != (self.upstream is not None):
            raise ValueError("backend 'openai' and upstream (its URL) belong together: give both or neither")
        return self

    @property
    def database_url(self) -> str:
        """With the default spelled out."""
        return self.database or f"sqlite:///{self.data_dir.expanduser().absolute() / 'sterna.db'}"

    @property
    def secrets(self) -> tuple[str, ...]:
        """What we were given and must never log: the upstream's key, and the password in its URL."""
        key = self.upstream_api_key.get_secret_value() if self.upstream_api_key is not None else ""
        password = re.match(r"https?://[^/@]*?:([^/]*)@", self.upstream or "")
        return tuple(secret for secret in (key, unquote(password[1]) if password else "") if secret)

    @property
    def adapter_store_url(self) -> str:
        """With the default spelled out."""
        return self.adapter_store or str(self.data_dir.expanduser() / "adapters")


def load_settings(
    flags: Mapping[str, Any] | None = None, *, file: Path | None = None, environ: Mapping[str, str] | None = None
) -> Settings:
    """Merge the sources. `flags` is keyed by field name; `file` must exist when given, else sterna.toml is optional.

    Raises ConfigError whose message has one line for each problem.
    """
    return merge_settings(Settings, flags, file=file, environ=environ)


def merge_settings(
    model: type[AnySettings],
    flags: Mapping[str, Any] | None,
    *,
    file: Path | None,
    environ: Mapping[str, str] | None,
    part: str = "",
    flag_prefix: str = "",
) -> AnySettings:
    """As `load_settings`, for another part of the program, whose name is its table in the file and in variables.

    `part` "finetune": the table [finetune], STERNA_FINETUNE_PORT, and --port. Raises ConfigError.
    """
    path = file if file is not None else DEFAULT_FILE
    prefix = f"{ENV_PREFIX}{part.upper()}_" if part else ENV_PREFIX
    document = _read_file(path, required=file is not None)
    layers = {  # strongest last
        str(path): _table(document, part, path) if part else _without_tables(document),
        "environment": _read_environment(os.environ if environ is None else environ, prefix),
        "command line": dict(flags or {}),
    }
    merged: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for source, values in layers.items():
        merged |= values
        origin |= dict.fromkeys(values, source)
    try:
        return model(**merged)
    except ValidationError as error:
        names = _Names(model, f"--{flag_prefix}", prefix, f"{part}." if part else "")
        raise ConfigError("\n".join(_problem(item, origin, names) for item in error.errors())) from None


def _table(document: dict[str, Any], part: str, path: Path) -> dict[str, Any]:
    values = document.get(part, {})
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: {part} is the table [{part}], not {values!r}")
    return values


def _without_tables(document: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in document.items() if not (key in PARTS and isinstance(value, dict))}


def _read_file(path: Path, *, required: bool) -> dict[str, Any]:
    if not required and not path.is_file():
        return {}
    try:
        with path.open("rb") as stream:
            return tomllib.load(stream)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def _read_environment(environ: Mapping[str, str], prefix: str) -> dict[str, str]:
    """An empty variable counts as not set: that is how shells and compose files switch one off."""
    return {
        name.removeprefix(prefix).lower(): value
        for name, value in environ.items()
        if name.startswith(prefix) and value and (prefix != ENV_PREFIX or not _NOT_SETTINGS.match(name))
    }


@dataclass(frozen=True, slots=True)
class _Names:
    """How the fields of one settings object are spelled in each source."""

    model: type[BaseModel]
    flag: str
    environment: str
    file: str

    def spelled(self, key: str, source: str) -> str:
        if source == "command line":
            return f"{self.flag}{key.replace('_', '-')}"
        if source == "environment":
            return f"{self.environment}{key.upper()}"
        return f"{source}: {self.file}{key}"


def _problem(item: Any, origin: Mapping[str, str], names: _Names) -> str:
    """One line: the source, the key as it is spelled there, the bad value and what is accepted."""
    if not item["loc"]:  # a rule between several settings names them itself
        return str(item["msg"]).removeprefix("Value error, ")
    key = str(item["loc"][0])
    source = origin.get(key, "default")
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, names.model.model_fields, n=1)
        return f"{names.spelled(key, source)}: no such setting" + (
            f"; did you mean {names.spelled(near[0], source)}?" if near else ""
        )
    reason = str(item["msg"]).replace("Input should be", "expected").removeprefix("Value error, ")
    return f"{names.spelled(key, source)}: {item['input']!r} is not accepted: {reason}"


@dataclass(frozen=True, slots=True)
class Remote:
    """Where a command finds a running server, and with which API key it asks."""

    url: str
    """Without a slash at the end, and without /v1, which clients of OpenAI's library are used to write."""
    api_key: SecretStr | None


def find_remote(
    url: str | None = None, api_key: str | None = None, *, environ: Mapping[str, str] | None = None
) -> Remote:
    """From the flags, else from STERNA_URL and STERNA_API_KEY, else the default. Raises UsageError."""
    environ = os.environ if environ is None else environ
    found = url or environ.get("STERNA_URL") or DEFAULT_URL
    if not re.fullmatch(r"https?://[^/\s?#]+(/[^\s?#]*)?", found):
        source = "--url" if url else "STERNA_URL"
        raise UsageError(f"{source}: {found!r} is not accepted: expected http:// or https:// and a host")
    key = api_key or environ.get("STERNA_API_KEY") or None
    if key is not None and not (key.isascii() and key.isprintable()):
        raise UsageError(f"{'--api-key' if api_key else 'STERNA_API_KEY'}: an API key has only printable ASCII")
    return Remote(found.rstrip("/").removesuffix("/v1").rstrip("/"), None if key is None else SecretStr(key))


def child_environment(**changes: str) -> dict[str, str]:
    """This process's environment with changes, for a child process that must keep the user's settings (pip)."""
    return dict(os.environ) | changes


def limit_library_threads() -> None:
    """Keep NumPy, tokenizers and llguidance from starting thread pools: the engine's team has all cores already.

    Works only before those libraries are imported. A value that the user set stays.
    """
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
