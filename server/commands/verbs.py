"""Commands with verbs (`sterna traces list`): run the one that is named, or say which there are."""

from collections.abc import Callable, Mapping, Sequence

from server.errors import UsageError


def run_verb(
    command: str, usage: str, verbs: Mapping[str, Callable[[Sequence[str]], object]], arguments: Sequence[str]
) -> int:
    """The exit code. `usage` is what `sterna COMMAND --help` prints."""
    verb = arguments[0] if arguments else None
    if verb in ("-h", "--help"):
        print(usage, end="")
        return 0
    if verb is None or verb not in verbs:
        said = f"no verb {verb!r}" if verb else "a verb is missing"
        raise UsageError(f"{said}; there are {', '.join(verbs)} (sterna {command} --help)")
    verbs[verb](arguments[1:])
    return 0
