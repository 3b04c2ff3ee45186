"""`sterna up`: the server, and the sidecar that learns from it, under one supervisor.

Flags are those of `sterna serve`, and those of `sterna finetune` behind `--finetune-`. Every problem of either is told
before anything starts. On SIGTERM or Ctrl-C the server drains first, then the sidecar stops; a round goes on at the
next start. Not here: starting, restarting and ending processes (supervisor.py).
"""

import argparse
import asyncio
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from server.commands.arguments import Parser, add_part_settings, add_settings, parse_with_settings, part_flags
from server.commands.finetune import SHARED
from server.commands.supervisor import Child, Supervisor
from server.config import Settings

SIDECAR_SECONDS = 20.0
"""A sidecar stops between two micro-batches or answers."""
CLOSE_SECONDS = 5.0
"""Of the server, after its drain."""


def main(arguments: Sequence[str]) -> int:
    from finetune.config import PART, FinetuneSettings, load_finetune_settings
    from finetune.extra import check_extra

    prefix = f"{PART}-"
    parser = Parser(
        "up", "Serve a model, and learn from what is asked.", "sterna up --port 8000 --finetune-every-hours 6"
    )
    add_settings(parser)
    add_part_settings(parser, FinetuneSettings, PART, flag_prefix=prefix)

    def load_part(options: argparse.Namespace) -> None:
        flags = part_flags(options, FinetuneSettings, PART)
        load_finetune_settings(flags, file=options.config, flag_prefix=prefix)

    options, settings = parse_with_settings(parser, arguments, load_part)
    check_extra()
    shared = {name: value for name, value in vars(options).items() if name in Settings.model_fields}
    own = part_flags(options, FinetuneSettings, PART)
    config = [] if options.config is None else ["--config", str(options.config)]
    start = [sys.executable, "-m", "server.cli"]
    children = [
        Child(
            "serve",
            [*start, "serve", *config, *_flags(Settings, shared)],
            grace_seconds=settings.drain_seconds + CLOSE_SECONDS,
        ),
        Child(
            "finetune",
            [
                *[*start, "finetune", *config],
                *_flags(Settings, {name: value for name, value in shared.items() if name in SHARED}),
                *_flags(FinetuneSettings, own),
            ],
            grace_seconds=SIDECAR_SECONDS,
            needs_url="--url",
        ),
    ]

    def on_ready(urls: Sequence[str]) -> None:
        print(f"Sterna is up: it serves on {urls[0]} and learns on {urls[1]}", flush=True)

    # JSON lines stay JSON; which process a line is from is in its logger's name.
    supervisor = Supervisor(children, is_prefixed=settings.log_format == "text", on_ready=on_ready)
    return asyncio.run(supervisor.run())


def _flags(model: type[BaseModel], given: Mapping[str, Any]) -> Iterator[str]:
    """As they were written."""
    for name, value in given.items():
        flag = name.replace("_", "-")
        if model.model_fields[name].annotation is bool:
            yield f"--{flag}" if value else f"--no-{flag}"
        else:
            yield f"--{flag}={value}"
