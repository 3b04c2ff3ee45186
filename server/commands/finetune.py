"""`sterna finetune`: the sidecar that learns from the log, and its rounds one by one.

What trains is imported when it is needed (finetune/, torch); without the extra that is one line naming the command that
installs it. The verbs that only read the database need no extra.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pydantic import ByteSize, TypeAdapter, ValidationError

from server.adapters.version import VersionRef, check_adapter_name
from server.commands.arguments import Parser, add_part_settings, add_settings, parse_with_settings, part_flags
from server.commands.client import add_remote
from server.commands.database import opened, parse
from server.commands.table import print_table
from server.config import Settings, find_remote
from server.errors import SternaError, UsageError
from server.logs import configure_logging
from server.models.catalog import resolve_model
from server.units import format_bytes

if TYPE_CHECKING:
    from finetune.config import FinetuneSettings
    from finetune.rounds.runner import Runner

SHARED = (
    "model",
    "chat_template",
    "quantize",
    "database",
    "data_dir",
    "cache_dir",
    "threads",
    "log_level",
    "log_format",
)
"""Of the server's settings, those that mean the same here."""

HELP = """\
verbs:
  run ADAPTER   one round now, in the foreground
  rounds        the rounds, the newest first
  report ROUND  one round: what it learned from, and what the gate decided
  plan          the memory that training takes, and the longest context that fits (also: --plan)

Without a verb the sidecar runs: it waits for enough new traces, a schedule or a request, trains, and asks the gate."""


class FinetuneFault(SternaError):
    """A named failure of the training room."""


def main(arguments: Sequence[str]) -> int:
    verbs: dict[str, Callable[[Sequence[str]], int]] = {
        "run": _run,
        "rounds": _rounds,
        "report": _report,
        "plan": _plan,
    }
    if arguments and arguments[0] in verbs:
        with _named_faults():
            return verbs[arguments[0]](arguments[1:])
    if arguments and not arguments[0].startswith("-"):
        raise UsageError(f"no verb {arguments[0]!r}; there are {', '.join(verbs)} (sterna finetune --help)")
    if "--plan" in arguments:
        with _named_faults():
            return _plan([one for one in arguments if one != "--plan"])
    with _named_faults():
        return _sidecar(arguments)


def _sidecar(arguments: Sequence[str]) -> int:
    from finetune.extra import check_extra

    parser = Parser(
        "finetune", f"Learn from the log beside a running server.\n\n{HELP}", "sterna finetune --every-hours 6"
    )
    options, settings, own = _parse(parser, arguments)
    check_extra()
    configure_logging(settings.log_level, settings.log_format)
    from finetune.sidecar.loop import Stop, run_sidecar, stopped_by_signals

    os.nice(own.nice)

    def on_ready(url: str) -> None:
        print(f"Sterna learns on {url}, from {remote.url}", flush=True)

    remote = find_remote(options.url, options.api_key)
    stop = Stop()
    with stopped_by_signals(stop):
        run_sidecar(settings, own, remote, on_ready=on_ready, stop=stop)
    return 0


def _run(arguments: Sequence[str]) -> int:
    from finetune.extra import check_extra

    parser = Parser("finetune run", "One round of an adapter, now.", "sterna finetune run tools --epochs 2")
    parser.add_argument("adapter", metavar="ADAPTER", type=str)
    parser.add_argument(
        "--from", dest="parent", metavar="VERSION", help="begin with the weights of this version of it, such as tools@7"
    )
    parser.add_argument("--no-wait", action="store_true", help="fail when somebody else works on the adapter")
    parser.add_argument("--json", action="store_true", help="the whole round as JSON")
    options, settings, own = _parse(parser, arguments)
    adapter = check_adapter_name(options.adapter)
    parent = _parent(adapter, options.parent)
    check_extra()
    from finetune.rounds.report import round_body
    from finetune.rounds.round import Result

    os.nice(own.nice)
    with _runner(options, settings, own) as runner:
        from finetune.sidecar.terminal import say

        round = runner.run(
            adapter,
            cause="sterna finetune run",
            parent=parent,
            is_waiting=not options.no_wait,
            on_wait=lambda holder: say(f"{holder} works on {adapter}; waiting"),
        )
    if options.json:
        print(json.dumps(round_body(round)))
    else:
        version = "" if round.version_ref is None else f" {round.version_ref}"
        print(f"{round.ref}{version}: {str(round.result).replace('_', ' ')}: {round.reason}")
    return 1 if round.result is Result.FAILED else 0


@contextmanager
def _runner(options: argparse.Namespace, settings: Settings, own: "FinetuneSettings") -> "Iterator[Runner]":
    from finetune.rounds.runner import open_runner
    from finetune.sidecar.loop import Stop, stopped_by_signals
    from finetune.sidecar.terminal import Terminal, say

    stop, terminal = Stop(), Terminal()
    with (
        stopped_by_signals(stop),
        open_runner(
            settings,
            own,
            find_remote(options.url, options.api_key),
            terminal,
            is_stopping=stop.event.is_set,
            sleep=stop.sleep,
            on_away=lambda reason: say(f"the server is away ({reason}); waiting"),
        ) as runner,
    ):
        try:
            yield runner
        finally:
            terminal.close()


def _rounds(arguments: Sequence[str]) -> int:
    parser = Parser("finetune rounds", "The rounds, the newest first.", "sterna finetune rounds --adapter tools")
    parser.add_argument("--adapter", help="of this adapter only")
    parser.add_argument("--limit", type=int, default=50, metavar="N", help="at most so many [50]")
    parser.add_argument("--json", action="store_true", help="a JSON array")
    options, settings = parse(parser, arguments)
    from finetune.rounds.report import round_body
    from finetune.rounds.store import RoundStore

    with opened(settings) as database:
        found = RoundStore(database).list(options.adapter, limit=max(options.limit, 0))
    if options.json:
        print(json.dumps([round_body(round) for round in found]))
        return 0
    rows = [
        (
            round.ref,
            str(round.result or f"in {round.phase}").replace("_", " "),
            round.version_ref or "",
            f"{round.created_at.astimezone():%Y-%m-%d %H:%M}",
            round.cause,
            _short(round.reason),
        )
        for round in found
    ]
    print_table(("ROUND", "RESULT", "VERSION", "BEGUN", "CAUSE", "REASON") if rows else None, rows)
    return 0


def _report(arguments: Sequence[str]) -> int:
    parser = Parser("finetune report", "One round, as Markdown or JSON.", "sterna finetune report tools-r3 > report.md")
    parser.add_argument("round", metavar="ROUND", help="as `sterna finetune rounds` lists it: tools-r3")
    parser.add_argument("--json", action="store_true", help="every number, as JSON")
    options, settings = parse(parser, arguments)
    from finetune.rounds.report import round_body, round_page
    from finetune.rounds.round import RoundRef
    from finetune.rounds.store import RoundStore

    ref = RoundRef.parse(options.round)
    if ref is None:
        raise UsageError(f"{options.round!r} names no round; a round is called like tools-r3")
    with opened(settings) as database:
        round = RoundStore(database).get(ref)
    print(json.dumps(round_body(round)) if options.json else round_page(round), end="\n" if options.json else "")
    return 0


def _plan(arguments: Sequence[str]) -> int:
    from finetune.extra import check_extra

    parser = Parser(
        "finetune plan", "The memory that training will take; nothing is loaded.", "sterna finetune plan --memory 8GiB"
    )
    parser.add_argument("--memory", help="of the device, such as 8GiB [what is free here]")
    parser.add_argument("--json", action="store_true", help="bytes, as JSON")
    options, settings, own = _parse(parser, arguments)
    budget = None if options.memory is None else _num_bytes(options.memory)
    check_extra()
    from finetune.sidecar.plan import plan_body

    body = plan_body(resolve_model(settings.model, settings.cache_dir).path, own, budget)
    if options.json:
        print(json.dumps(body))
        return 0
    parts = [name for name in body["plans"][0] if name not in ("num_tokens", "fits")]
    header = ("TOKENS", *(name.upper() for name in parts), "FITS")
    rows = [
        (row["num_tokens"], *(format_bytes(row[name]) for name in parts), "yes" if row["fits"] else "no")
        for row in body["plans"]
    ]
    print_table(header, rows)
    print(f"\nThe longest context in {format_bytes(body['budget_bytes'])}:")
    for one in body["longest"]:
        how = "recomputing each layer" if one["checkpointing"] else "keeping all activations"
        print(f"  {how}: {one['num_tokens']} tokens (limit: {one['limit']})")
    return 0


def _num_bytes(text: str) -> int:
    """Raises UsageError."""
    try:
        found = TypeAdapter(ByteSize).validate_python(text)
    except ValidationError:
        found = ByteSize(0)
    if found <= 0:
        raise UsageError(f"--memory: {text!r} is no size; expected one like 8GiB")
    return int(found)


def _parse(parser: Parser, arguments: Sequence[str]) -> "tuple[argparse.Namespace, Settings, FinetuneSettings]":
    """Every problem of both rooms' settings is in one UsageError."""
    from finetune.config import PART, FinetuneSettings, load_finetune_settings

    add_settings(parser, SHARED)
    add_part_settings(parser, FinetuneSettings, PART)
    add_remote(parser)
    loaded: list[FinetuneSettings] = []

    def load_part(options: argparse.Namespace) -> None:
        loaded.append(load_finetune_settings(part_flags(options, FinetuneSettings, PART), file=options.config))

    options, settings = parse_with_settings(parser, arguments, load_part)
    return options, settings, loaded[0]


def _parent(adapter: str, text: str | None) -> int | None:
    if text is None:
        return None
    ref = VersionRef.parse(text)
    if ref is None or ref.adapter != adapter:
        raise UsageError(f"--from: {text!r} is no version of {adapter}; expected one like {adapter}@7")
    return ref.number


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:79] + "…"


@contextmanager
def _named_faults() -> Iterator[None]:
    """The training room's failures as the server room's, which the command line knows."""
    from finetune.errors import FinetuneError

    try:
        yield
    except FinetuneError as error:
        raise FinetuneFault(str(error)) from error
