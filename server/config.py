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
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError, model_validator

from server.errors import ConfigError

ENV_PREFIX = "STERNA_"
DEFAULT_FILE = Path("sterna.toml")
DEFAULT_MODEL = "smollm2-135m-instruct"

# Kubernetes gives every pod STERNA_SERVICE_HOST, STERNA_PORT_8000_TCP and so on when a service is called "sterna".
# STERNA_TEST_ is for the tests, whose servers inherit it.
_NOT_SETTINGS = re.compile(r"STERNA_(SERVICE_(HOST|PORT)|PORT_\d+_|TEST_)")


def _default_cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "sterna"


class Settings(BaseModel):
    """Everything an operator can choose. `sterna serve --help` is generated from these fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: Annotated[str, Field(min_length=1)] = Field(
        DEFAULT_MODEL, description="a name from `sterna models list`, a .gguf file or a Hugging Face directory"
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
    drain_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        30.0, description="how long running requests may take to finish after SIGTERM"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least level that is logged")
    log_format: Literal["text", "json"] = Field("text", description="log lines for people or for machines")
    cache_dir: Path = Field(
        default_factory=_default_cache_dir, description="where pulled models are kept [~/.cache/sterna]"
    )

    @model_validator(mode="after")
    def _every_sequence_fits_a_step(self) -> Self:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) is less than max_num_seqs "
                f"({self.max_num_seqs}): a step must hold one token of every sequence"
            )
        return self


def load_settings(
    flags: Mapping[str, Any] | None = None, *, file: Path | None = None, environ: Mapping[str, str] | None = None
) -> Settings:
    """Merge the sources. `flags` is keyed by field name; `file` must exist when given, else sterna.toml is optional.

    Raises ConfigError whose message has one line for each problem.
    """
    path = file if file is not None else DEFAULT_FILE
    layers = {  # strongest last
        str(path): _read_file(path, required=file is not None),
        "environment": _read_environment(os.environ if environ is None else environ),
        "command line": dict(flags or {}),
    }
    merged: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for source, values in layers.items():
        merged |= values
        origin |= dict.fromkeys(values, source)
    try:
        return Settings(**merged)
    except ValidationError as error:
        raise ConfigError("\n".join(_problem(item, origin) for item in error.errors())) from None


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


def _read_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """An empty variable counts as not set: that is how shells and compose files switch one off."""
    return {
        name.removeprefix(ENV_PREFIX).lower(): value
        for name, value in environ.items()
        if name.startswith(ENV_PREFIX) and value and not _NOT_SETTINGS.match(name)
    }


def _problem(item: Any, origin: Mapping[str, str]) -> str:
    """One line: the source, the key as it is spelled there, the bad value and what is accepted."""
    if not item["loc"]:  # a rule between several settings names them itself
        return str(item["msg"]).removeprefix("Value error, ")
    key = str(item["loc"][0])
    source = origin.get(key, "default")
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, Settings.model_fields, n=1)
        return f"{_spelled(key, source)}: no such setting" + (
            f"; did you mean {_spelled(near[0], source)}?" if near else ""
        )
    reason = str(item["msg"]).replace("Input should be", "expected").removeprefix("Value error, ")
    return f"{_spelled(key, source)}: {item['input']!r} is not accepted: {reason}"


def _spelled(key: str, source: str) -> str:
    if source == "command line":
        return f"--{key.replace('_', '-')}"
    if source == "environment":
        return f"{ENV_PREFIX}{key.upper()}"
    return f"{source}: {key}"


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
