"""The flags that choose traces: one for each field of the filter, named as in the HTTP API's query."""

import argparse

from server.errors import InvalidRequestError, UsageError
from server.traces.filter_text import FILTER_CHOICES, FILTER_TEXTS, read_filter
from server.traces.filters import TraceFilter

_YES_NO = ("true", "false")


def add_filter(parser: argparse.ArgumentParser) -> None:
    """`--has-tool-calls` and its like also exist with `--no-`."""
    group = parser.add_argument_group("which traces", "all of these must hold")
    for name, text in FILTER_TEXTS.items():
        flags = ["--" + name.replace("_", "-"), *(["--older-than"] if name == "until" else [])]
        choices = FILTER_CHOICES.get(name)
        if choices == _YES_NO:
            group.add_argument(*flags, action=argparse.BooleanOptionalAction, help=text)
            continue
        kind = "TIME" if name in ("since", "until") else name.removesuffix("_id").upper()
        metavar = kind if choices is None else "{" + ",".join(choices) + "}"
        group.add_argument(*flags, dest=name, metavar=metavar, help=text)


def chosen_filter(options: argparse.Namespace) -> TraceFilter:
    """Times without a zone are this machine's. Raises UsageError."""
    given = {name: getattr(options, name) for name in FILTER_TEXTS}
    texts = {name: str(value).lower() if isinstance(value, bool) else value for name, value in given.items()}
    try:
        return read_filter({name: text for name, text in texts.items() if text is not None}, zone=None)
    except InvalidRequestError as error:
        raise UsageError(f"--{str(error.param).replace('_', '-')}: {error}") from None
