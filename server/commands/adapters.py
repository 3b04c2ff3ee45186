"""`sterna adapters VERB`: the adapter registry of a running server, over its admin API (/v1/adapters).

This module has the verbs that read; those that change something are in adapters_change.py, the printing for people in
adapters_view.py. Every verb prints the API's own JSON with `--json`.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from typing import Any

from server.adapters.version import VersionRef, check_adapter_name
from server.commands.arguments import Parser
from server.commands.client import ServerClient, add_remote, open_client
from server.commands.verbs import run_verb

USAGE = """\
usage: sterna adapters VERB ...

  list      the adapters, and who answers for each
  show      one adapter with its versions, or one version (tools, tools@2)
  history   every change of an adapter: when, what, why and who asked
  create    a name that the base answers for until a version is live
  import    a PEFT directory or zip file as a new version
  export    a version as a zip file, a directory, or a GGUF file for llama.cpp
  diff      how two versions differ
  shadow    also run a version on a share of episodes, unseen
  canary    let a version answer a share of episodes
  share     change a share
  promote   make a version live
  reject    a version will not go live
  rollback  the predecessor of the live version is live again
  pin       keep a version from being deleted
  unpin     no longer
  delete    remove the files of a retired or rejected version

example:
  sterna adapters import tools ./checkpoint-100 && sterna adapters canary tools@1 --share 0.1
"""

Show = Callable[[Any], None]


def main(arguments: Sequence[str]) -> int:
    from server.commands import adapters_change as change

    verbs: dict[str, Callable[[Sequence[str]], None]] = {
        "list": _list,
        "show": _show,
        "history": _history,
        "create": change.create_adapter,
        "import": change.import_version,
        "export": change.export_version,
        "diff": _diff,
        "shadow": change.start_shadow,
        "canary": change.start_canary,
        "share": change.set_share,
        "promote": change.promote,
        "reject": change.reject,
        "rollback": change.roll_back,
        "pin": change.pin,
        "unpin": change.unpin,
        "delete": change.delete_version,
    }
    return run_verb("adapters", USAGE, verbs, arguments)


def make_parser(verb: str, description: str, example: str) -> Parser:
    parser = Parser(f"adapters {verb}", description, f"sterna adapters {verb} {example}".rstrip())
    parser.add_argument("--json", action="store_true", help="what the server answered, as JSON")
    add_remote(parser)
    return parser


def run(options: argparse.Namespace, ask: Callable[[ServerClient], Any], show: Show) -> None:
    """Ask the server and print what it answers."""
    with open_client(options) as client:
        answer = ask(client)
    if options.json:
        print(json.dumps(answer))
    else:
        show(answer)


def adapter_path(name: str, *rest: str) -> str:
    """Raises AdapterError for what is no name: it would be part of the path."""
    return "/".join(["/v1/adapters", check_adapter_name(name), *rest])


def version_path(ref: VersionRef, *rest: str) -> str:
    return adapter_path(ref.adapter, "versions", str(ref.number), *rest)


def version_ref(text: str) -> VersionRef:
    """For argparse."""
    ref = VersionRef.parse(text)
    if ref is None:
        raise argparse.ArgumentTypeError(f"{text!r} names no version; a version is called like tools@2")
    return ref


def plain_text(text: str) -> str:
    """For argparse: what can be sent as JSON."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{text!a} is not UTF-8 text") from None
    return text


def _list(arguments: Sequence[str]) -> None:
    from server.commands.adapters_view import show_list

    options = make_parser("list", "The adapters, and who answers for each.", "--json").parse_args(arguments)
    run(options, lambda client: client.get("/v1/adapters")["data"], show_list)


def _show(arguments: Sequence[str]) -> None:
    from server.commands.adapters_view import show_adapter, show_version

    parser = make_parser("show", "One adapter with its versions, or one version.", "tools")
    parser.add_argument("name", metavar="NAME", help="an adapter (tools) or a version (tools@2)")
    options = parser.parse_args(arguments)
    ref = VersionRef.parse(options.name)
    path = adapter_path(options.name) if ref is None else version_path(ref)
    run(options, lambda client: client.get(path), show_adapter if ref is None else show_version)


def _history(arguments: Sequence[str]) -> None:
    from server.commands.adapters_view import show_history

    parser = make_parser("history", "Every change of an adapter, the newest first.", "tools --limit 20")
    parser.add_argument("name", metavar="NAME", help="an adapter")
    parser.add_argument("--limit", type=int, help="so many changes at most [1000]")
    options = parser.parse_args(arguments)
    path = adapter_path(options.name, "history")
    run(options, lambda client: client.get(path, limit=options.limit)["data"], show_history)


def _diff(arguments: Sequence[str]) -> None:
    from server.commands.adapters_view import show_diff

    parser = make_parser(
        "diff", "How two versions differ: in configuration, and in how they change the base.", "tools@1 tools@2"
    )
    parser.add_argument("left", metavar="VERSION", type=version_ref)
    parser.add_argument("right", metavar="VERSION", type=version_ref)
    parser.add_argument("--layers", action="store_true", help="a line for each matrix of each layer")
    options = parser.parse_args(arguments)
    path = version_path(options.left, "diff")
    run(
        options, lambda client: client.get(path, other=str(options.right)), lambda diff: show_diff(diff, options.layers)
    )
