"""Wall-clock time for the record, passed in wherever it is needed.

Nothing takes its order from it (rows are ordered by their sequence number) and no duration is measured with it.
"""

from collections.abc import Callable
from datetime import UTC, datetime

Clock = Callable[[], datetime]
"""Returns an aware datetime in UTC."""


def utc_now() -> datetime:
    return datetime.now(UTC)
