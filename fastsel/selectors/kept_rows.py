"""Float64 similarities of contenders, kept: only to the points that a contender may still improve.

A point's best similarity only rises, so a pair that cannot improve its point now never will: what is kept shrinks as
picks are made, and a row that was fetched once serves every later pick.
"""

import numpy as np
from numpy.typing import NDArray

from fastsel.kernels.facility_location import Pairs

SHRINK = 0.5  # a row's pairs are rewritten once less than this share of them is of use


class KeptRows:
    """Pairs (point, similarity) of some candidates, in two arrays that all of them share.

    Attributes:
        capacity: how many pairs there is room for; a single fetch may exceed it for as long as it is wanted.
    """

    def __init__(self, n: int, capacity: int) -> None:
        self.capacity = capacity
        self._start, self._count = np.zeros(n, np.int64), np.full(n, -1)
        self._points, self._similarities, self._used = np.zeros(0, np.int32), np.zeros(0), 0

    @property
    def numbers(self) -> NDArray[np.int64]:
        """The candidates whose pairs are kept, rising."""
        return np.flatnonzero(self._count >= 0)

    def has(self, candidate: int) -> bool:
        """Whether the pairs of a candidate are kept."""
        return bool(self._count[candidate] >= 0)

    def has_each(self, candidates: NDArray[np.int64]) -> NDArray[np.bool_]:
        """The same for several."""
        return np.asarray(self._count[candidates] >= 0)

    def keep(self, rows: NDArray[np.int64], pairs: Pairs, least_wanted: NDArray[np.int64]) -> None:
        """Keep the pairs of rows that are not kept yet; where room is short, forget the least wanted ones first."""
        starts = pairs.starts.numpy()
        total = int(starts[-1])
        if self._used + total > len(self._points):
            self._make_room(total, least_wanted)
        over = slice(self._used, self._used + total)
        self._points[over], self._similarities[over] = pairs.points.numpy(), pairs.similarities.numpy()
        self._start[rows], self._count[rows] = self._used + starts[:-1], np.diff(starts)
        self._used += total

    def _make_room(self, total: int, least_wanted: NDArray[np.int64]) -> None:
        """Close the gaps; forget rows until what stays leaves half of the room, or there is nothing left to forget."""
        excess = int(self._count[self.numbers].sum()) + total - self.capacity
        if excess > 0:
            freed = np.cumsum(self._count[least_wanted])
            enough = np.searchsorted(freed, excess + self.capacity // 2) + 1
            self._count[least_wanted[:enough]] = -1
        # Row by row, in the order in which they lie: within the same arrays where these are large enough.
        rows = self.numbers
        rows = rows[np.argsort(self._start[rows], kind="stable")]
        counts, old_starts = self._count[rows], self._start[rows]
        kept = int(counts.sum())
        size = max(kept + total, min(self.capacity, 2 * len(self._points)))
        points, similarities = self._points, self._similarities
        if size > len(points) or len(points) > self.capacity:
            points, similarities = np.empty(size, np.int32), np.empty(size)
        starts = np.cumsum(counts) - counts
        for to, start, count in zip(starts.tolist(), old_starts.tolist(), counts.tolist(), strict=True):
            points[to : to + count] = self._points[start : start + count]
            similarities[to : to + count] = self._similarities[start : start + count]
        self._start[rows] = starts
        self._points, self._similarities, self._used = points, similarities, kept

    def _places(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where the pairs of rows lie, one row after another, and which of the rows each belongs to."""
        counts = self._count[rows]
        owner = np.repeat(np.arange(len(rows)), counts)
        first = np.cumsum(counts) - counts
        return np.arange(len(owner)) + (self._start[rows] - first)[owner], owner

    def pairs_of(self, row: int) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
        """Points and similarities of one candidate."""
        over = slice(int(self._start[row]), int(self._start[row] + self._count[row]))
        return self._points[over], self._similarities[over]

    def gains(
        self, rows: NDArray[np.int64], best: NDArray[np.float64], weights: NDArray[np.float64] | None
    ) -> NDArray[np.float64]:
        """What each of these candidates would add to best [m]: sums in the order of the points."""
        at, owner = self._places(rows)
        points, similarities = self._points[at], self._similarities[at]
        now = best[points]
        is_unset = np.isneginf(now)
        terms = np.where(is_unset, similarities, similarities - np.where(is_unset, 0.0, now))
        improves = is_unset | (terms > 0)
        terms = np.where(improves, terms, 0.0)
        if weights is not None:
            terms *= weights[points]
        gains = np.asarray(np.bincount(owner, terms, minlength=len(rows)), dtype=np.float64)
        left = int(improves.sum())
        if left < SHRINK * len(at):
            owner = owner[improves]
            counts = np.bincount(owner, minlength=len(rows))
            to = np.arange(left) + (self._start[rows] - (np.cumsum(counts) - counts))[owner]
            self._points[to], self._similarities[to] = points[improves], similarities[improves]
            self._count[rows] = counts
        return gains
