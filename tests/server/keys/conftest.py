"""The databases that the key tests run on."""

from tests.server.postgres import migrated_url, postgres_url, sqlite_url

__all__ = ["migrated_url", "postgres_url", "sqlite_url"]
