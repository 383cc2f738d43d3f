"""Greedy steps that look at few rows: those with the largest upper bounds, and what any other row can reach at most."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# Values that differ by less than this share of them are equal: the last bits depend on the order of summation.
TIE = 1e-12


class Split(NamedTuple):
    """Rows chosen by upper bound.

    Attributes:
        rows: int64, rising: the rows with the largest bounds, and the lowest of those that tie for the last places.
        outside: the largest bound of any other row, -inf when there is none.
        outside_row: the lowest other row with that bound.
        slack: values that differ by less are equal whatever their size.
    """

    rows: NDArray[np.int64]
    outside: float
    outside_row: int
    slack: float = 0.0

    def is_beaten_by(self, value: float, row: int, *, raised: float = 0.0) -> bool:
        """Whether a row with this value comes before every row outside, their bounds raised by so much."""
        outside = self.outside + raised
        tie = max(TIE * abs(outside), self.slack) if np.isfinite(outside) else 0.0
        return value > outside + tie or (value >= outside - tie and raised == 0.0 and row < self.outside_row)


def split_by_bound(upper: NDArray[np.float64], size: int, *, slack: float = 0.0) -> Split:
    """At most `size` rows with the largest bounds above -inf; see Split."""
    level = largest(upper, size)
    tie = max(TIE * abs(level), slack) if np.isfinite(level) else 0.0
    above = np.flatnonzero(upper > level + tie)
    tied = np.flatnonzero((upper >= level - 3 * tie) & (upper <= level + tie) & (upper > -np.inf))
    rows = np.sort(np.concatenate([above, tied[: max(0, size - len(above))]]))
    others = upper.copy()
    others[rows] = -np.inf
    outside = float(others.max(initial=-np.inf))
    tie = max(TIE * abs(outside), slack) if np.isfinite(outside) else 0.0
    return Split(rows, outside, int((others >= outside - 3 * tie).argmax()), slack)


def largest(values: NDArray[np.float64], number: int) -> float:
    """The number-th largest value; the least when there are fewer."""
    place = max(0, len(values) - number)
    return float(np.partition(values, place)[place])
