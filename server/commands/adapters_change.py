"""The verbs of `sterna adapters` that change something: versions in and out, and from state to state.

A change that the registry took but this server cannot follow (a version that does not load) is printed and then a
failure: who promotes must learn that the old version still answers.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from server.adapters.version import VersionRef, check_adapter_name
from server.commands.adapters import adapter_path, make_parser, plain_text, run, version_path, version_ref
from server.commands.adapters_view import show_mark, show_summary
from server.commands.client import RemoteError, ServerClient, open_client
from server.commands.table import printable
from server.units import format_bytes

ZIP_TYPE = "application/zip"


def create_adapter(arguments: Sequence[str]) -> None:
    parser = make_parser("create", "A name that the base answers for until it has a live version.", "tools")
    parser.add_argument("name", metavar="NAME", help="the adapter; its traffic is what its versions will learn from")
    _add_reason(parser, "create")
    options = parser.parse_args(arguments)
    check_adapter_name(options.name)

    def show(adapter: Any) -> None:
        print(f"{options.name}: {'created' if adapter['is_new'] else 'is there already'}")

    run(options, lambda c: c.post("/v1/adapters", {"name": options.name, "reason": options.reason}), show)


def import_version(arguments: Sequence[str]) -> None:
    from server.commands.adapters_files import opened_for_import

    parser = make_parser("import", "A PEFT directory or zip file as a new version.", "tools ./checkpoint-100")
    parser.add_argument("name", metavar="NAME", help="the adapter; a new name begins a new one")
    parser.add_argument("path", metavar="PATH", type=Path, help="a PEFT directory, or a zip file of its files")
    parser.add_argument(
        "--base-digest", metavar="DIGEST", type=plain_text, help="of the base it was trained on, to be checked"
    )
    parser.add_argument(
        "--parent", metavar="VERSION", type=version_ref, help="the version that the training started from"
    )
    _add_reason(parser, "import")
    options = parser.parse_args(arguments)

    def ask(client: ServerClient) -> Any:
        with opened_for_import(options.path) as (file, num_bytes):
            return client.upload(
                adapter_path(options.name, "versions"),
                file,
                num_bytes,
                content_type=ZIP_TYPE,
                what=options.path.name,
                reason=options.reason,
                origin=printable(options.path.absolute().name)[:200],
                base_digest=options.base_digest,
                parent=None if options.parent is None else str(options.parent),
            )

    def show(version: Any) -> None:
        size, digest = format_bytes(version["size_bytes"]), version["digest"]
        said = "imported" if version["is_new"] else f"is this content already, {version['state']}"
        print(f"{version['version']}: {said}, rank {version['rank']}, {size}, {digest}")

    run(options, ask, show)


def export_version(arguments: Sequence[str]) -> None:
    parser = make_parser(
        "export", "A version as a PEFT zip file or directory, or for llama.cpp.", "tools@1 --gguf tools-1.gguf"
    )
    parser.add_argument("version", metavar="VERSION", help="tools@1; the name alone is its live version")
    parser.add_argument(
        "path", metavar="PATH", type=Path, nargs="?", help="of a .zip file, else of a directory [VERSION.zip]"
    )
    parser.add_argument(
        "--gguf", metavar="FILE", type=Path, help="instead: one file for llama.cpp's --lora, for the same base model"
    )
    options = parser.parse_args(arguments)
    if options.gguf is not None and options.path is not None:
        parser.error(f"two targets, {options.path} and --gguf {options.gguf}; an export has one")
    with open_client(options) as client:
        ref = VersionRef.parse(options.version) or _live_version(client, options.version)
        facts = client.get(version_path(ref))
        facts |= _save_gguf(client, ref, options.gguf) if options.gguf else _save_peft(client, ref, options.path)
    if options.json:
        print(json.dumps(facts))
        return
    print(f"{ref}: exported to {facts['path']}")
    if folded := facts.get("folded"):
        print(f"  matrices whose values hold a part of their scale, as a file has one alpha for all: {len(folded)}")


def _live_version(client: ServerClient, name: str) -> VersionRef:
    live = client.get(adapter_path(name))["live"]
    ref = None if live is None else VersionRef.parse(live)
    if ref is None:
        raise RemoteError(f"{name} has no live version; name one, such as {name}@1")
    return ref


def _save_peft(client: ServerClient, ref: VersionRef, path: Path | None) -> dict[str, Any]:
    from server.commands.adapters_files import written_to

    path = path or Path(f"{ref}.zip")
    with written_to(path) as file:
        client.download(version_path(ref, "export"), file, what=str(ref))
    return {"path": str(path)}


def _save_gguf(client: ServerClient, ref: VersionRef, path: Path) -> dict[str, Any]:
    from server.commands.adapters_files import folded_tensors, written_to

    with written_to(path, is_zip=False) as file:
        client.download(version_path(ref, "export"), file, what=str(ref), format="gguf")
        folded = folded_tensors(path, file)
    return {"path": str(path), "folded": folded}


def start_shadow(arguments: Sequence[str]) -> None:
    parser = make_parser("shadow", "Also run a version on a share of episodes, unseen.", "tools@1 --share 0.5")
    parser.add_argument("version", metavar="VERSION", type=version_ref)
    parser.add_argument("--share", type=_share, default=1.0, help="of the episodes, 0 to 1 [1]")
    _step(parser, "shadow", arguments, "share")


def start_canary(arguments: Sequence[str]) -> None:
    parser = make_parser("canary", "Let a version answer a share of episodes.", "tools@1 --share 0.1")
    parser.add_argument("version", metavar="VERSION", type=version_ref)
    parser.add_argument("--share", type=_share, required=True, help="of the episodes, 0 to 1")
    _step(parser, "canary", arguments, "share")


def promote(arguments: Sequence[str]) -> None:
    parser = make_parser("promote", "Make a version live.", "tools@1 --override --reason 'tested by hand'")
    parser.add_argument("version", metavar="VERSION", type=version_ref)
    parser.add_argument("--override", action="store_true", help="without a canary before it (a named human's right)")
    parser.add_argument(
        "--hold-back-share", type=_share, metavar="SHARE", help="of the episodes, that stay on the predecessor [0]"
    )
    _step(parser, "promote", arguments, "override", "hold_back_share")


def reject(arguments: Sequence[str]) -> None:
    parser = make_parser("reject", "A version will not go live.", "tools@1 --reason 'calls the wrong tool'")
    parser.add_argument("version", metavar="VERSION", type=version_ref)
    _step(parser, "reject", arguments)


def roll_back(arguments: Sequence[str]) -> None:
    parser = make_parser("rollback", "The predecessor of the live version (or the base) is live again.", "tools")
    parser.add_argument("name", metavar="NAME", help="an adapter")
    parser.add_argument("--to", type=int, metavar="NUMBER", help="a retired version's number [the predecessor]")
    _act(parser, "rollback", arguments, "to")


def set_share(arguments: Sequence[str]) -> None:
    parser = make_parser("share", "Change the share of episodes of a version by its state.", "tools canary 0.25")
    parser.add_argument("name", metavar="NAME", help="an adapter")
    parser.add_argument(
        "state", choices=("shadow", "canary", "live"), help="live: the share held back on its predecessor"
    )
    parser.add_argument("share", metavar="SHARE", type=_share, help="0 to 1")
    _act(parser, "shares", arguments, "state", "share")


def pin(arguments: Sequence[str]) -> None:
    _mark(make_parser("pin", "Keep a version from being deleted.", "tools@1"), "pin", arguments)


def unpin(arguments: Sequence[str]) -> None:
    _mark(make_parser("unpin", "A version may be deleted again.", "tools@1"), "unpin", arguments)


def delete_version(arguments: Sequence[str]) -> None:
    description = "Remove the files of a retired or rejected version; its history stays."
    _mark(make_parser("delete", description, "tools@1"), "delete", arguments)


def _step(parser: argparse.ArgumentParser, verb: str, arguments: Sequence[str], *fields: str) -> None:
    """A version from one state to another."""
    _add_reason(parser, verb)
    _add_expected_change(parser)
    options = parser.parse_args(arguments)
    _change(options, version_path(options.version, verb), options.version.adapter, fields)


def _act(parser: argparse.ArgumentParser, route: str, arguments: Sequence[str], *fields: str) -> None:
    """On an adapter as a whole."""
    _add_reason(parser, route.removesuffix("s"))
    _add_expected_change(parser)
    options = parser.parse_args(arguments)
    _change(options, adapter_path(options.name, route), options.name, fields)


def _change(options: argparse.Namespace, path: str, adapter: str, fields: Sequence[str]) -> None:
    body = {name: getattr(options, name) for name in ("reason", "expected_change", *fields)}
    failure: Any = None

    def ask(client: ServerClient) -> Any:
        nonlocal failure
        answer = client.post(path, body)
        failure = answer["serving"]["failure"]
        return answer

    run(options, ask, show_summary)
    if failure is not None:
        raise RemoteError(
            f"the registry has the change, but this server cannot load {failure['version']} and keeps its old route: "
            f"{failure['reason']}"
        )


def _mark(parser: argparse.ArgumentParser, verb: str, arguments: Sequence[str]) -> None:
    parser.add_argument("version", metavar="VERSION", type=version_ref)
    _add_reason(parser, verb)
    options = parser.parse_args(arguments)
    ref: VersionRef = options.version

    def ask(client: ServerClient) -> Any:
        if verb == "delete":
            return client.delete(version_path(ref), reason=options.reason)
        return client.post(version_path(ref, verb), {"reason": options.reason})

    run(options, ask, show_mark)


def _add_reason(parser: argparse.ArgumentParser, verb: str) -> None:
    default = f"sterna adapters {verb}"
    parser.add_argument("--reason", type=plain_text, default=default, help=f"for the history [{default}]")


def _add_expected_change(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--expected-change", type=int, metavar="NUMBER", help="do nothing if somebody changed the adapter since then"
    )


def _share(text: str) -> float:
    """For argparse."""
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:  # also false for NaN, which no JSON holds
        raise argparse.ArgumentTypeError(f"{text!r} is no share; it must be between 0 and 1")
    return share
