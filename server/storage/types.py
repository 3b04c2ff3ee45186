"""Column types with one meaning on SQLite and PostgreSQL.

JSON is stored as compressed ASCII text and not as the database's JSON type: a message may hold NUL and escaped
surrogates, which PostgreSQL's text and jsonb refuse, and histories repeat themselves (zlib halves them or better).
"""

import json
import zlib
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
from sqlalchemy import BigInteger, DateTime, Dialect, Integer, LargeBinary
from sqlalchemy.types import TypeDecorator

SequenceNumber = BigInteger().with_variant(Integer, "sqlite")
"""SQLite numbers rows by itself only when the key's type is spelled INTEGER (which is 64 bits there)."""

_ZLIB_LEVEL = 1
"""6 gains 10 % in size on chat histories and takes three times as long."""


class UtcDateTime(TypeDecorator[datetime]):
    """Aware datetimes in UTC; SQLite stores them without the zone, as sortable text."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        assert value.tzinfo is not None, "times are UTC and say so"
        value = value.astimezone(UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class CompressedJson(TypeDecorator[Any]):
    """Any JSON value; None is NULL, bytes come from `pack_json` already."""

    impl = LargeBinary
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> bytes | None:
        return value if value is None or isinstance(value, bytes) else pack_json(value)

    def process_result_value(self, value: bytes | None, dialect: Dialect) -> Any:
        return None if value is None else json.loads(zlib.decompress(value))


class TokenIds(TypeDecorator[Sequence[int]]):
    """Token ids as compressed little-endian uint32; None is NULL, bytes come from `pack_token_ids` already."""

    impl = LargeBinary
    cache_ok = True

    def process_bind_param(self, value: Sequence[int] | bytes | None, dialect: Dialect) -> bytes | None:
        return value if value is None or isinstance(value, bytes) else pack_token_ids(value)

    def process_result_value(self, value: bytes | None, dialect: Dialect) -> list[int] | None:
        if value is None:
            return None
        ids: list[int] = np.frombuffer(zlib.decompress(value), dtype="<u4").tolist()
        return ids


def pack_json(value: Any) -> bytes:
    """Packing by hand, where it must not happen inside a transaction or its size matters."""
    return zlib.compress(json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii"), _ZLIB_LEVEL)


def pack_token_ids(value: Sequence[int]) -> bytes:
    return zlib.compress(np.asarray(value, dtype="<u4").tobytes(), _ZLIB_LEVEL)
