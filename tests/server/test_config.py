"""Settings: which source wins, that unknown keys are errors everywhere, and that all problems come at once."""

from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from server.config import Remote, Settings, find_remote, load_settings
from server.errors import ConfigError, UsageError


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(text: str) -> None:
    Path("sterna.toml").write_text(text, "utf-8")


def problems(flags: dict[str, str] | None = None, environ: dict[str, str] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_settings(flags, environ=environ or {})
    return str(caught.value).splitlines()


def test_defaults_need_no_source() -> None:
    settings = load_settings(environ={})
    assert (settings.host, settings.port, settings.max_num_seqs) == ("127.0.0.1", 8000, 64)
    assert settings.model == "smollm2-135m-instruct"
    assert settings.threads is None
    assert settings.kv_memory is None


def test_each_source_beats_the_one_below() -> None:
    write("port = 1\nthreads = 1\nmax_waiting = 1\n")
    settings = load_settings({"port": "3"}, environ={"STERNA_PORT": "2", "STERNA_THREADS": "2"})
    assert (settings.port, settings.threads, settings.max_waiting) == (3, 2, 1)
    assert settings.max_num_seqs == 64


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError):
        load_settings(environ={}).port = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("1GiB", 1 << 30), ("512MiB", 512 << 20), ("1.5 GiB", 3 << 29), ("2GB", 2 * 10**9), ("77", 77)],
)
def test_kv_memory_takes_units(text: str, num_bytes: int) -> None:
    assert load_settings({"kv_memory": text}, environ={}).kv_memory == num_bytes


def test_all_problems_of_all_sources_are_reported_one_line_each() -> None:
    write('isa = "neon"\nporrt = 5\n')
    lines = problems(
        {"port": "70000"}, {"STERNA_LOG_LEVEL": "loud", "STERNA_THREDS": "2", "STERNA_DRAIN_SECONDS": "nan"}
    )
    assert sorted(lines) == [
        "--port: '70000' is not accepted: expected less than or equal to 65535",
        "STERNA_DRAIN_SECONDS: 'nan' is not accepted: expected a finite number",
        "STERNA_LOG_LEVEL: 'loud' is not accepted: expected 'debug', 'info', 'warning' or 'error'",
        "STERNA_THREDS: no such setting; did you mean STERNA_THREADS?",
        "sterna.toml: isa: 'neon' is not accepted: expected 'auto', 'avx512', 'avx2' or 'scalar'",
        "sterna.toml: porrt: no such setting; did you mean sterna.toml: port?",
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [("port", "-1"), ("threads", "0"), ("threads", "257"), ("kv_memory", "0"), ("kv_memory", "lots"),
     ("max_num_seqs", "0"), ("model", ""),
     ("drain_seconds", "-1"), ("quantize", "q2"), ("max_waiting", "-1"), ("max_num_batched_tokens", "8")],
)  # fmt: skip
def test_values_out_of_range_are_refused(name: str, value: str) -> None:
    (line,) = problems({name: value})
    assert line.startswith(f"--{name.replace('_', '-')}: '{value}' is not accepted: ")


def test_a_step_must_hold_a_token_of_every_sequence() -> None:
    (line,) = problems({"max_num_seqs": "100", "max_num_batched_tokens": "64"})
    assert line.startswith("max_num_batched_tokens (64) is less than max_num_seqs (100)")


def test_an_empty_variable_is_not_set_and_service_links_of_kubernetes_are_not_settings() -> None:
    environ = {
        "STERNA_PORT": "",
        "STERNA_SERVICE_HOST": "10.0.0.1",
        "STERNA_PORT_8000_TCP_ADDR": "10.0.0.1",
        "STERNA_TEST_ANYTHING": "1",
        "HOME": "/x",
    }
    assert load_settings(environ=environ).port == 8000


def test_a_named_file_must_exist_and_be_toml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no\.toml: No such file"):
        load_settings(file=tmp_path / "no.toml", environ={})
    write("port = ")
    with pytest.raises(ConfigError, match=r"sterna\.toml: not valid TOML"):
        load_settings(environ={})
    (tmp_path / "other.toml").write_text("port = 9\n")
    assert load_settings(file=tmp_path / "other.toml", environ={}).port == 9


def test_the_cache_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Settings().cache_dir == tmp_path / "sterna"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert Settings().cache_dir == Path("/home/someone/.cache/sterna")


def test_where_a_command_finds_its_server() -> None:
    environ = {"STERNA_URL": "https://models.example:8443/sterna/v1/", "STERNA_API_KEY": "sk-sterna-x"}
    assert find_remote(environ={}) == Remote("http://127.0.0.1:8000", None)
    assert find_remote(environ={"STERNA_URL": "", "STERNA_API_KEY": ""}) == Remote("http://127.0.0.1:8000", None)
    assert find_remote(environ=environ) == Remote("https://models.example:8443/sterna", SecretStr("sk-sterna-x"))
    assert find_remote("http://[::1]:80", "k", environ=environ) == Remote("http://[::1]:80", SecretStr("k"))
    assert load_settings(environ=environ) == load_settings(environ={})  # they are no settings of a server


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://x", "http://", "http://a b", "http://x?y"])
def test_a_bad_url_is_named_with_its_source(url: str) -> None:
    with pytest.raises(UsageError, match=r"^--url: "):
        find_remote(url, environ={})
    with pytest.raises(UsageError, match=r"^STERNA_URL: "):
        find_remote(environ={"STERNA_URL": url})


def test_a_bad_api_key_is_not_repeated() -> None:
    with pytest.raises(UsageError, match=r"^STERNA_API_KEY: an API key has only printable ASCII$"):
        find_remote(environ={"STERNA_API_KEY": "sk-\n"})
