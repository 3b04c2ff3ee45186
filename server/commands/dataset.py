"""`sterna dataset generate|report|score|card`: dialogues to train on, checked; a served model's answers, and its card.

What makes and checks them is in finetune/dataset/dialogues, imported when it is needed; only the card takes torch.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from tqdm import tqdm

from server.commands.arguments import Parser
from server.commands.client import add_remote
from server.commands.table import print_table
from server.commands.verbs import run_verb
from server.config import find_remote
from server.errors import SternaError, UsageError

PATIENCE_SECONDS = 30.0
"""With a server that is away: it may still be loading."""

USAGE = """\
usage: sterna dataset VERB ...

  generate   tool-calling dialogues as JSON lines: training, validation and held-out parts
  report     check a generated set: schemas, tool results, duplicates, balance, held-out parts; fails on a bad one
  score      ask a running server the held-out part and count right answers, beside simple baselines
  card       a finished run of `sterna train` and its scores as a folder to ship: model, learning curve, model card

example:
  sterna dataset generate ./dialogues --templates 3000 --seed 0 && sterna dataset report ./dialogues
"""


class DatasetFault(SternaError):
    """A named failure of the training room, or a set that does not pass."""


def main(arguments: Sequence[str]) -> int:
    return run_verb(
        "dataset", USAGE, {"generate": _generate, "report": _report, "score": _score, "card": _card}, arguments
    )


def _generate(arguments: Sequence[str]) -> None:
    parser = Parser(
        "dataset generate",
        "Tool-calling dialogues, five examples for each template. Equal options give equal bytes.",
        "sterna dataset generate ./dialogues --templates 3000 --seed 0",
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="to be made; it must not be there yet")
    parser.add_argument(
        "--templates", type=int, default=3000, metavar="N", help="templates of the training part [3000]"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="another seed, another set [0]")
    parser.add_argument("--thinking", action="store_true", help="say why in <think> before each call and answer")
    parser.add_argument(
        "--renamed",
        type=float,
        default=0.25,
        metavar="SHARE",
        help="of the training examples that offer tools under other names [0.25]",
    )
    parser.add_argument("--json", action="store_true", help="the manifest, as JSON")
    options = parser.parse_args(arguments)
    with _named_faults():
        from finetune.dataset.dialogues.generate import Options, generate

        wanted = Options(
            templates=options.templates, seed=options.seed, thinking=options.thinking, renamed=options.renamed
        )
        with tqdm(total=sum(wanted.counts.values()), unit=" templates", disable=None) as bar:
            manifest = generate(options.folder, wanted, on_template=lambda: bar.update() and None)
    if options.json:
        print(json.dumps(manifest))
        return
    print_table(("FILE", "ROWS"), [(name, f"{one['rows']:,}") for name, one in manifest["files"].items()])
    print(f"{options.folder}: {manifest['digest']}")


def _report(arguments: Sequence[str]) -> None:
    parser = Parser(
        "dataset report",
        "Check a generated set. Exit code 1 when a check fails.",
        "sterna dataset report ./dialogues --json",
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="what `sterna dataset generate` made")
    parser.add_argument("--json", action="store_true", help="every number, as JSON")
    options = parser.parse_args(arguments)
    with _named_faults():
        from finetune.dataset.dialogues.quality import report

        with tqdm(unit=" lines", disable=None) as bar:
            found = report(options.folder, on_line=lambda: bar.update() and None)
    body = found.body()
    if options.json:
        print(json.dumps(body))
    else:
        _print_tables(body)
    if not found.ok:
        failed = [check.name for check in found.checks if check.num_bad]
        raise DatasetFault(f"{options.folder} is not fit to train on: {', '.join(failed)}")


def _score(arguments: Sequence[str]) -> None:
    parser = Parser(
        "dataset score",
        "Ask a running server every turn of a set's held-out part, greedily and unconstrained, and count what is\n"
        "right: tools, arguments, form, no call where none is needed. Each part beside always-call, never-call and\n"
        "the nearest training example. Intervals are 95 %, with templates as clusters.",
        "sterna dataset score ./dialogues --limit 200",
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="what `sterna dataset generate` made")
    parser.add_argument("--model", help="as requests name it [the server's base]")
    parser.add_argument("--limit", type=int, metavar="N", help="dialogues of each part, always the same ones [all]")
    parser.add_argument("--concurrency", type=int, default=8, metavar="N", help="requests at once [8]")
    parser.add_argument("--json", action="store_true", help="every number, as JSON")
    add_remote(parser)
    options = parser.parse_args(arguments)
    for name in ("limit", "concurrency"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise UsageError(f"--{name} is at least 1, not {getattr(options, name)}")
    remote = find_remote(options.url, options.api_key)
    with _named_faults():
        from finetune.dataset.dialogues.evaluate import evaluate
        from finetune.serving.api import ServerApi
        from finetune.serving.http import Http

        http = Http(remote, patience_seconds=PATIENCE_SECONDS)
        with closing(http), tqdm(unit=" turns", disable=None) as bar:
            body = evaluate(
                options.folder,
                ServerApi(http),
                model=options.model,
                limit=options.limit,
                concurrency=options.concurrency,
                on_turn=lambda: bar.update() and None,
            )
    if options.json:
        print(json.dumps(body))
        return
    columns = list(body["scores"])
    print_table(
        ("PART", "METRIC", "TURNS", "95 %", *(name.replace("_", " ").upper() for name in columns)),
        [
            (part, metric.replace("_", " "), one["num"], f"{one['lower']:.1%} - {one['upper']:.1%}",
             *(f"{body['scores'][name][part][metric]['share']:.1%}" for name in columns))
            for part, metrics in body["scores"][columns[0]].items() if "/" not in part
            for metric, one in metrics.items()
        ],
    )  # fmt: skip


def _card(arguments: Sequence[str]) -> None:
    parser = Parser(
        "dataset card",
        "A finished run of `sterna train` as a folder to ship: its model and learning curve, and a README.md with how\n"
        "it was made and what it reaches.",
        "sterna dataset card ./dialogues ./nano models/my-nano --scores scores.json",
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="the data set that it was trained on")
    parser.add_argument("run", metavar="RUN", type=Path, help="the folder of `sterna train`")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to ship; its name is the model's")
    parser.add_argument(
        "--scores", metavar="FILE", type=Path, required=True, help="what `sterna dataset score --json` printed"
    )
    options = parser.parse_args(arguments)
    with _named_faults():
        from finetune.extra import check_extra

        check_extra()
        from finetune.qat.card import write_card

        write_card(options.folder, options.run, options.scores, options.out)
    print(options.out / "README.md")


def _print_tables(body: dict) -> None:
    parts = body["parts"]
    print_table(
        ("PART", "ROWS", "TEMPLATES", "FAMILIES", "TOOL USED", "NO TOOL", "TOOL ERROR", "MULTI TOOL", "P95 CHARACTERS"),
        [
            (name, f"{one['rows']:,}", f"{one['templates']:,}", len(one["families"]),
             *(f"{one['kinds'].get(kind, 0) / one['rows']:.1%}" for kind in
               ("tool_used", "no_tool", "tool_error", "multi_tool")),
             one["request_characters"]["p95"])
            for name, one in parts.items()
        ],
    )  # fmt: skip
    print()
    print_table(
        ("CHECK", "", "DETAIL"),
        [
            (check["name"], "ok" if check["ok"] else f"{check['num_bad']:,} bad", check["detail"])
            for check in body["checks"]
        ],
    )


@contextmanager
def _named_faults() -> Iterator[None]:
    """The training room's failures as the server room's, which the command line knows."""
    from finetune.errors import FinetuneError

    try:
        yield
    except FinetuneError as error:
        raise DatasetFault(str(error)) from error
