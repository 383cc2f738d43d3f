"""k-center greedy: every pick is the row farthest from all rows chosen before it.

A pass over the pool for each pick is not needed. Distances to the nearest chosen row only fall, so what was true some
picks ago bounds what is true now. A round takes the rows with the largest bounds, the candidates; their distances to
each other are one small matrix product in float64, and the greedy goes on among them for as long as the farthest
candidate beats the largest bound outside. Then the kernel brings bounds up to date, in float32 with an error bound,
for all picks of the round at once, and only for rows whose bounds are large enough to matter next.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from fastsel.errors import UsageError
from fastsel.kernels.k_center import k_center as nearest_centre
from fastsel.selectors.contenders import TIE, Split, largest, split_by_bound
from fastsel.selectors.exact_distances import ExactDistances
from fastsel.selectors.rows import BLOCK_ROWS, Rows, check_k, check_rows

FIRST_BATCH, LARGEST_BATCH = 128, 1024


def k_center(
    x: Any,
    k: int,
    *,
    metric: str = "euclidean",
    initial: ArrayLike | None = None,
    first: int | str = 0,
    seed: int = 0,
    batch: int | str = "auto",
    implementation: str = "auto",
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Farthest-first rows: the exact k-center greedy (radius at most twice the best possible).

    Args:
        x: [n, d] finite numbers; numpy, mapped from a file, or torch on any device.
        k: how many; all rows when there are fewer.
        metric: "euclidean", or "cosine": 1 - cos, where a row of zeros is at distance 1 from every row.
        initial: row numbers chosen before; they are not returned.
        first: the first pick when nothing is chosen before: a row number, or "random" (drawn with `seed`).
        seed: of that draw.
        batch: candidates a round; "auto" adapts. It changes the time, never the rows.
        implementation: of the kernel k_center.

    Returns:
        indices int64 [k] in order, and gains float64 [k]: the distance at which each row was picked, from all rows
        chosen before it; falling; infinite for the first of all. Ties go to the lowest row; copies of a chosen row
        come last, at distance 0. The first j are the selection for k = j.

    Raises:
        UsageError: a row is not finite (it is named), or an argument is not as above.

    Cost: at most 2 n d k flops in float32, in matrix products; less where many rows are settled early. The pool is read
        once a round (in parts, when it lies in memory). Memory beside x: 32 n bytes and about 40 MB; a float32 copy
        where x must be scaled to unit length, or lies far from the origin compared with its spread.
    Source: Gonzalez 1985; "k-center greedy" of Sener & Savarese, ICLR 2018.
    """
    if metric not in ("euclidean", "cosine"):
        raise UsageError(f"metric must be euclidean or cosine, got {metric!r}")
    if batch != "auto" and (isinstance(batch, bool) or not isinstance(batch, int) or batch < 1):
        raise UsageError(f"batch must be auto or a positive number of rows, got {batch!r}")
    rows = Rows(x, unit=metric == "cosine")
    chosen = [int(row) for row in check_rows(initial, rows.n, "initial")]
    k = check_k(k, rows.n - len(chosen))
    picks: list[int] = []
    squares: list[float] = []
    if k and not chosen:
        picks.append(first_row(first, rows.n, seed))
        squares.append(np.inf)
        chosen.append(picks[0])
    bounds = _Bounds(rows, implementation)
    bounds.upper[chosen] = -np.inf
    search = _Search(rows, bounds, chosen)
    size = FIRST_BATCH if batch == "auto" else int(batch)
    while len(picks) < k:
        found = search.round(size, k - len(picks))
        picks += [row for row, _ in found]
        squares += [square for _, square in found]
        if batch == "auto":
            if len(found) > size // 4 or not found:
                size = min(2 * size, LARGEST_BATCH)
            elif len(found) < size // 16:
                size = max(size // 2, FIRST_BATCH // 2)
    gains = np.array(squares, dtype=np.float64)
    return np.array(picks, dtype=np.int64), gains / 2 if metric == "cosine" else np.sqrt(gains)


def first_row(first: int | str, n: int, seed: int) -> int:
    """The row that a greedy selection begins with: `first`, or drawn with the seed when that is "random"."""
    if first == "random":
        return int(np.random.default_rng(seed).integers(n))
    if isinstance(first, bool) or not isinstance(first, (int, np.integer)):
        raise UsageError(f"first must be a row number or random, got {first!r}")
    return int(check_rows([first], n, "first")[0])


class _Bounds:
    """Of every row, an upper bound of the squared distance to the nearest chosen row.

    Attributes:
        upper: float64 [n]; -inf for chosen rows.
        stamp: int64 [n], how many of the chosen rows each bound takes account of.
        is_on_a_gpu: whether the rows lie there.
    """

    def __init__(self, rows: Rows, implementation: str) -> None:
        self.upper = np.full(rows.n, np.inf)
        self.stamp = np.zeros(rows.n, np.int64)
        self._rows, self._implementation = rows, implementation
        self._shift = None if rows.unit else _shift_that_pays(rows)
        self._points = None if rows.is_mapped else self._all_points()
        self.is_on_a_gpu = self._points is not None and self._points.device.type == "cuda"
        self._sqnorms = self._squared_lengths()
        # A float32 sum of d products errs by more than 8 sqrt(d) roundings once in 10^13 times (Higham and Mary, "A new
        # approach to probabilistic rounding error analysis", 2019); 16 more for the inputs' own rounding and the norms.
        self._unit_error = 2.0**-24 * (8.0 * rows.d**0.5 + 16.0)

    def refresh(self, which: NDArray[np.int64], chosen: NDArray[np.int64]) -> None:
        """Take account of all chosen rows, for these rows (all of them where the matrix is mapped from a file)."""
        if self._points is None:
            which = np.flatnonzero(self.stamp < len(chosen))
        stamps = self.stamp[which]
        for stamp in np.unique(stamps):
            group, news = which[stamps == stamp], chosen[stamp:]
            centres = self._shifted(self._rows.exact(news))
            sqnorms = self._sqnorms[torch.from_numpy(news).to(self._sqnorms.device)]
            if self._points is None:
                nearest = np.empty(len(group))
                for start in range(0, len(group), BLOCK_ROWS):
                    part = slice(start, start + BLOCK_ROWS)
                    nearest[part] = self._nearest(self._read(group[part]), None, group[part], centres, sqnorms)
            else:
                which_rows = None if len(group) == self._rows.n else torch.from_numpy(group).to(self._points.device)
                nearest = self._nearest(self._points, which_rows, group, centres, sqnorms)
            np.minimum(self.upper[group], nearest, out=nearest)
            self.upper[group], self.stamp[group] = nearest, len(chosen)

    def refresh_all(self, chosen: NDArray[np.int64]) -> None:
        """The same for all rows in one pass, which some of them meet with centres that they know."""
        news = chosen[self.stamp.min() :]
        if not len(news) or self._points is None:
            return
        centres = self._shifted(self._rows.exact(news))
        sqnorms = self._sqnorms[torch.from_numpy(news).to(self._sqnorms.device)]
        nearest = self._nearest(self._points, None, np.arange(self._rows.n), centres, sqnorms)
        np.minimum(self.upper, nearest, out=self.upper)
        self.stamp[:] = len(chosen)

    def _nearest(
        self, points: torch.Tensor, at: torch.Tensor | None, group: NDArray[np.int64], centres: torch.Tensor,
        sqnorms: torch.Tensor,
    ) -> NDArray[np.float64]:  # fmt: skip
        """Upper bounds of the squares from rows `group` to the centres."""
        norms = self._sqnorms if at is not None or len(group) == len(points) == self._rows.n else (
            self._sqnorms[torch.from_numpy(group).to(self._sqnorms.device)]
        )  # fmt: skip
        found = nearest_centre(
            points, centres, rows=at, point_sqnorms=norms, centre_sqnorms=sqnorms, implementation=self._implementation
        ).nearest
        lengths = norms if at is None else norms[at]
        bounds: NDArray[np.float64] = (
            (found.double() + self._unit_error * (lengths.double() + sqnorms.max().double())).cpu().numpy()
        )
        return bounds

    def _read(self, group: NDArray[np.int64]) -> torch.Tensor:
        """Float32 rows of a mapped matrix; neighbours are read as a slice."""
        is_slice = len(group) > 0 and group[-1] - group[0] + 1 == len(group)
        index: Any = slice(int(group[0]), int(group[-1]) + 1) if is_slice else group
        if self._shift is None:
            return self._rows.take(index)
        return self._shifted(self._rows.exact(index))

    def _shifted(self, exact: torch.Tensor) -> torch.Tensor:
        return (exact if self._shift is None else exact - self._shift).float()

    def _all_points(self) -> torch.Tensor:
        if self._shift is None:
            return self._rows.whole()
        points = torch.empty(self._rows.n, self._rows.d, dtype=torch.float32, device=self._rows.device)
        for start in range(0, self._rows.n, BLOCK_ROWS):
            block = slice(start, min(self._rows.n, start + BLOCK_ROWS))
            points[block] = self._shifted(self._rows.exact(block))
        return points

    def _squared_lengths(self) -> torch.Tensor:
        if self._rows.unit:  # rows of zeros count 1 too: their square to a unit row is then 2, cosine distance 1
            return torch.ones(self._rows.n, dtype=torch.float32, device=self._rows.device)
        if self._shift is None:
            return torch.from_numpy(self._rows.lengths**2).float().to(self._rows.device)
        norms = torch.empty(self._rows.n, dtype=torch.float32, device=self._rows.device)
        for start in range(0, self._rows.n, BLOCK_ROWS):
            block = slice(start, min(self._rows.n, start + BLOCK_ROWS))
            points = self._shifted(self._rows.exact(block)) if self._points is None else self._points[block]
            norms[block] = points.double().square().sum(1)
        return norms


def _shift_that_pays(rows: Rows) -> torch.Tensor | None:
    """The mean row, float64, where most of the rows' length is common to all: distances do not change, errors do."""
    if rows.n == 0:
        return None
    total = torch.zeros(rows.d, dtype=torch.float64, device=rows.device)
    for start in range(0, rows.n, BLOCK_ROWS):
        total += rows.exact(slice(start, min(rows.n, start + BLOCK_ROWS))).sum(0)
    mean = total / rows.n
    return mean if float(mean.square().sum()) > 0.5 * float((rows.lengths**2).mean()) else None


class _Search:
    """Rounds of exact greedy picks among the rows with the largest bounds."""

    def __init__(self, rows: Rows, bounds: _Bounds, chosen: list[int]) -> None:
        self._bounds, self._chosen, self._exact = bounds, chosen, ExactDistances(rows)
        # Candidates of the last round with their squares, true for all rows chosen so far.
        self._last = np.zeros(0, np.int64)
        self._last_square, self._last_is_direct = np.zeros(0), np.zeros(0, bool)

    def round(self, size: int, most: int) -> list[tuple[int, float]]:
        """Picks with their squared distances, at most so many; none when the candidates had to be settled first."""
        split = self._candidates(size)
        candidates = split.rows
        square, is_direct = self._squares_of(candidates)
        pairs: NDArray[np.float64] | None = None
        picked: list[tuple[int, float]] = []
        while len(picked) < most:
            best = square.max()
            if best == -np.inf:  # all are picked
                break
            is_close = square >= best - 2 * self._exact.margin
            # Near zero the expansion of a square has lost its digits.
            is_contested = is_close.sum() > 1 or split.outside >= best - 2 * self._exact.margin
            if is_contested or best < 1e-6 * self._exact.scale:
                doubtful = np.flatnonzero(is_close & ~is_direct)
                if len(doubtful):
                    chosen = np.array(self._chosen, np.int64)
                    square[doubtful] = self._exact.nearest_direct(candidates[doubtful], chosen)
                    is_direct[doubtful] = True
                    continue
            at = int((square >= best * (1 - TIE)).argmax())  # ties: the lowest row
            row = int(candidates[at])
            if not split.is_beaten_by(best, row):
                break
            picked.append((row, float(square[at])))
            self._chosen.append(row)
            if pairs is None:
                pairs = self._exact.squares(candidates, candidates).cpu().numpy()
            news = pairs[at].copy()
            is_unclear = np.flatnonzero(is_direct & (np.abs(news - square) <= self._exact.margin))
            news[is_unclear] = self._exact.direct(candidates[is_unclear], np.full(len(is_unclear), row))
            is_direct &= news >= square
            is_direct[is_unclear] = True
            np.minimum(square, news, out=square)
            square[at] = -np.inf
        self._keep(candidates, square, is_direct)
        return picked

    def _candidates(self, size: int) -> Split:
        """The rows with the largest bounds, those brought up to date; and what lies outside."""
        upper, stamp, chosen = self._bounds.upper, self._bounds.stamp, np.array(self._chosen, np.int64)
        if self._bounds.is_on_a_gpu:  # one pass over all rows takes less than asking for some of them
            self._bounds.refresh_all(chosen)
        reach = 4 * size
        while ((stamp < len(chosen)) & (upper >= largest(upper, 2 * size))).any():
            # More rows than are looked at, and more each time: each time has its price, and most are needed soon.
            self._bounds.refresh(np.flatnonzero((stamp < len(chosen)) & (upper >= largest(upper, reach))), chosen)
            reach *= 2
        return split_by_bound(upper, size)

    def _squares_of(self, candidates: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Squares to the nearest chosen row in float64; those of the last round's candidates are known."""
        square, is_direct = np.empty(len(candidates)), np.zeros(len(candidates), bool)
        at = np.searchsorted(self._last, candidates)
        is_known = np.zeros(len(candidates), bool)
        inside = at < len(self._last)
        is_known[inside] = self._last[at[inside]] == candidates[inside]
        square[is_known], is_direct[is_known] = self._last_square[at[is_known]], self._last_is_direct[at[is_known]]
        if not is_known.all():
            square[~is_known] = self._exact.nearest(candidates[~is_known], np.array(self._chosen, np.int64))
        return square, is_direct

    def _keep(self, candidates: NDArray[np.int64], square: NDArray[np.float64], is_direct: NDArray[np.bool_]) -> None:
        """What is known of the candidates, as bounds and for the next round."""
        self._last, self._last_square, self._last_is_direct = candidates, square, is_direct
        self._bounds.upper[candidates] = np.where(is_direct, square, square + self._exact.margin)
        self._bounds.stamp[candidates] = len(self._chosen)
