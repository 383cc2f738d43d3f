"""A facility location problem as the arguments say it, and its exact greedy solution."""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fastsel.selectors.constraints import Constraints
from fastsel.selectors.coverage import Coverage
from fastsel.selectors.exact_greedy import ExactGreedy
from fastsel.selectors.rows import Rows

Picks = tuple[NDArray[np.int64], NDArray[np.float64]]


class Problem(NamedTuple):
    """See facility_location for each field; candidates and points are the same object when there are no queries."""

    candidates: Rows
    points: Rows
    weights: NDArray[np.float64] | None
    similarity: str
    gamma: float
    floor: float | None
    initial: NDArray[np.int64]
    quality: NDArray[np.float64] | None
    alpha: float
    implementation: str

    def coverage(self) -> Coverage:
        """The state before the first pick: covered by the rows chosen before."""
        coverage = Coverage(
            self.candidates, self.points, self.weights, self.similarity, self.gamma, self.floor, self.implementation
        )
        for row in self.initial.tolist():
            coverage.fetch(np.array([row]), coverage.kept.numbers)
            coverage.add(row)
        return coverage

    def greedy(self, constraints: Constraints, optimizer: str) -> ExactGreedy:
        """A run that has picked nothing yet."""
        return ExactGreedy(self.coverage(), constraints, optimizer, self.quality, self.alpha)

    def solve(self, constraints: Constraints, optimizer: str, stats: dict[str, Any] | None) -> Picks:
        """Exact greedy picks; with costs, the single best row instead where it alone is worth more."""
        affordable = constraints.may_take.copy()
        run = self.greedy(constraints, optimizer)
        if constraints.costs is None:
            return run.run(stats)
        indices, gains = run.run(stats)
        single = self.greedy(Constraints(self.candidates.n, 1, taken=np.flatnonzero(~affordable)), optimizer)
        best = single.pick()
        if best is not None and best[1] > gains.sum() * (1 + 1e-9):
            return np.array([best[0]], np.int64), np.array([best[1]])
        return indices, gains

    def part(self, candidates: NDArray[np.int64], points: NDArray[np.int64] | None) -> "Problem":
        """The same with these candidates and points only (points None: all of them), nothing chosen before."""
        rows = self._rows(self.candidates, candidates)
        if points is None:
            return self._replace(candidates=rows, initial=np.zeros(0, np.int64), quality=self._quality_of(candidates))
        same = self.points is self.candidates and np.array_equal(candidates, points)
        return self._replace(
            candidates=rows,
            points=rows if same else self._rows(self.points, points),
            weights=None if self.weights is None else self.weights[points],
            initial=np.zeros(0, np.int64),
            quality=self._quality_of(candidates),
        )

    def _quality_of(self, rows: NDArray[np.int64]) -> NDArray[np.float64] | None:
        return None if self.quality is None else self.quality[rows]

    def _rows(self, rows: Rows, numbers: NDArray[np.int64]) -> Rows:
        return Rows(rows.given[torch.from_numpy(numbers).to(rows.device)], unit=rows.unit)
