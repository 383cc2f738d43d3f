"""k-center greedy as DiverseEvol's released code computes it: roots of float32 squares that may be below 0."""

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from fastsel.selectors.rows import check_k, check_rows

# Columns made in one product. One column alone would go another way through the BLAS, with other last bits, and where a
# square falls below 0 hangs on these.
COLUMNS = 16


def unclamped_k_center(x: Any, k: int, *, initial: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The k rows that OFA-Sys/DiverseEvol@a22e952 (KCenterSampling.query) adds to the rows `initial`.

    A distance is sqrt(-2 ab + |a|^2 + |b|^2) in float32. It is NaN for near-copies whose square rounds below 0; the
    least of several distances is NaN when one is, and NaN counts as the largest: near-copies of rows that are chosen
    come first. Which near-copies those are depends on the last bits of a matrix product, and so on the machine.

    Args:
        x: [n, d] numbers in memory.
        k: how many; all other rows when there are fewer.
        initial: row numbers chosen before, at least one; they are not returned.

    Returns:
        indices int64 [k], ascending as in that code, and gains float64 [k]: each distance as it was used, 0 for NaN.
    """
    points = torch.as_tensor(np.ascontiguousarray(x, dtype=np.float32))
    n = len(points)
    taken = check_rows(initial, n, "initial").tolist()
    norms = torch.cat([(part @ part.T).diagonal() for part in torch.split(points, 512)])
    nearest = torch.full((n,), torch.inf)

    def add(rows: list[int]) -> None:
        centres = torch.zeros(COLUMNS, points.shape[1])
        centres[: len(rows)] = points[rows]
        squares = (points @ centres.T)[:, : len(rows)].mul_(-2).add_(norms[:, None]).add_(norms[rows])
        torch.minimum(nearest, squares.sqrt_().amin(1), out=nearest)

    for start in range(0, len(taken), COLUMNS):
        add(taken[start : start + COLUMNS])
    picks: list[int] = []
    gains: list[float] = []
    for _ in range(check_k(k, n - len(taken))):
        nearest[taken] = -torch.inf
        row = int(nearest.argmax())
        picks.append(row)
        gains.append(float(nearest[row].nan_to_num(0.0)))
        taken.append(row)
        add([row])
    order = np.argsort(picks)
    return np.array(picks, np.int64)[order], np.array(gains, np.float64)[order]
