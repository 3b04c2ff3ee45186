"""`sterna traces ...`: what is in the log, straight from the database of the settings, whoever asked.

With `--json` a verb prints what the HTTP API answers. Not here: the verbs that move, judge or delete traces
(traces_move.py), the flags that choose some (traces_filter.py), and how a trace is shown to people (traces_text.py).
"""

import json
import sys
from collections.abc import Sequence

from server.admin.trace_views import lineage_body, page_body, stats_body, trace_body
from server.commands.arguments import Parser
from server.commands.database import opened, parse
from server.commands.table import print_table
from server.commands.traces_filter import add_filter, chosen_filter
from server.commands.traces_move import delete_traces, export_traces, give_feedback, import_traces
from server.commands.traces_text import LIST_HEADER, list_row, total_rows, transcript
from server.commands.verbs import run_verb
from server.errors import ConfigError
from server.traces.filters import TraceFilter
from server.traces.lineage import Lineage
from server.traces.queries import MAX_PAGE, TraceQueries
from server.traces.viewer import ADMIN

LINEAGE_HEADER = ("snapshot", "part", "versions")
USAGE = """\
usage: sterna traces VERB ...

  list      the newest traces, or those that a filter finds
  show      one trace as a transcript
  lineage   the snapshots that hold a trace, and the versions that saw it
  stats     totals
  export    as JSON lines in OpenAI's fine-tuning format
  import    from such a file
  feedback  say what a trace or an episode was worth
  delete    for good

example:
  sterna traces list --has-tool-error --since 7d
"""


def main(arguments: Sequence[str]) -> int:
    verbs = {
        "list": _list,
        "show": _show,
        "lineage": _lineage,
        "stats": _stats,
        "export": export_traces,
        "import": import_traces,
        "feedback": give_feedback,
        "delete": delete_traces,
    }
    return run_verb("traces", USAGE, verbs, arguments)


def _list(arguments: Sequence[str]) -> None:
    parser = Parser("traces list", "Traces, the newest first.", "sterna traces list --limit 20 --since 7d")
    parser.add_argument("--limit", type=int, default=50, metavar="N", help=f"at most so many, 1 to {MAX_PAGE} [50]")
    parser.add_argument("--before", type=int, metavar="NUMBER", help="the page after the one that ended with this")
    parser.add_argument("--json", action="store_true", help="one JSON object, as GET /v1/traces")
    add_filter(parser)
    options, settings = parse(parser, arguments)
    where = chosen_filter(options)
    with opened(settings) as database:
        page = TraceQueries(database).list(ADMIN, where, limit=options.limit, before=options.before)
    if options.json:
        print(json.dumps(page_body(page)))
        return
    print_table(LIST_HEADER, [list_row(trace) for trace in page.traces])
    if page.next_before is not None:
        print(f"older ones: --before {page.next_before}", file=sys.stderr)


def _show(arguments: Sequence[str]) -> None:
    parser = Parser("traces show", "One trace: what was asked, answered, and became of it.", "sterna traces show")
    parser.add_argument("trace", metavar="TRACE", nargs="?", help="its id [the newest trace]")
    parser.add_argument("--json", action="store_true", help="one JSON object, as GET /v1/traces/TRACE")
    options, settings = parse(parser, arguments)
    with opened(settings) as database:
        queries = TraceQueries(database)
        newest = queries.list(ADMIN, TraceFilter(), limit=1).traces if options.trace is None else ()
        if options.trace is None and not newest:
            raise ConfigError("there are no traces yet")
        trace = queries.show(ADMIN, options.trace or newest[0].id)
    print(json.dumps(trace_body(trace)) if options.json else transcript(trace))


def _lineage(arguments: Sequence[str]) -> None:
    parser = Parser(
        "traces lineage",
        "Which snapshots hold a trace and which versions saw it, also when it was deleted.",
        "sterna traces lineage TRACE",
    )
    parser.add_argument("trace", metavar="TRACE", help="its id")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    options, settings = parse(parser, arguments)
    with opened(settings) as database:
        seen = Lineage(database).sightings(options.trace)
    if options.json:
        print(json.dumps(lineage_body(options.trace, seen)))
    else:
        print_table(LINEAGE_HEADER, [[one.snapshot, one.part, " ".join(one.versions)] for one in seen])


def _stats(arguments: Sequence[str]) -> None:
    parser = Parser("traces stats", "Totals over the traces that a filter finds.", "sterna traces stats --since 7d")
    parser.add_argument("--json", action="store_true", help="one JSON object, as GET /v1/traces/stats")
    add_filter(parser)
    options, settings = parse(parser, arguments)
    where = chosen_filter(options)
    with opened(settings) as database:
        totals = TraceQueries(database).stats(ADMIN, where)
    if options.json:
        print(json.dumps(stats_body(totals)))
    else:
        print_table(None, total_rows(totals))
