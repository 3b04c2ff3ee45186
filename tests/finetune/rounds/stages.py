"""Stand-ins for the phases: they leave files, depend on what the phases before left, and can die anywhere.

Run as a program, it takes the unfinished round of "tools" in DATABASE to its end; STERNA_TEST_DIE is the number of the
step before which it kills itself.
"""

import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from finetune.rounds.engine import Done, Over, RoundEngine, Stage, Task
from finetune.rounds.lease import held
from finetune.rounds.round import Phase, Result, Round
from finetune.rounds.store import RoundStore
from server.storage.database import Database, open_database

NUM_STEPS = 6
Step = Callable[[], None]


class Watcher:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.phases: list[str] = []
        self.progress: list[tuple[int, int]] = []

    def on_phase(self, round: Round) -> None:
        self.phases.append(str(round.result or round.phase))

    def on_progress(self, round: Round, num_done: int, num_in_all: int, **values: float) -> None:
        self.progress.append((num_done, num_in_all))


def stages(step: Step = lambda: None) -> dict[Phase, Stage]:
    """`step` is called at every instruction that counts."""

    def snapshot(task: Task) -> Done:
        step()
        text = f"traces up to {task.round.last_seq} under {json.dumps(task.round.settings)}"
        (task.folder / "snapshot").write_text(text)
        step()
        return Done({"num_train": 3}, {"snapshot": digest(text)})

    def train(task: Task) -> Done:
        text = (task.folder / "snapshot").read_text()
        path = task.folder / "steps"
        done = path.read_text().split() if path.exists() else []
        for number in range(len(done), NUM_STEPS):
            step()
            task.check()
            done.append(digest(f"{text} {done} {number}")[7:19])
            new = task.folder / "steps.new"
            new.write_text(" ".join(done))
            new.replace(path)
            task.progress(number + 1, NUM_STEPS, loss=1.0)
        return Done({"last": done[-1]})

    def export(task: Task) -> Done:
        step()
        (task.folder / "adapter").write_text((task.folder / "steps").read_text())
        return Done({})

    def take_in(task: Task) -> Done:
        step()
        task.note({"content": digest((task.folder / "adapter").read_text())})
        step()
        return Done({}, {"version": 1})

    def gate(task: Task) -> Done:
        step()
        return Done({}, {"decision": {"outcome": "promote", "content": task.round.facts["import"]["content"]}})

    def promote(task: Task) -> Over:
        step()
        assert task.round.decision is not None
        return Over(Result.CANARY, f"content {task.round.decision['content']}")

    return dict(zip(Phase, (snapshot, train, export, take_in, gate, promote), strict=True))


def digest(text: str) -> str:
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def engine(
    database: Database,
    root: Path,
    work: Mapping[Phase, Stage] | None = None,
    *,
    deleted: Callable[[str], list[str]] = lambda digest: [],
    abandoned: list[str] | None = None,
    **options: Any,
) -> tuple[RoundEngine, Watcher]:
    watcher = Watcher()
    made = RoundEngine(
        RoundStore(database),
        work or stages(),
        root,
        deleted_from=deleted,
        abandon=lambda round, reason: (abandoned if abandoned is not None else []).append(reason),
        observer=watcher,
        **options,
    )
    return made, watcher


def main() -> None:
    url, root = sys.argv[1:]
    left = int(os.environ["STERNA_TEST_DIE"])

    def step() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    database = open_database(url)
    store = RoundStore(database)
    with held(database, "tools") as lease:
        round = store.unfinished("tools")
        assert round is not None
        engine(database, Path(root), stages(step))[0].run(lease, round)
    database.close()


if __name__ == "__main__":
    main()
