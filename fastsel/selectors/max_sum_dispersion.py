"""Greedy max-sum dispersion: every pick is the row with the largest sum of distances to the rows chosen before it.

Under the cosine distance that sum is t - x . u, with u the sum of the t unit rows chosen: one number a row, one product
of the pool with u a pass, whatever t. float32 finds the rows with the largest sums, float64 decides among them. A pass
serves more than one pick only where the first rows are further ahead than one pick can raise another row; on embeddings
of sentences, whose chosen rows cancel each other in u, that is rare.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from fastsel.errors import UsageError
from fastsel.selectors.contenders import TIE, split_by_bound
from fastsel.selectors.exact_distances import CHOSEN_AT_A_TIME, ExactDistances
from fastsel.selectors.k_center import first_row
from fastsel.selectors.rows import Rows, check_k, check_rows

CANDIDATES = 128
BLOCK_ROWS = 2048  # rows of a pass taken together: 2,048 x 4,096 squares are 34 MB


def max_sum_dispersion(
    x: Any,
    k: int,
    *,
    metric: str = "cosine",
    initial: ArrayLike | None = None,
    first: int | str = 0,
    seed: int = 0,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Rows that are far from each other on the sum: the exact greedy (half of the best sum at least, on a metric).

    Args:
        x: [n, d] finite numbers; numpy, mapped from a file, or torch on any device.
        k: how many; all rows when there are fewer.
        metric: "cosine", 1 - cos, where a row of zeros is at distance 1 from every row; or "euclidean".
        initial: row numbers chosen before; they are not returned.
        first: the first pick when nothing is chosen before: a row number, or "random" (drawn with `seed`).
        seed: of that draw.

    Returns:
        indices int64 [k] in order, and gains float64 [k]: the sum of the distances to all rows chosen before, 0 for the
        first of all. Ties go to the lowest row. The first j are the selection for k = j.

    Raises:
        UsageError: a row is not finite (it is named), or an argument is not as above.

    Cost: about a pass over the pool for each pick, 2 n d flops.
    Source: Ravi, Rosenkrantz & Tayi, "Heuristic and special case algorithms for dispersion problems", 1994; the limit
        alpha = 0 of NovelSelect.
    """
    if metric not in ("euclidean", "cosine"):
        raise UsageError(f"metric must be euclidean or cosine, got {metric!r}")
    rows = Rows(x, unit=metric == "cosine")
    chosen = [int(row) for row in check_rows(initial, rows.n, "initial")]
    k = check_k(k, rows.n - len(chosen))
    picks: list[int] = []
    gains: list[float] = []
    if k and not chosen:
        picks, gains = [first_row(first, rows.n, seed)], [0.0]
        chosen = picks[:]
    sums = _CosineSums(rows) if metric == "cosine" else _EuclideanSums(rows)
    sums.add(chosen)
    while len(picks) < k:
        found = _round(sums, chosen, k - len(picks))
        picks += [row for row, _ in found]
        gains += [gain for _, gain in found]
        if found:
            sums.add([row for row, _ in found])
    return np.array(picks, dtype=np.int64), np.array(gains, dtype=np.float64)


def _round(sums: "_CosineSums | _EuclideanSums", chosen: list[int], most: int) -> list[tuple[int, float]]:
    """Picks with their sums, at most so many; none when the candidates' bounds had to be settled first."""
    split = split_by_bound(sums.upper, CANDIDATES, slack=sums.slack(len(chosen)))
    candidates = split.rows
    exact = sums.exact(candidates, np.array(chosen, np.int64))
    sums.upper[candidates] = exact
    picked: list[tuple[int, float]] = []
    while len(picked) < min(most, len(candidates)):
        best = exact.max()
        at = int((exact >= best - max(TIE * best, split.slack)).argmax())  # ties: the lowest row
        row = int(candidates[at])
        if not split.is_beaten_by(best, row, raised=sums.most_raised([row for row, _ in picked])):
            break
        picked.append((row, float(exact[at])))
        chosen.append(row)
        exact += sums.distances(candidates, row)
        exact[at] = -np.inf
    return picked


class _CosineSums:
    """Upper bounds of every row's sum of cosine distances to the chosen rows, -inf for these."""

    def __init__(self, rows: Rows) -> None:
        self.upper = np.zeros(rows.n)
        self._rows, self._exact = rows, ExactDistances(rows)
        self._sum = torch.zeros(rows.d, dtype=torch.float64, device=rows.device)
        self._count = 0
        self._taken: list[int] = []
        # Probabilistic bound of a float32 product, as in k_center; the last 8 for the rounding of the sum itself.
        self._unit_error = 2.0**-24 * (8.0 * rows.d**0.5 + 16.0 + 8.0)

    def slack(self, count: int) -> float:
        """Sums of so many distances are differences of `count` and a product: their last bits are count's."""
        return TIE * count

    def add(self, picks: list[int]) -> None:
        """Take account of more chosen rows, in one pass."""
        self._taken += picks
        self._count += len(picks)
        self._sum += self._rows.exact(picks).sum(0)
        error = self._unit_error * float(torch.linalg.vector_norm(self._sum))
        direction = self._sum.float()
        if self._rows.is_mapped:
            products = [(start, block @ direction) for start, block in self._rows.blocks()]
        else:
            products = [(0, self._rows.whole() @ direction)]
        for start, product in products:
            self.upper[start : start + len(product)] = self._count - product.double().cpu().numpy() + error
        self.upper[self._taken] = -np.inf

    def exact(self, candidates: NDArray[np.int64], chosen: NDArray[np.int64]) -> NDArray[np.float64]:
        """Float64 sums of the candidates."""
        sums: NDArray[np.float64] = self._count - (self._rows.exact(candidates) @ self._sum).cpu().numpy()
        return sums

    def distances(self, candidates: NDArray[np.int64], row: int) -> NDArray[np.float64]:
        """Float64 [b]: of the candidates from a row."""
        halves: NDArray[np.float64] = self._exact.squares(candidates, np.array([row])).cpu().numpy()[:, 0] / 2
        return halves

    def most_raised(self, picks: list[int]) -> float:
        """By how much these picks can raise any row's sum: their number, and at most the length of their sum."""
        if not picks:
            return 0.0
        return len(picks) + float(torch.linalg.vector_norm(self._rows.exact(picks).sum(0)))


class _EuclideanSums:
    """Upper bounds of every row's sum of Euclidean distances to the chosen rows, -inf for these."""

    def __init__(self, rows: Rows) -> None:
        self.upper = np.zeros(rows.n)
        self._rows, self._exact = rows, ExactDistances(rows)
        self._taken: list[int] = []
        self._longest = float(rows.lengths.max(initial=0.0))
        self._square_error = self._exact.scale / 2 * 2.0**-24 * (8.0 * rows.d**0.5 + 16.0)

    def slack(self, count: int) -> float:
        """Sums err relative to themselves."""
        return 0.0

    def add(self, picks: list[int]) -> None:
        """Take account of more chosen rows, in one pass."""
        self._taken += picks
        for first in range(0, len(picks), CHOSEN_AT_A_TIME):
            centres = self._rows.exact(picks[first : first + CHOSEN_AT_A_TIME]).float()
            norms = centres.double().square().sum(1).float()
            for start, block in self._rows.blocks(BLOCK_ROWS):
                own = block.double().square().sum(1).float()
                squares = torch.addmm(norms.expand(len(block), -1), block, centres.T, alpha=-2).add_(own[:, None])
                # At least the distance itself: the error is added under the root.
                bounds = squares.clamp_(min=0).add_(self._square_error).sqrt_().sum(1, dtype=torch.float64)
                self.upper[start : start + len(block)] += bounds.cpu().numpy() * (1 + 2.0**-22)
        self.upper[self._taken] = -np.inf

    def exact(self, candidates: NDArray[np.int64], chosen: NDArray[np.int64]) -> NDArray[np.float64]:
        """Float64 sums of the candidates."""
        sums = np.zeros(len(candidates))
        for start in range(0, len(chosen), CHOSEN_AT_A_TIME):
            sums += self._exact.distances(candidates, chosen[start : start + CHOSEN_AT_A_TIME]).sum(1)
        return sums

    def distances(self, candidates: NDArray[np.int64], row: int) -> NDArray[np.float64]:
        """Float64 [b]: of the candidates from a row."""
        return self._exact.distances(candidates, np.array([row]))[:, 0]

    def most_raised(self, picks: list[int]) -> float:
        """By how much these picks can raise any row's sum."""
        return float(sum(self._longest + self._rows.lengths[row] for row in picks))
