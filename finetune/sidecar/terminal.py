"""A round on the terminal: a line for every phase and a bar within it, silent when standard error is none."""

import sys

from tqdm import tqdm

from finetune.rounds.round import Round

_SHOWN = {"loss": "loss {:.3f}", "tokens_per_second": "{:.0f} tokens/s"}


class Terminal:
    """An `Observer`."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def on_phase(self, round: Round) -> None:
        self.close()
        if round.result is None and sys.stderr.isatty():
            print(f"{round.ref}: {round.phase}", file=sys.stderr)

    def on_progress(self, round: Round, num_done: int, num_in_all: int, **values: float) -> None:
        if self._bar is None or self._bar.total != num_in_all:
            self.close()
            self._bar = tqdm(total=num_in_all, desc=f"  {round.phase}", leave=False, disable=None, dynamic_ncols=True)
        self._bar.set_postfix_str(", ".join(text.format(values[key]) for key, text in _SHOWN.items() if key in values))
        self._bar.update(num_done - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def say(text: str) -> None:
    """Beside the bar."""
    tqdm.write(f"sterna: {text}", file=sys.stderr)
