"""The database of the settings, for commands that work on it directly, whether a server runs or not."""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from server.commands.arguments import Parser, add_settings, parse_with_settings
from server.config import Settings
from server.storage.database import Database, make_private_directory, open_database


def parse(parser: Parser, arguments: Sequence[str]) -> tuple[argparse.Namespace, Settings]:
    """With the settings that say where the database is; all others come from sterna.toml and the environment."""
    add_settings(parser, ["database", "data_dir"])
    return parse_with_settings(parser, arguments)


@contextmanager
def opened(settings: Settings, *, may_create: bool = False) -> Iterator[Database]:
    """Closed at the end. Raises ConfigError when there is none."""
    if may_create and settings.database is None:
        make_private_directory(settings.data_dir.expanduser(), "data_dir")
    database = open_database(settings.database_url, must_exist=not may_create)
    try:
        yield database
    finally:
        database.close()
