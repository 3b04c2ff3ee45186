"""Keys are shown once, stored as digests, checked with few queries, and gone when revoked."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from server.errors import InvalidRequestError, ServerUnavailableError
from server.keys.keys import CACHE_SECONDS, STALE_SECONDS, InvalidKeyError, KeyNotFoundError, Keys
from server.storage.database import Database, open_database


class Ticks:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def database(migrated_url: str) -> Iterator[Database]:
    opened = open_database(migrated_url)
    yield opened
    opened.close()


@pytest.fixture
def ticks() -> Ticks:
    return Ticks()


@pytest.fixture
def keys(database: Database, ticks: Ticks) -> Keys:
    return Keys(database, monotonic=ticks)


def verify(keys: Keys, secret: str | None) -> str:
    return asyncio.run(keys.verify(secret)).id


def test_a_key_is_found_by_its_text_alone(keys: Keys, database: Database) -> None:
    key, secret = keys.create("agent é", ["inference", "train"], trace_policy="off")
    _, other = keys.create("other")
    assert secret.startswith("sk-sterna-")
    assert len(secret) > 50
    assert secret != other
    found = asyncio.run(keys.verify(secret))
    assert found == key
    assert (found.name, found.scopes, found.trace_policy) == ("agent é", {"inference", "train"}, "off")
    with database.read() as connection:
        assert secret[10:] not in str(connection.execute(text("SELECT * FROM api_keys")).all())
    assert [one.name for one in keys.list()] == ["agent é", "other"]


@pytest.mark.parametrize("secret", [None, "", "sk-other", "sk-sterna-", "sk-sterna-" + "x" * 43, "sk-sterna-\ud800"])
def test_what_is_no_key_is_refused(keys: Keys, secret: str | None) -> None:
    keys.create("agent")
    with pytest.raises(InvalidKeyError):
        verify(keys, secret)


def test_a_part_of_a_key_is_no_key(keys: Keys) -> None:
    _, secret = keys.create("agent")
    for wrong in (secret[:-1], secret + "x", secret.swapcase()):
        with pytest.raises(InvalidKeyError):
            verify(keys, wrong)


def test_revoked_here_at_once_elsewhere_soon(keys: Keys, database: Database, ticks: Ticks) -> None:
    elsewhere = Keys(database, monotonic=ticks)
    key, secret = keys.create("agent")
    assert verify(keys, secret) == verify(elsewhere, secret) == key.id
    revoked = keys.revoke(key.id)
    assert revoked.revoked_at is not None
    assert keys.revoke(key.id) == revoked
    with pytest.raises(InvalidKeyError):
        verify(keys, secret)
    assert verify(elsewhere, secret) == key.id
    ticks.now += CACHE_SECONDS + 1
    with pytest.raises(InvalidKeyError):
        verify(elsewhere, secret)
    assert keys.list() == []
    assert [one.id for one in keys.list(with_revoked=True)] == [key.id]
    for nonsense in ("key-nonsense", "key-\0", "key-\ud800"):
        with pytest.raises(KeyNotFoundError):
            keys.revoke(nonsense)


def test_whether_keys_are_needed(keys: Keys, database: Database, ticks: Ticks) -> None:
    elsewhere = Keys(database, monotonic=ticks)
    assert not asyncio.run(keys.any_exist())
    assert not asyncio.run(elsewhere.any_exist())
    key, _ = keys.create("agent")
    assert asyncio.run(keys.any_exist())
    ticks.now += CACHE_SECONDS + 1
    assert asyncio.run(elsewhere.any_exist())
    keys.revoke(key.id)
    assert asyncio.run(keys.any_exist())
    assert asyncio.run(Keys(database, monotonic=ticks).any_exist())


def test_scopes(keys: Keys) -> None:
    agent, _ = keys.create("agent")
    admin, _ = keys.create("boss", ["admin"])
    assert agent.scopes == {"inference", "feedback"}
    assert admin.is_admin
    assert not agent.is_admin


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({"name": ""}, "name"),
        ({"name": "x" * 129}, "name"),
        ({"name": "a\nb"}, "name"),
        ({"name": "a", "scopes": []}, "scopes"),
        ({"name": "a", "scopes": ["root"]}, "scopes"),
        ({"name": "a", "trace_policy": "maybe"}, "trace_policy"),
    ],
)
def test_bad_values_are_named(keys: Keys, values: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        keys.create(**values)
    assert caught.value.param == param


def test_while_the_database_is_away_a_good_key_stays_good(sqlite_url: str, tmp_path: Path, ticks: Ticks) -> None:
    database = open_database(sqlite_url)
    keys = Keys(database, monotonic=ticks)
    key, secret = keys.create("agent")
    assert verify(keys, secret) == key.id
    assert asyncio.run(keys.any_exist())
    (tmp_path / "test.db").rename(tmp_path / "away.db")
    ticks.now += CACHE_SECONDS + 1
    assert verify(keys, secret) == key.id
    assert asyncio.run(keys.any_exist())
    with pytest.raises(ServerUnavailableError):
        verify(keys, "sk-sterna-" + "x" * 43)
    ticks.now += STALE_SECONDS
    with pytest.raises(ServerUnavailableError):
        verify(keys, secret)
    assert asyncio.run(keys.any_exist())
    with pytest.raises(ServerUnavailableError):
        asyncio.run(Keys(database, monotonic=ticks).any_exist())
    (tmp_path / "away.db").rename(tmp_path / "test.db")
    assert verify(keys, secret) == key.id
    database.close()


def test_a_flood_of_wrong_keys_is_not_remembered_for_ever(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.keys.keys.CACHE_KEYS", 3)
    _, secret = keys.create("agent")
    for number in range(10):
        with pytest.raises(InvalidKeyError):
            verify(keys, f"sk-sterna-{number}")
    assert verify(keys, secret)
    assert len(keys._cache) == 3
