"""Exact greedy choice by coverage: bounds say who can win, float64 gains say who does.

Every candidate has an upper bound of its gain: what is maintained in float32 plus an allowance for its error, and the
last float64 gain it was found to have, because gains only fall. A pick evaluates contenders in float64 until no other
bound reaches the best of them. How bounds are kept current is all in which the optimizers differ:

    naive        all gains from scratch before each pick
    incremental  after each pick, minus what it took from them: only points whose best similarity rose are passed, and
                 those that have a shortlist of who may still improve them not even to all candidates
    lazy         never: stale bounds, contenders evaluated in growing batches
    auto         incremental, but not while candidates whose similarities are at hand beat every stale bound: then
                 several picks share one update

Maintained gains may come from rows rounded to bytes, at a third of the time, or on a GPU to bfloat16, at a sixth. That
lets more contenders in, and where evaluating them costs more than is saved, float32 rows are taken from there on.

Worst-case bounds of float32 sums are a thousand times what occurs, so the error of maintained gains is measured:
whenever a candidate is evaluated while bounds are current, the difference is known. Every other candidate is allowed
eight times the root mean square of the recent ones, and at least twice the largest. Errors of dot products grow with
the length of the row: there they are measured, and allowed, per length, and rows much longer than any that was
evaluated are allowed the worst case until one is.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastsel.selectors.constraints import Constraints
from fastsel.selectors.coverage import Coverage

TIE = 1e-9  # relative: gains that differ by less are equal, and the lowest row goes first
DEVIATIONS, LARGEST_ERRORS = 8.0, 2.0  # what is allowed, in root mean squares and in largest recent errors
FLOAT32_ROUNDING = 1e-6
FORGET = 0.98  # the weight of an error after each later one: about the last 50 count
FIRST_LOOK = 16  # contenders evaluated before the first pick, which measure the error of the maintained gains
LONGER = 2.0  # times the longest row evaluated so far: from there on the worst case is allowed
BATCH, LARGEST_BATCH = 8, 64
STALE_LOOKS = 8  # kept contenders evaluated against stale bounds, before these are brought up to date
# In columns of float32 updates: the time of fetching, for a call and for each row, of looking at a kept row again, and
# what a rounded column saves. A GPU, where a column is cheap, reads all points in float64 at a call.
CALL_COLUMNS, ROW_COLUMNS, LOOK_COLUMNS = {"bytes": 10.0, "bfloat16": 450.0}, 0.5, 0.05
ROUNDING_SAVES = {"bytes": 0.7, "bfloat16": 0.8}
REVIEW_PICKS = 16  # how often it is asked whether rounding pays


class ExactGreedy:
    """A run of greedy picks.

    Attributes:
        syncs: how often all bounds were brought up to date.
    """

    def __init__(
        self,
        coverage: Coverage,
        constraints: Constraints,
        optimizer: str,
        quality: NDArray[np.float64] | None = None,
        alpha: float = 0.0,
    ) -> None:
        self.coverage, self.constraints, self._optimizer = coverage, constraints, optimizer
        self._scale, self._shift = 1.0 - alpha, (0.0 if quality is None else alpha * quality)
        n = coverage.n
        self._caps = np.full(n, np.inf)  # the last float64 gain of each candidate
        self._evaluated_at = np.full(n, -1)  # the pick before which that was
        self._step, self.syncs = 0, 0
        # Columns since the last review: fetched beyond a pick's first, saved by rounding; and what was lost before.
        self._excess = self._saved = self._loss = 0.0
        # "sampled" knows no gain before it is asked for: a pass over all pairs is what sampling avoids.
        self._gains, self._synced, self._allowance = np.full(n, np.inf), coverage.best.float(), 0.0
        self._mean_square = self._seen = self._largest_error = 0.0  # of the errors of maintained gains
        self._largest_gain = 0.0
        self._is_current = True  # the maintained gains know every pick
        # What errors are measured by, and what rows that are longer than those evaluated may err.
        self._unit, self._unlike = coverage.error_units(), np.arange(n)
        if isinstance(self._unit, float):
            self._unlike = np.zeros(0, np.int64)
        if optimizer != "sampled":
            self._restart()

    def value(self, gains: NDArray[np.float64], rows: NDArray[np.int64] | slice = slice(None)) -> NDArray[np.float64]:
        """What a pick is judged by: (1 - alpha) gain + alpha quality, over the cost where there are costs."""
        shift = self._shift if isinstance(self._shift, float) else self._shift[rows]
        # Quality alone: a gain that is not known yet is infinite, and 0 times that is not a number.
        value = (self._scale * gains if self._scale else np.zeros_like(gains)) + shift
        return value if self.constraints.costs is None else value / self.constraints.costs[rows]

    def pick(self, among: NDArray[np.bool_] | None = None) -> tuple[int, float] | None:
        """(row, what it adds to the objective) of the best row that may be taken (of those `among`), None if none may.

        The row is taken.
        """
        allowed = self.constraints.may_take if among is None else self.constraints.may_take & among
        if not allowed.any():
            return None
        if self.coverage.rounded_to and self._step % REVIEW_PICKS == 0:
            self._review()
        if self._optimizer in ("naive", "incremental"):
            self._sync()
        winner = self._decide(allowed)
        return winner, self.take(winner)

    def take(self, row: int) -> float:
        """Choose a row that was evaluated for this pick; what it adds to the objective."""
        assert self._evaluated_at[row] == self._step
        adds = self._scale * float(self._caps[row]) + (
            self._shift if isinstance(self._shift, float) else float(self._shift[row])
        )
        was_empty = self.coverage.is_empty
        self.coverage.add(row)
        self.constraints.take(row)
        self._step += 1
        self._is_current = False
        if was_empty:  # without a floor the first gain is a sum of similarities; later gains may exceed it
            self._caps[:] = np.inf
            if self._optimizer != "sampled":
                self._restart()
        return adds

    def evaluate(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Float64 values of rows for the present pick; their similarities are kept (at most `room` rows)."""
        kept = self.coverage.kept.numbers
        missing = np.setdiff1d(rows, kept)
        if len(missing):
            others = np.setdiff1d(kept, rows)
            self.coverage.fetch(missing, others)
        self._evaluate(rows)
        return self.value(self._caps[rows], rows)

    def bounds(self) -> NDArray[np.float64]:
        """What no value exceeds, [n]; -inf where a row may not be taken."""
        return self._bounds(self.constraints.may_take)

    def _bounds(self, allowed: NDArray[np.bool_]) -> NDArray[np.float64]:
        upper = self._gains + self._allowance * self._unit
        if len(self._unlike):
            upper[self._unlike] += self.coverage.worst_error() * self._unit_of(self._unlike)
        values = self.value(np.minimum(upper, self._caps))
        values[~allowed] = -np.inf
        return values

    def _unit_of(self, rows: NDArray[np.int64]) -> NDArray[np.float64] | float:
        return self._unit if isinstance(self._unit, float) else self._unit[rows]

    def _decide(self, allowed: NDArray[np.bool_]) -> int:
        """The lowest row whose float64 value is within TIE of the largest; its similarity row is kept."""
        batch = FIRST_LOOK if self._step == 0 else BATCH
        if self._optimizer == "lazy":
            batch = LARGEST_BATCH
        numbers = np.arange(self.coverage.n)
        bounds = self._bounds(allowed)
        while True:
            is_fresh = (self._evaluated_at == self._step) & allowed
            fresh = np.flatnonzero(is_fresh)
            if len(fresh):
                values = bounds[fresh]
                best = values.max()
                slack = TIE * abs(best)
                winner = int(fresh[np.flatnonzero(values >= best - slack)[0]])
                can_win = (bounds - slack > bounds[winner]) | ((bounds >= best - slack) & (numbers < winner))
                contenders = np.flatnonzero(can_win & ~is_fresh)
                if not len(contenders):
                    if self.coverage.kept.has(winner):
                        return winner
                    contenders = np.array([winner])
            else:
                contenders = np.flatnonzero(allowed & (bounds == bounds.max()))
            kept = contenders[self.coverage.kept.has_each(contenders)]
            if self._optimizer == "auto" and not self._is_current and not 0 < len(kept) <= STALE_LOOKS:
                self._sync()
            elif len(kept):
                if len(kept) > LARGEST_BATCH:
                    kept = kept[_largest(bounds[kept], LARGEST_BATCH)]
                    self._excess += LOOK_COLUMNS * LARGEST_BATCH
                self._evaluate(kept)
            else:
                self._fetch(contenders, bounds, allowed, batch)
                batch = min(2 * batch, LARGEST_BATCH)
            bounds = self._bounds(allowed)

    def _review(self) -> None:
        """Leave rounding once the contenders that its error let in have cost as much more as leaving costs."""
        self._loss = max(0.0, self._loss + self._excess - self._saved)
        self._excess = self._saved = 0.0
        if self._loss > self.coverage.m:
            self.coverage.leave_rounding()
            self._restart()

    def _restart(self) -> None:
        """Maintained gains from scratch; their error is to be measured anew."""
        self._gains, self._synced, self._is_current = self.coverage.gains(), self.coverage.best.float(), True
        self._mean_square = self._seen = self._largest_error = 0.0

    def _fetch(
        self, contenders: NDArray[np.int64], bounds: NDArray[np.float64], allowed: NDArray[np.bool_], batch: int
    ) -> None:
        """Fetch the contenders with the largest bounds, and the rows next to them: reading the points costs most."""
        coverage = self.coverage
        batch = min(batch, coverage.room)
        kept = coverage.kept.numbers
        wanted = contenders[_largest(bounds[contenders], batch)]
        if len(wanted) < batch:
            others = bounds.copy()
            others[wanted], others[kept] = -np.inf, -np.inf
            others[self._evaluated_at == self._step] = -np.inf
            more = _largest(others, batch - len(wanted))
            wanted = np.concatenate([wanted, more[others[more] > -np.inf]])
        coverage.fetch(wanted, kept[np.argsort(bounds[kept], kind="stable")])
        if batch > BATCH and coverage.rounded_to:
            self._excess += CALL_COLUMNS[coverage.rounded_to] + ROW_COLUMNS * len(wanted)
        self._evaluate(wanted)

    def _evaluate(self, rows: NDArray[np.int64]) -> None:
        exact = self.coverage.exact_gains(rows)
        errors = exact - self._gains[rows]
        self._caps[rows], self._evaluated_at[rows] = exact, self._step
        if not np.isfinite(self._gains[rows[0]]):  # "sampled" maintains no gains
            return
        if len(self._unlike):
            longest = LONGER * np.max(self._unit_of(rows))
            self._unlike = self._unlike[self._unit_of(self._unlike) > longest]
        errors = errors / self._unit_of(rows)
        if self._is_current:
            weights = FORGET ** np.arange(len(rows))
            self._mean_square = (weights @ errors**2 + weights[-1] * FORGET * self._seen * self._mean_square) / (
                weights.sum() + weights[-1] * FORGET * self._seen
            )
            self._seen = float(weights.sum() + weights[-1] * FORGET * self._seen)
            self._largest_error = max(self._largest_error, float(np.abs(errors).max()))
        else:  # falling below a stale gain is no error
            self._largest_error = max(self._largest_error, float(errors.max()))
        self._allow()

    def _allow(self) -> None:
        # Gains carry what was rounded when they were largest, also where every error seen so far is 0.
        self._largest_gain = max(self._largest_gain, float(np.abs(self._gains / self._unit).max()))
        rounding = FLOAT32_ROUNDING * self._largest_gain
        self._allowance = max(
            rounding, DEVIATIONS * float(np.sqrt(self._mean_square)), LARGEST_ERRORS * self._largest_error
        )

    def _sync(self) -> None:
        """Bring the maintained gains up to date with every pick so far."""
        coverage, best = self.coverage, self.coverage.best.float()
        moved = torch.nonzero(best > self._synced)[:, 0]
        self._is_current = True
        if self._optimizer == "naive" or (coverage.is_symmetric and coverage.passed_by(moved) > coverage.m // 2):
            self._gains = coverage.gains()
        elif len(moved):
            if coverage.rounded_to:
                self._saved += ROUNDING_SAVES[coverage.rounded_to] * coverage.passed_by(moved)
            self._gains = coverage.lose(self._gains, moved, self._synced[moved], best[moved])
        else:
            return
        self._synced = best
        self._largest_error *= 0.9  # gains fall, and the error with them
        self._allow()
        self.syncs += 1

    def run(self, stats: dict[str, Any] | None = None) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Pick until nothing may be taken."""
        picks: list[tuple[int, float]] = []
        while (found := self.pick()) is not None:
            picks.append(found)
        self.report(stats)
        return np.array([row for row, _ in picks], np.int64), np.array([gain for _, gain in picks], np.float64)

    def report(self, stats: dict[str, Any] | None) -> None:
        """Counts of what was done."""
        if stats is not None:
            stats["passes"] = self.coverage.columns / max(1, self.coverage.m)
            stats["exact_evaluations"] = self.coverage.fetched
            stats["syncs"] = self.syncs


def _largest(values: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """Positions of the largest values, largest first, the lowest position first among equals."""
    if count < len(values):
        # Everything that reaches the count-th largest value, so that ties are cut by position.
        least = np.partition(values, len(values) - count)[len(values) - count]
        found = np.flatnonzero(values >= least)
    else:
        found = np.arange(len(values))
    return found[np.argsort(-values[found], kind="stable")][:count].astype(np.int64)
