"""Who looks: traces, episodes and feedback are visible to the key that made them, and to admin."""

from dataclasses import dataclass

from sqlalchemy import ColumnElement, FromClause


@dataclass(frozen=True, slots=True)
class Viewer:
    """`key_id` '' is whoever needs no key (loopback, no key exists)."""

    key_id: str = ""
    is_admin: bool = False

    def sees(self, table: FromClause) -> list[ColumnElement[bool]]:
        """The condition on a table with a `key_id`, as a list to unpack into `where`."""
        return [] if self.is_admin else [table.c.key_id == self.key_id]


ADMIN = Viewer(is_admin=True)
