"""What a row more in a step costs, learned from the steps themselves: the model behind how much to draft.

A step of r rows takes about `fixed + each * r` seconds: weights are read once, each row adds arithmetic. Both are
fitted by least squares over recent steps, older ones counting less and less. Where all steps had one size there is no
slope to see, so a few imaginary steps pull it to the ratio that was measured for the default model.

Only steps without prompt chunks are told: rows of a prompt have no logits and share their attention.
"""

from dataclasses import dataclass

FORGET = 0.99
"""A step's weight falls by this with each later one: the last 100 decide, half a second of decoding."""
RELATIVE_ROW_COST = 0.17
"""`each / fixed` before anything is known: batch 8 takes twice as long as batch 1 (SmolLM2-135M, two cores)."""
PRIOR_VARIANCE = 4.0
"""How firmly that is believed: as if recent steps differed from their mean by two rows and told it."""
OUTLIER = 3.0
"""A step that took this many times what was expected says something about the machine, not about rows."""


@dataclass(slots=True)
class StepCost:
    """Weighted means of rows and seconds, and of their products around the means."""

    _weight: float = 0.0
    _rows: float = 0.0
    _seconds: float = 0.0
    _var_rows: float = 0.0
    _covariance: float = 0.0

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

    @property
    def each(self) -> float:
        """Seconds of one row more, never below a tenth of the ratio that is believed at first."""
        expected = self._seconds * RELATIVE_ROW_COST / (1 + RELATIVE_ROW_COST * self._rows)
        slope = (self._covariance + PRIOR_VARIANCE * expected) / (self._var_rows + PRIOR_VARIANCE)
        return max(slope, 0.1 * expected)

    def seconds(self, rows: int) -> float:
        """Of a step of that many rows; at least what its rows alone take."""
        each = self.each
        return max(self._seconds + each * (rows - self._rows), each * rows)


@dataclass(slots=True)
class StepBudget:
    """Fills one step while a row brings in more tokens a second than the step does without it."""

    each: float
    seconds: float
    tokens: float

    @staticmethod
    def of(cost: StepCost, num_decodes: int) -> "StepBudget":
        each, seconds = cost.each, cost.seconds(num_decodes)
        if seconds <= 0:  # nothing was measured yet
            each, seconds = RELATIVE_ROW_COST, 1 + RELATIVE_ROW_COST * num_decodes
        return StepBudget(each, seconds, float(max(num_decodes, 1)))

    @property
    def least(self) -> float:
        """The probability below which a token does not pay for its row."""
        return self.tokens * self.each / self.seconds

    def take(self, probability: float) -> bool:
        if probability < self.least:
            return False
        self.seconds += self.each
        self.tokens += probability
        return True
