"""Argument parsing that all commands share: flags made from the settings, faults as exceptions of one line.

A flag's value reaches `load_settings` as text, so that bad values, unknown flags and bad entries of every other
source are reported together.
"""

import argparse
import difflib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from server.config import Settings, load_settings
from server.errors import ConfigError, UsageError


class Parser(argparse.ArgumentParser):
    """argparse that raises UsageError instead of printing its usage and exiting, and takes no abbreviations."""

    def __init__(self, command: str, description: str, example: str) -> None:
        super().__init__(
            prog=f"sterna {command}",
            description=description,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} ({self.prog} --help)")


def add_settings(parser: argparse.ArgumentParser, fields: Iterable[str] | None = None) -> None:
    """A flag for each field (all by default) and `--config`. Flags that were not given are absent afterwards."""
    group = parser.add_argument_group("settings", "also in sterna.toml (port = 8000) and as STERNA_PORT")
    for name in fields if fields is not None else Settings.model_fields:
        _add_flag(group, Settings.model_fields[name], name, "--" + name.replace("_", "-"), name)
    group.add_argument("--config", metavar="FILE", type=Path, help="a settings file [sterna.toml, if there is one]")


def add_model(parser: argparse.ArgumentParser) -> None:
    """MODEL by its place, in `--model`'s stead."""
    text = Settings.model_fields["model"].description
    parser.add_argument("model_in_place", metavar="MODEL", nargs="?", default=argparse.SUPPRESS, help=text)


def add_part_settings(
    parser: argparse.ArgumentParser, model: type[BaseModel], part: str, *, flag_prefix: str = ""
) -> None:
    """A flag for each field of another part's settings (server/config.py, `merge_settings`)."""
    group = parser.add_argument_group(
        f"settings of {part}", f"also in the table [{part}] of sterna.toml and as STERNA_{part.upper()}_..."
    )
    for name, field in model.model_fields.items():
        _add_flag(group, field, name, f"--{flag_prefix}{name}".replace("_", "-"), f"{part}_{name}")


def part_flags(options: argparse.Namespace, model: type[BaseModel], part: str) -> dict[str, Any]:
    """The flags of `add_part_settings` that were given, by field name."""
    given = vars(options)
    return {name: given[f"{part}_{name}"] for name in model.model_fields if f"{part}_{name}" in given}


def _add_flag(group: Any, field: FieldInfo, name: str, flag: str, dest: str) -> None:
    text = field.description or ""
    if field.default_factory is None and field.default not in (None, ()) and not text.endswith("]"):
        text += f" [{field.default}]"
    if field.annotation is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text, dest=dest)
    else:
        group.add_argument(
            flag, default=argparse.SUPPRESS, help=text, metavar=_metavar(name, field.annotation), dest=dest
        )


def parse_with_settings(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str],
    load_part: Callable[[argparse.Namespace], object] = lambda options: None,
) -> tuple[argparse.Namespace, Settings]:
    """Parse the line and merge all settings. Every problem, unknown flags included, is in one UsageError.

    `load_part` loads the settings of another part, for its problems.
    """
    options, unknown = parser.parse_known_args(arguments)
    problems = [_unknown(parser, text) for text in unknown]
    flags = {name: value for name, value in vars(options).items() if name in Settings.model_fields}
    if hasattr(options, "model_in_place"):
        if "model" in flags:
            problems.append(f"the model is given twice: {options.model_in_place} and --model {flags['model']}")
        flags["model"] = options.model_in_place
    settings = None
    try:
        settings = load_settings(flags, file=options.config)
    except ConfigError as error:
        problems.append(str(error))
    try:
        load_part(options)
    except ConfigError as error:
        problems.append(str(error))
    if problems or settings is None:
        raise UsageError("\n".join(dict.fromkeys(problems)))
    return options, settings


def _unknown(parser: argparse.ArgumentParser, text: str) -> str:
    if not text.startswith("-"):
        return f"{text}: one argument too many"
    flag = text.split("=", 1)[0]
    known = [option for action in parser._actions for option in action.option_strings]
    near = difflib.get_close_matches(flag, known, n=1)
    return f"{flag}: no such flag" + (f"; did you mean {near[0]}?" if near else "")


def _metavar(name: str, annotation: Any) -> str:
    """The choices of a Literal, else the last word of the name: PORT, SECONDS, MEMORY."""
    for candidate in (annotation, *get_args(annotation)):
        choices = get_args(candidate)
        if choices and all(isinstance(choice, str) for choice in choices):
            return "{" + ",".join(choices) + "}"
    return name.rsplit("_", 1)[-1].upper()
