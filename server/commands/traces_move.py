"""The verbs of `sterna traces` that bring traces in and out, judge and delete them."""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from server.admin.trace_views import deletion_body, taken_body
from server.commands.arguments import Parser
from server.commands.database import opened, parse
from server.commands.traces_filter import add_filter, chosen_filter
from server.config import Settings
from server.errors import ConfigError, UsageError
from server.traces.deletion import TraceDeletion
from server.traces.exchange import export_lines, import_lines
from server.traces.feedback import Feedback, FeedbackStore, Target, TargetKind
from server.traces.lineage import Lineage
from server.traces.queries import TraceQueries
from server.traces.redaction import RedactionRule, Redactor
from server.traces.store import TraceStore
from server.traces.viewer import ADMIN


def export_traces(arguments: Sequence[str]) -> None:
    parser = Parser(
        "traces export",
        "Chat traces that ended well, the oldest first, a JSON line a choice, in OpenAI's fine-tuning format.",
        "sterna traces export --output traces.jsonl --purpose user --no-has-tool-error",
    )
    parser.add_argument("--output", metavar="FILE", type=Path, help="a file, there once it is complete [stdout]")
    parser.add_argument(
        "--with-corrections", action="store_true", help="a trace's latest correction takes the place of its answer"
    )
    parser.add_argument("--json", action="store_true", help="with --output: the number of lines as a JSON object")
    add_filter(parser)
    options, settings = parse(parser, arguments)
    if options.json and options.output is None:
        raise UsageError("--json needs --output: without it the lines themselves are printed")
    where = chosen_filter(options)
    num_lines = 0
    with opened(settings) as database, _output(options.output) as output:
        lines = export_lines(database, ADMIN, where, with_corrections=options.with_corrections)
        for line in tqdm(lines, unit=" lines", disable=True if output.isatty() else None, dynamic_ncols=True):
            output.write(line + "\n")
            num_lines += 1
    if options.output is not None:
        print(json.dumps({"num_lines": num_lines}) if options.json else f"{num_lines} lines in {options.output}")


@contextmanager
def _output(path: Path | None) -> Iterator[IO[str]]:
    """Raises ConfigError."""
    if path is None:
        yield sys.stdout
        return
    part = path.with_name(path.name + ".part")
    try:
        with part.open("w", encoding="utf-8") as file:
            yield file
        os.replace(part, path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from None
    finally:
        with suppress(OSError):
            part.unlink()


def import_traces(arguments: Sequence[str]) -> None:
    parser = Parser(
        "traces import",
        "Traces from JSON lines in OpenAI's fine-tuning format; those that are there already add nothing.",
        "sterna traces import traces.jsonl --adapter tools",
    )
    parser.add_argument("file", metavar="FILE", type=Path, help="a file of JSON lines")
    parser.add_argument("--adapter", metavar="NAME", help="whose training they are for [none in particular]")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    options, settings = parse(parser, arguments)
    with _input(options.file) as lines, opened(settings, may_create=True) as database:
        store = TraceStore(
            database,
            redactor=_redactor(settings),
            held_out_share=settings.held_out_share,
            audit_share=settings.audit_share,
        )
        num_new = import_lines(store, ADMIN, lines, adapter=options.adapter)
    print(json.dumps({"num_new": num_new}) if options.json else f"{num_new} new traces")


@contextmanager
def _input(path: Path) -> Iterator[Iterator[str]]:
    """Raises ConfigError."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            with tqdm(total=size, unit="B", unit_scale=True, disable=None, dynamic_ncols=True) as bar:
                yield (_decoded(line, bar) for line in file)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None


def _decoded(line: bytes, bar: Any) -> str:
    """What is no UTF-8 stays for the reader of the lines, who says which one it is."""
    bar.update(len(line))
    return line.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")


def _redactor(settings: Settings) -> Redactor:
    return Redactor([RedactionRule(pattern) for pattern in settings.redact], secrets=settings.secrets)


def give_feedback(arguments: Sequence[str]) -> None:
    parser = Parser(
        "traces feedback",
        "Say what a trace, a response or an episode was worth.",
        "sterna traces feedback TRACE --score 1 --label checked",
    )
    parser.add_argument("id", metavar="ID", help="trace-..., ep-..., or the id of a response")
    parser.add_argument("--source", default="audit_sample", help="how it arose [audit_sample]")
    parser.add_argument("--score", type=float, help="0 (wrong) to 1 (right)")
    parser.add_argument("--label", help="a word of yours")
    parser.add_argument("--comment", metavar="TEXT", help="what there is to say")
    parser.add_argument("--correction", metavar="JSON", help="the assistant message that should have been the answer")
    parser.add_argument("--json", action="store_true", help="one JSON object, as POST /v1/traces/TRACE/feedback")
    options, settings = parse(parser, arguments)
    given = Feedback(
        source=options.source,
        score=options.score,
        correction=None if options.correction is None else _message(options.correction),
        label=options.label,
        comment=options.comment,
    )
    with opened(settings) as database:
        stored = FeedbackStore(database, redactor=_redactor(settings)).add(ADMIN, _target(options.id), given)
    said = "taken" if stored.is_new else "given before"
    print(json.dumps(taken_body(stored)) if options.json else f"{stored.id}: {said}")


def _target(text: str) -> Target:
    """Our ids say what they are of; a response's may be an upstream's."""
    kinds: dict[str, TargetKind] = {"trace-": "trace", "ep-": "episode"}
    return Target(next((kind for prefix, kind in kinds.items() if text.startswith(prefix)), "response"), text)


def _message(text: str) -> dict[str, Any]:
    try:
        message = json.loads(text)
    except ValueError as error:
        raise UsageError(f"--correction: not JSON: {error}") from None
    if not isinstance(message, dict):
        raise UsageError('--correction: expected an object such as {"role": "assistant", "content": "..."}')
    return message


def delete_traces(arguments: Sequence[str]) -> None:
    parser = Parser(
        "traces delete",
        "Delete what the filter finds, for good: content, feedback, everything but the ids.",
        "sterna traces delete --older-than 30d --yes",
    )
    parser.add_argument("--yes", action="store_true", help="without asking; only a terminal is asked")
    parser.add_argument("--json", action="store_true", help="one JSON object, as DELETE /v1/traces")
    add_filter(parser)
    options, settings = parse(parser, arguments)
    where = chosen_filter(options)
    if where.is_empty:
        raise UsageError("say which traces: --user-id, --key-id, --episode-id, --older-than or another filter")
    must_ask = sys.stdin.isatty() and not options.yes
    with opened(settings) as database:
        total = None
        if must_ask or sys.stderr.isatty():
            total = TraceQueries(database).stats(ADMIN, where)["num_traces"]
        if must_ask:
            print(f"Delete {total} traces for good? [y/N] ", end="", file=sys.stderr, flush=True)
            if sys.stdin.readline().strip().lower() not in ("y", "yes"):
                raise ConfigError("nothing was deleted")
        with tqdm(total=total, unit=" traces", disable=None, dynamic_ncols=True) as bar:
            deleted = TraceDeletion(database).delete(ADMIN, where, on_progress=bar.update)
        versions = Lineage(database).versions_that_saw(deleted)
    if options.json:
        print(json.dumps(deletion_body(len(deleted), versions)))
        return
    print(f"{len(deleted)} traces deleted")
    if versions:
        print(f"trained or tested on some of them: {', '.join(versions)}")
