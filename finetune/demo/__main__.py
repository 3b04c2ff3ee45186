"""`python -m finetune.demo`: see demo.py; `make demo` runs it. Writes into a folder, `build/demo/` by default."""

import argparse
import sys
import time
from pathlib import Path

from finetune.demo.demo import Options, run_demo
from finetune.demo.recipe import PLAIN
from finetune.errors import FinetuneError
from server.errors import SternaError


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m finetune.demo", description="The loop, on real tool-call traffic.")
    parser.add_argument("--folder", type=Path, default=None, help="where everything is left [build/demo/<time>]")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="as of `sterna serve` [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="of training and of the requests that no tool fits [0]")
    parser.add_argument("--no-plain", action="store_true", help="leave out the plain recipe, which the gate rejects")
    options = parser.parse_args()
    folder = options.folder or Path("build/demo") / time.strftime("%Y%m%d-%H%M%S")
    plain = None if options.no_plain else PLAIN
    try:
        result = run_demo(Options(folder=folder, model=options.model, seed=options.seed, plain=plain))
    except (FinetuneError, SternaError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    print((folder / "report.md").read_text())
    print(f"Report, picture and the rounds' pages are in {folder}")
    return 0 if result["is_live"] and not result["missed"] else 1


if __name__ == "__main__":
    sys.exit(main())
