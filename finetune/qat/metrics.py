"""What a run tells while it trains: a line every so many steps, and the same numbers as JSON lines in its folder.

    step 120/4000  loss 1.2340  rate 2.0e-03  norm 0.56  12,345 tok/s  entropy 0.78  held out 1.301 (68.2 %)

A step that a resumed run did again is there twice; the last one counts, and both are the same. A torn last line is what
a kill left; it is cut off. Not here: the picture (picture.py).
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetune.errors import TrainingError


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    num_tokens: int
    """Since the line before, as are the next two."""
    tokens_per_second: float
    entropy: float
    share: float
    """Of ternary weights."""
    stage: str | None = None
    held_out_loss: float | None = None
    held_out_accuracy: float | None = None

    def text(self, num_steps: int) -> str:
        parts = [
            f"step {self.step}/{num_steps}",
            f"loss {self.loss:.4f}",
            f"rate {self.learning_rate:.1e}",
            f"norm {self.grad_norm:.2f}",
            f"{self.tokens_per_second:,.0f} tok/s",
            f"entropy {self.entropy:.3f}",
        ]
        if self.share < 1:
            parts.append(f"ternary {self.share:.0%}")
        if self.held_out_loss is not None and self.held_out_accuracy is not None:
            parts.append(f"held out {self.held_out_loss:.4f} ({self.held_out_accuracy:.1%})")
        return "  ".join(([self.stage] if self.stage else []) + parts)


class Metrics:
    """The lines of one run. `say`: where they go for people."""

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self._path, self._say = path, say
        if path.exists():
            whole, newline, _ = path.read_bytes().rpartition(b"\n")
            with path.open("r+b") as file:
                file.truncate(len(whole) + len(newline))

    def add(self, line: Line, num_steps: int) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(asdict(line)) + "\n")
        self._say(line.text(num_steps))

    def lines(self) -> list[Line]:
        """In the order of the steps. Raises TrainingError for a line that no run has written."""
        if not self._path.exists():
            return []
        found: dict[tuple[Any, int], Line] = {}
        for number, text in enumerate(self._path.read_text().splitlines(), 1):
            try:
                line = Line(**json.loads(text))
            except (ValueError, TypeError) as error:
                raise TrainingError(f"{self._path}, line {number}: not a line of a run's log ({error})") from error
            found[line.stage, line.step] = line
        return list(found.values())
