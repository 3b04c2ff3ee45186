"""Everything of a server that lives in its database, opened in order and closed in reverse.

Traces, episodes, feedback and API keys always; the adapter registry with it where the backend can load versions. The
routes and the answers reach all of it through one `Records`. Not here: the model, and what answers.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from server.adapters.service import AdapterService
from server.adapters.store import VersionStore
from server.config import Settings
from server.errors import ServerUnavailableError
from server.keys.keys import Keys
from server.metrics import Metrics
from server.storage.database import Database, make_private_directory, open_database
from server.traces.deletion import TraceDeletion
from server.traces.episodes import Episodes
from server.traces.feedback import FeedbackStore
from server.traces.log import TraceLog
from server.traces.queries import TraceQueries
from server.traces.redaction import RedactionRule, Redactor
from server.traces.retention import Retention
from server.traces.store import TraceStore

logger = logging.getLogger(__name__)

RETENTION_SECONDS = 300.0
"""Between two passes: a log is over its limits by what five minutes bring, at most."""


@dataclass(frozen=True, slots=True)
class Records:
    database: Database
    keys: Keys
    log: TraceLog
    episodes: Episodes
    feedback: FeedbackStore
    queries: TraceQueries
    deletion: TraceDeletion
    is_logging: bool
    """The server's setting; a key and a request can each say no too."""
    adapters: AdapterService[Any] | None = None
    """None: a backend whose versions are not ours to move (record mode)."""
    versions: VersionStore | None = None


def open_store(settings: Settings, metrics: Metrics, base_name: str) -> TraceStore:
    """The database with its schema up to date, and what writes traces into it. Waits for the disk: for a thread.

    `base_name`: of the base model in metrics. Raises ConfigError, DatabaseUnavailableError.
    """
    redactor = Redactor([RedactionRule(pattern) for pattern in settings.redact], secrets=settings.secrets)
    if settings.database is None:
        make_private_directory(settings.data_dir.expanduser(), "data_dir")
    database = open_database(settings.database_url)
    try:
        return TraceStore(
            database,
            redactor=redactor,
            held_out_share=settings.held_out_share,
            audit_share=settings.audit_share,
            on_tool_outcome=lambda adapter, version, is_error: metrics.count_tool_outcome(
                version or base_name, is_error
            ),
        )
    except BaseException:
        database.close()
        raise


@asynccontextmanager
async def open_records(settings: Settings, store: TraceStore) -> AsyncIterator[Records]:
    """Around the answering of requests; closes the store's database. Adapters are added by whoever can load them."""
    database = store.database
    episodes = Episodes(database)
    log = TraceLog(store, episodes, is_durable=settings.trace_durability == "durable")
    log.start()
    retention = asyncio.create_task(_keep_within_limits(settings, database))
    try:
        yield Records(
            database,
            Keys(database),
            log,
            episodes,
            FeedbackStore(database, redactor=store.redactor),
            TraceQueries(database),
            TraceDeletion(database),
            settings.log_requests,
        )
    finally:
        retention.cancel()
        await asyncio.wait([retention])
        await asyncio.to_thread(log.stop)
        database.close()


async def _keep_within_limits(settings: Settings, database: Database) -> None:
    """A top loop: whatever happens, the next pass comes."""
    days = settings.trace_max_age_days
    if days is None and settings.trace_max_size is None:
        return
    max_age = None if days is None else timedelta(days=days)
    retention = Retention(database, max_age=max_age, max_bytes=settings.trace_max_size)
    while True:
        try:
            await asyncio.to_thread(retention.run_once)
        except ServerUnavailableError as error:
            logger.warning("old traces could not be deleted: %s", error)
        except Exception:
            logger.exception("deleting old traces failed")
        await asyncio.sleep(RETENTION_SECONDS)
