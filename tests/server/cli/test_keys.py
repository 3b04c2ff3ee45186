"""`sterna keys`: made and shown once, listed, revoked; on the server's own database."""

import asyncio
import json
from pathlib import Path

import pytest

from server import cli
from server.keys.keys import InvalidKeyError, Keys
from server.storage.database import open_database
from tests.server.cli.test_cli import fault
from tests.server.postgres import migrated_url, postgres_url

__all__ = ["migrated_url", "postgres_url"]


@pytest.fixture(autouse=True)
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STERNA_DATA_DIR", str(tmp_path / "data"))
    return tmp_path / "data"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What it prints; the exit code is 0."""
    assert cli.main(arguments) == 0
    return capsys.readouterr().out


def test_a_key_is_printed_once_and_good_for_a_server(migrated_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    where = ("--database", migrated_url)
    create = ("keys", "create", "agent é", "--scope", "train", "--scope", "feedback", "--trace-policy", "off")
    assert cli.main([*create, *where]) == 0
    printed = capsys.readouterr()
    text = printed.out.removesuffix("\n")
    assert text.startswith("sk-sterna-")
    assert "\n" not in text
    assert "'agent é' (feedback, train)" in printed.err
    database = open_database(migrated_url)
    found = asyncio.run(Keys(database).verify(text))
    assert (found.name, found.scopes, found.trace_policy) == ("agent é", {"feedback", "train"}, "off")
    listed = json.loads(run(capsys, "keys", "list", "--json", *where))
    assert text not in str(listed)
    assert listed == [
        {"id": found.id, "name": "agent é", "scopes": ["feedback", "train"], "trace_policy": "off",
         "created_at": found.created_at.isoformat(), "revoked_at": None}
    ]  # fmt: skip

    for _ in range(2):
        assert run(capsys, "keys", "revoke", found.id, *where) == f"{found.id} 'agent é' is revoked\n"
    with pytest.raises(InvalidKeyError):
        asyncio.run(Keys(database).verify(text))
    assert json.loads(run(capsys, "keys", "list", "--json", *where)) == []
    assert json.loads(run(capsys, "keys", "list", "--all", "--json", *where))[0]["revoked_at"].endswith("+00:00")
    database.close()


def test_the_first_key_makes_the_database_for_its_user_alone(
    data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    created = json.loads(run(capsys, "keys", "create", "ops", "--scope", "admin", "--json"))
    assert (data_dir / "sterna.db").is_file()
    assert data_dir.stat().st_mode & 0o077 == 0
    assert (created["scopes"], created["key"][:10]) == (["admin"], "sk-sterna-")
    assert run(capsys, "keys", "create", "agents").startswith("sk-sterna-")
    header, *rows = run(capsys, "keys", "list").splitlines()
    assert header.split() == ["id", "name", "scopes", "traces", "created", "revoked"]
    assert [row.split()[1:4] for row in rows] == [["ops", "admin", "on"], ["agents", "inference,", "feedback"]]


def test_without_a_database_only_create_works(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (("keys", "list"), ("keys", "revoke", "key-x")):
        code, [line] = fault(capsys, *arguments)
        assert code == 1
        assert line == f"sterna: there is no database {data_dir}/sterna.db yet; a server makes it when it starts"
    assert not data_dir.exists()


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (["create", ""], 1, "1 to 128 printable characters"),
        (["create", "a\nb"], 1, "1 to 128 printable characters"),
        (["create", "x", "--scope", "root"], 1, "some of inference, feedback, train, admin, not 'root'"),
        (["create", "x", "--trace-policy", "maybe"], 1, "'on' or 'off', not 'maybe'"),
        (["create"], 2, "NAME"),
        (["create", "x", "y"], 2, "one argument too many"),
        (["list", "--database", "mysql://x"], 1, "sqlite:///"),
        ([], 2, "a verb is missing; there are create, list, revoke"),
        (["drop"], 2, "no verb 'drop'"),
    ],
)
def test_what_is_wrong_is_one_line(
    arguments: list[str], code: int, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found, [line] = fault(capsys, "keys", *arguments)
    assert found == code
    assert reason in line


def test_an_unknown_key_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "keys", "create", "x")
    for odd in ("key-x", "\0", "x" * 1000):
        code, [line] = fault(capsys, "keys", "revoke", odd)
        assert code == 1
        assert "no API key with the id" in line
