"""What a step of so many rows takes, learned from the steps themselves: the model behind how much to draft.

A step of r rows takes about `fixed + each * r` seconds: weights are read once, each row adds arithmetic. Both are
fitted by least squares over recent steps, older ones counting less and less. Where all steps had one size there is no
slope to see, so a few imaginary steps pull it to the ratio that was measured for the default model. Kernels take rows
in groups, so the truth has stairs (on AVX-512 rows 2 to 4 cost half of rows 5 to 8): for every small number of rows the
ratio of what steps took to that line is kept too.

Only steps without prompt chunks are told: rows of a prompt have no logits and share their attention.
"""

from dataclasses import dataclass, field

FORGET = 0.99
"""A step's weight falls by this with each later one: the last 100 decide, half a second of decoding."""
RELATIVE_ROW_COST = 0.17
"""`each / fixed` before anything is known: batch 8 takes twice as long as batch 1 (SmolLM2-135M, two cores)."""
PRIOR_VARIANCE = 4.0
"""How firmly that is believed: as if recent steps differed from their mean by two rows and told it."""
OUTLIER = 3.0
"""A step that took this many times what was expected says something about the machine, not about rows."""
MAX_STAIR, STAIR_STEPS = 33, 16.0
"""Numbers of rows that are told apart, and how many steps of a size outweigh the line."""
MARGIN = 1.2
"""A guess is taken for so much less likely than it seems, as all is estimated. In simulation, from recorded answers and
with rows of 8 to 30 % of a step, 1 to 1.5 gave the same within 2 %."""


@dataclass(slots=True)
class StepCost:
    """Weighted means of rows and seconds, and of their products around the means."""

    _weight: float = 0.0
    _rows: float = 0.0
    _seconds: float = 0.0
    _var_rows: float = 0.0
    _covariance: float = 0.0
    _stairs: list[float] = field(default_factory=lambda: [1.0] * MAX_STAIR)
    _each: float = 0.0

    def observe(self, rows: int, seconds: float) -> None:
        if self._weight > 1:
            seconds = min(seconds, OUTLIER * self.seconds(rows))
        self._weight = self._weight * FORGET + 1
        share = 1 / self._weight
        rows_off, seconds_off = rows - self._rows, seconds - self._seconds
        self._rows += share * rows_off
        self._seconds += share * seconds_off
        self._var_rows = (1 - share) * (self._var_rows + share * rows_off * rows_off)
        self._covariance = (1 - share) * (self._covariance + share * rows_off * seconds_off)
        expected = self._seconds * RELATIVE_ROW_COST / (1 + RELATIVE_ROW_COST * self._rows)
        slope = (self._covariance + PRIOR_VARIANCE * expected) / (self._var_rows + PRIOR_VARIANCE)
        self._each = max(slope, 0.1 * expected)  # never free
        line = self._line(rows)
        if rows < MAX_STAIR and line > 0:
            self._stairs[rows] += (seconds / line - self._stairs[rows]) / STAIR_STEPS

    def _line(self, rows: int) -> float:
        return max(self._seconds + self._each * (rows - self._rows), self._each * rows)

    def seconds(self, rows: int) -> float:
        """In any unit while nothing was observed."""
        if self._seconds <= 0:
            return 1 + RELATIVE_ROW_COST * rows
        return self._line(rows) * (self._stairs[rows] if rows < MAX_STAIR else 1.0)


@dataclass(slots=True)
class StepBudget:
    """One step being filled: its rows, and the tokens that are expected of it."""

    cost: StepCost
    rows: int
    tokens: float

    def would_take(self, probability: float) -> bool:
        more = self.cost.seconds(self.rows + 1)
        return (self.tokens + probability / MARGIN) * self.cost.seconds(self.rows) > self.tokens * more

    def pick(self, probabilities: list[float]) -> int:
        """How many of a draft's tokens, from the first on, bring in the most tokens a second; they are taken.

        `probabilities`: of each that it and all before it hold; 1 is a forced token.
        """
        seconds = self.cost.seconds(self.rows)
        best, best_rate, best_tokens, tokens = 0, self.tokens / seconds, self.tokens, self.tokens
        for count, probability in enumerate(probabilities, 1):
            tokens += probability if probability == 1.0 else probability / MARGIN
            rate = tokens / max(self.cost.seconds(self.rows + count), seconds)
            if rate > best_rate:
                best, best_rate, best_tokens = count, rate, tokens
        self.rows += best
        self.tokens = best_tokens
        return best
