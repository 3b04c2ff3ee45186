"""`sterna keys create|list|revoke`: the API keys, straight in the database of the settings.

A running server sees a new key, and a revocation, within five seconds.
"""

import json
import sys
from collections.abc import Sequence
from typing import Any

from server.commands.arguments import Parser
from server.commands.database import opened, parse
from server.commands.table import print_table
from server.commands.traces_text import local_time
from server.commands.verbs import run_verb
from server.keys.keys import SCOPES, ApiKey, Keys

USAGE = """\
usage: sterna keys VERB ...

  create    make an API key, and print it this once
  list      the keys, without their text
  revoke    make a key invalid, for good

From the first key on, every request needs one.

example:
  sterna keys create agents --scope inference --scope feedback
"""


def main(arguments: Sequence[str]) -> int:
    return run_verb("keys", USAGE, {"create": _create, "list": _list, "revoke": _revoke}, arguments)


def _create(arguments: Sequence[str]) -> None:
    parser = Parser(
        "keys create",
        "Make an API key. Its text is printed, alone, this once: only a digest of it is kept.",
        "sterna keys create agents --scope inference --scope feedback --trace-policy off",
    )
    parser.add_argument("name", metavar="NAME", help="what people call it")
    parser.add_argument(
        "--scope",
        action="append",
        metavar="{" + ",".join(SCOPES) + "}",
        help="what it may do; give it several times [inference and feedback]",
    )
    parser.add_argument(
        "--trace-policy", default="on", metavar="{on,off}", help="off: its requests are not logged [on]"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")
    options, settings = parse(parser, arguments)
    scopes = options.scope or ("inference", "feedback")
    with opened(settings, may_create=True) as database:
        key, text = Keys(database).create(options.name, scopes, trace_policy=options.trace_policy)
    if options.json:
        print(json.dumps(_body(key) | {"key": text}))
        return
    print(text)
    print(f"{key.id} '{key.name}' ({_scopes(key)}); the key is not shown again", file=sys.stderr)


def _list(arguments: Sequence[str]) -> None:
    parser = Parser("keys list", "The API keys, in the order in which they were made.", "sterna keys list --all")
    parser.add_argument("--all", action="store_true", help="also those that were revoked")
    parser.add_argument("--json", action="store_true", help="one JSON array")
    options, settings = parse(parser, arguments)
    with opened(settings) as database:
        keys = Keys(database).list(with_revoked=options.all)
    if options.json:
        print(json.dumps([_body(key) for key in keys]))
        return
    rows = [
        (key.id, key.name, _scopes(key), key.trace_policy, local_time(key.created_at),
         local_time(key.revoked_at) if key.revoked_at else "")
        for key in keys
    ]  # fmt: skip
    print_table(("id", "name", "scopes", "traces", "created", "revoked"), rows)


def _revoke(arguments: Sequence[str]) -> None:
    parser = Parser("keys revoke", "Make a key invalid, for good.", "sterna keys revoke KEY")
    parser.add_argument("key", metavar="KEY", help="its id, from `sterna keys list`")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    options, settings = parse(parser, arguments)
    with opened(settings) as database:
        key = Keys(database).revoke(options.key)
    print(json.dumps(_body(key)) if options.json else f"{key.id} '{key.name}' is revoked")


def _scopes(key: ApiKey) -> str:
    return ", ".join(scope for scope in SCOPES if scope in key.scopes)


def _body(key: ApiKey) -> dict[str, Any]:
    return {
        "id": key.id,
        "name": key.name,
        "scopes": [scope for scope in SCOPES if scope in key.scopes],
        "trace_policy": key.trace_policy,
        "created_at": key.created_at.isoformat(),
        "revoked_at": None if key.revoked_at is None else key.revoked_at.isoformat(),
    }
