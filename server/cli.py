"""The `sterna` command: picks the sub-command, runs it, and turns named failures into one line and an exit code.

Results go to standard output, faults to standard error. Exit codes: 0 done, 1 it could not be done, 2 the command
line is wrong, 130 interrupted. Sub-commands are imported when chosen, so that `sterna --help` loads none of them.
"""

import importlib
import os
import sys
from collections.abc import Sequence

from quant.errors import ModelFileError
from server.errors import SternaError, UsageError

COMMANDS = {
    "up": "serve, and learn from what is asked, under one supervisor",
    "serve": "serve a model to OpenAI clients",
    "models": "list, pull, locate and inspect models",
    "generate": "answer one prompt on the terminal",
    "adapters": "import, compare, promote and roll back adapter versions",
    "traces": "list, show, export, import, judge and delete what was asked and answered",
    "keys": "create, list and revoke API keys",
    "dataset": "make tool-calling dialogues to train on, and check them",
    "train": "train a ternary model from dialogues and write its GGUF file",
    "finetune": "learn from the log beside a running server; rounds and their reports",
    "quantize": "write a model as a GGUF file of another type",
    "bench": "measure the engine: prefill and decode",
}

USAGE = """\
usage: sterna COMMAND ...

An OpenAI-compatible server for ternary and 4-bit language models.

commands:
{commands}

options:
  -h, --help  this text, or a command's: sterna serve --help
  --version   the version

example:
  sterna models pull smollm2-135m-instruct && sterna serve
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code; only an unforeseen error, a bug, leaves a traceback."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _dispatch(arguments)
        sys.stdout.flush()
        return code
    except UsageError as error:
        return _fault(error, 2)
    except (SternaError, ModelFileError) as error:
        return _fault(error, 1)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of a pipe has gone, as in `sterna models list | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the exit's flush must not fail again
        return 1


def _dispatch(arguments: list[str]) -> int:
    name = arguments[0] if arguments else None
    if name in ("-h", "--help", "help"):
        print(USAGE.format(commands="\n".join(f"  {name:<10}{text}" for name, text in COMMANDS.items())), end="")
        return 0
    if name == "--version":
        from importlib.metadata import version

        print(f"sterna {version('sterna')}")
        return 0
    if name not in COMMANDS:
        said = f"no command {name!r}" if name else "a command is missing"
        raise UsageError(f"{said}; there are {', '.join(COMMANDS)} (sterna --help)")
    return int(importlib.import_module(f"server.commands.{name}").main(arguments[1:]))


def _fault(error: Exception, code: int) -> int:
    for line in str(error).splitlines():
        print(f"sterna: {line}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
