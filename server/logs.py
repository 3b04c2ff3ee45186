"""Logging of the server process: one handler on standard error, lines for people or JSON for machines.

Called once by `sterna serve`; libraries and tests are left alone. Results never go through here.
"""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Literal


def configure_logging(level: Literal["debug", "info", "warning", "error"], style: Literal["text", "json"]) -> None:
    """Route every logger to standard error. Per-request access lines only at debug: they cost more than a chunk."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if style == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    if level != "debug":
        logging.getLogger("uvicorn.access").setLevel(logging.WARNING)
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # "Started server process" and the like
        logging.getLogger("gguf").setLevel(logging.WARNING)  # what it is about to write, and in which byte order
        logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for every request that record mode sends on


class TextFormatter(logging.Formatter):
    """`2026-11-21T05:10:03.120Z INFO server.engine: message`"""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        return _utc(record)


class JsonFormatter(logging.Formatter):
    """One object a line: time, level, logger, message, and a traceback when there is one."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": _utc(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


def _utc(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
