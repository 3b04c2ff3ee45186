"""Several demonstrations as one table, for the recorded long run: mean and range over the seeds.

for seed in 0 1 2; do python -m finetune.demo --seed $seed --folder build/demo/seed-$seed; done
python -m finetune.demo.summary build/demo/seed-*/result.json
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import TypeAdapter

from finetune.demo.results import Row, mean_of_runs

_ROWS: TypeAdapter[list[Row]] = TypeAdapter(list[Row])


def summary(paths: Sequence[Path]) -> str:
    """Markdown."""
    results = [json.loads(path.read_text()) for path in paths]
    lines = [f"- seed {one['seed']}: {one['result']}, live: {one['is_live']}" for one in results]
    lines += [
        f"- seed {one['seed']}: plain recipe {one['plain_result']}"
        for one in results
        if one["plain_result"] is not None
    ]
    return "\n".join([mean_of_runs([_ROWS.validate_python(one["rows"]) for one in results]), *lines]) + "\n"


def main() -> int:
    if not sys.argv[1:]:
        print("usage: python -m finetune.demo.summary RESULT.json ...", file=sys.stderr)
        return 2
    print(summary([Path(name) for name in sys.argv[1:]]), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
