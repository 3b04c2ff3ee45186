"""`sterna models list|pull|path|inspect`: the catalogue and the cache of models."""

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

from server.commands.arguments import Parser, add_settings, parse_with_settings
from server.commands.table import print_table
from server.commands.verbs import run_verb
from server.config import DEFAULT_MODEL, Settings
from server.models.catalog import find_entry, load_catalog, pulled_path, resolve_model
from server.units import format_bytes

USAGE = f"""\
usage: sterna models VERB ...

  list      the catalogue, and which models are in the cache
  pull      download a model into the cache
  path      print the file's path, alone
  inspect   what is in a model: sizes, tensor types, tokenizer

example:
  sterna models pull {DEFAULT_MODEL}
"""


def main(arguments: Sequence[str]) -> int:
    verbs = {"list": _list, "pull": _pull, "path": _path, "inspect": _inspect}
    return run_verb("models", USAGE, verbs, arguments)


def _list(arguments: Sequence[str]) -> None:
    parser = Parser("models list", "The models that can be pulled by name.", "sterna models list --json")
    parser.add_argument("--json", action="store_true", help="one JSON array")
    options, settings = _parse(parser, arguments)
    rows: list[dict[str, Any]] = [
        {
            "name": entry.name,
            "architecture": entry.architecture,
            "quantization": entry.quantization,
            "size_bytes": entry.size_bytes,
            "license": entry.license,
            "sha256": entry.sha256,
            "sources": [str(source) for source in entry.sources],
            "path": str(pulled_path(entry, settings.cache_dir) or "") or None,
        }
        for entry in load_catalog().values()
    ]
    if options.json:
        print(json.dumps(rows))
        return
    print_table(
        ("name", "architecture", "type", "size", "license", "pulled"),
        [
            (row["name"], row["architecture"], row["quantization"], format_bytes(row["size_bytes"]), row["license"],
             "yes" if row["path"] else "no")
            for row in rows
        ],
    )  # fmt: skip


def _pull(arguments: Sequence[str]) -> None:
    from server.commands.progress import Bar
    from server.models.pull import pull_model

    parser = Parser("models pull", "Download a model into the cache.", f"sterna models pull {DEFAULT_MODEL}")
    parser.add_argument("name", metavar="NAME", help="a name from `sterna models list`")
    options, settings = _parse(parser, arguments)
    signal.signal(signal.SIGTERM, _exit_cleanly)
    path, was_fetched = pull_model(find_entry(options.name), settings.cache_dir, Bar())
    print(f"{options.name}: {'pulled into' if was_fetched else 'already in'} {path}")


def _path(arguments: Sequence[str]) -> None:
    parser = Parser("models path", "Print where a model lies, and nothing else.", f"sterna models path {DEFAULT_MODEL}")
    parser.add_argument("model", metavar="NAME", help="a pulled model, a .gguf file or a Hugging Face directory")
    options, settings = _parse(parser, arguments)
    print(resolve_model(options.model, settings.cache_dir).path)


def _inspect(arguments: Sequence[str]) -> None:
    from server.models.inspect import inspect_model

    parser = Parser("models inspect", "What is in a model.", f"sterna models inspect {DEFAULT_MODEL}")
    parser.add_argument("model", metavar="NAME", help="a pulled model, a .gguf file or a Hugging Face directory")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    options, settings = _parse(parser, arguments)
    found = inspect_model(resolve_model(options.model, settings.cache_dir).path)
    if options.json:
        print(json.dumps(found))
        return
    types, tokenizer = found.pop("tensor_types"), found.pop("tokenizer")
    facts: list[tuple[Any, ...]] = [(key.replace("_", " "), value) for key, value in found.items()]
    facts += [(f"tokenizer {key.replace('_', ' ')}", value) for key, value in tokenizer.items()]
    print_table(None, facts)
    print()
    print_table(
        ("tensor type", "tensors", "parameters", "size"),
        [(row["type"], row["num_tensors"], row["num_parameters"], format_bytes(row["bytes"])) for row in types],
    )


def _parse(parser: Parser, arguments: Sequence[str]) -> tuple[argparse.Namespace, Settings]:
    add_settings(parser, ["cache_dir"])
    return parse_with_settings(parser, arguments)


def _exit_cleanly(signum: int, frame: FrameType | None) -> None:
    """SIGTERM unwinds the stack like Ctrl-C, so that what was half downloaded is removed."""
    sys.exit(128 + signum)
