"""The representation filter of DEITA: go down the rows, keep each that is not too similar to one kept before.

A block of rows meets the kept rows in one matrix product for each few thousand of them; only what no kept row rejects
is compared with its own block, where rows decide one after the other. A row that was rejected rejects nothing.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from fastsel.errors import UsageError
from fastsel.selectors.rows import Rows, check_k, check_rows, check_values

BLOCK_ROWS = 1024
KEPT_AT_A_TIME = 4096  # 1,024 x 4,096 float32 products are 17 MB
# A cosine this close to the threshold is equal to it: float64 rounds products of unit rows to about 1e-15.
TIE = 1e-12


def repr_filter(
    x: Any,
    k: int | None = None,
    *,
    threshold: float = 0.9,
    order: ArrayLike | None = None,
    scores: ArrayLike | None = None,
    initial: ArrayLike | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Rows, in the order given, whose cosine to every row kept before is at most the threshold.

    Args:
        x: [n, d] finite numbers; numpy, mapped from a file, or torch on any device. A row of zeros has cosine 0.
        k: stop after so many; None goes through all rows. Fewer come back where more are too similar.
        threshold: -1 to 1; a row is dropped when a cosine is larger, not when it is equal.
        order: row numbers in the order in which they are looked at; rows left out are never kept.
        scores: [n] numbers instead of an order: the highest first, the lowest row among equals. Without either, the
            order of the rows.
        initial: row numbers kept before; they reject others and are not returned.

    Returns:
        indices int64, in the order kept, and gains float64: 1 less the largest cosine to a row kept before, infinite
        for the first of all. Which rows are kept is decided in float64 wherever float32 leaves a doubt; which kept row
        is the most similar is not, so that a gain may err by about 1e-6. The first j are the selection for k = j.

    Raises:
        UsageError: a row is not finite (it is named), or an argument is not as above.

    Cost: at most 2 d flops for each row and kept row before it, in matrix products; no more than 60 MB beside x and,
        unless x is mapped from a file, a float32 copy at unit length.
    Source: "Repr Filter" of DEITA, Liu et al., ICLR 2024 (arXiv 2312.15685); with one row at a time, as the authors'
        IterativeFilter with batch_size=1. Its larger batches let rows reject that were themselves rejected.
    """
    if not isinstance(threshold, (int, float)) or not -1 <= threshold <= 1:
        raise UsageError(f"threshold must be a cosine from -1 to 1, got {threshold!r}")
    if order is not None and scores is not None:
        raise UsageError("give an order or scores, not both")
    rows = Rows(x, unit=True)
    kept = [int(row) for row in check_rows(initial, rows.n, "initial")]
    if scores is not None:
        queue: NDArray[np.int64] = np.argsort(-check_values(scores, rows.n, "scores"), kind="stable").astype(np.int64)
    else:
        queue = np.arange(rows.n) if order is None else check_rows(order, rows.n, "order")
    queue = queue[~np.isin(queue, kept)]
    k = check_k(len(queue) if k is None else k, len(queue))
    if not rows.is_mapped:
        rows.whole()  # take() then reads the unit rows instead of making them each time
    indices: list[int] = []
    gains: list[float] = []
    for start in range(0, len(queue), BLOCK_ROWS):
        if len(indices) >= k:
            break
        left, nearest = _not_rejected(rows, queue[start : start + BLOCK_ROWS], np.array(kept, np.int64), threshold)
        for row, cosine in _one_after_the_other(rows, left, nearest, threshold)[: k - len(indices)]:
            kept.append(row)
            indices.append(row)
            gains.append(1 - cosine)
    return np.array(indices, dtype=np.int64), np.array(gains, dtype=np.float64)


def _not_rejected(
    rows: Rows, block: NDArray[np.int64], kept: NDArray[np.int64], threshold: float
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The rows of the block that no kept row rejects, and their largest cosines to kept rows (-inf without any)."""
    # A float32 product of unit rows errs by more than 8 sqrt(d) roundings once in 10^13 times.
    error = 2.0**-24 * (8.0 * rows.d**0.5 + 16.0)
    nearest = np.full(len(block), -np.inf)
    for start in range(0, len(kept), KEPT_AT_A_TIME):
        chunk = kept[start : start + KEPT_AT_A_TIME]
        cosines = rows.take(block) @ rows.take(chunk).T
        most, which = (found.cpu().numpy() for found in cosines.max(1))
        is_rejected = most > threshold + error
        for at in np.flatnonzero(~is_rejected & (most >= threshold - error)):
            doubtful = chunk[(cosines[int(at)] >= threshold - error).cpu().numpy()]
            is_rejected[at] = _cosines(rows, np.full(len(doubtful), block[at]), doubtful).max() > threshold + TIE
        stays = np.flatnonzero(~is_rejected)
        block, nearest = block[stays], nearest[stays]
        np.maximum(nearest, _cosines(rows, block, chunk[which[stays]]), out=nearest)
    return block, nearest


def _one_after_the_other(
    rows: Rows, block: NDArray[np.int64], nearest: NDArray[np.float64], threshold: float
) -> list[tuple[int, float]]:
    """What is kept of a block when only kept rows reject, each with its largest cosine to a row kept before."""
    exact = rows.exact(block)
    cosines = torch.clamp(exact @ exact.T, max=1.0).cpu().numpy()
    is_alive = np.ones(len(block), bool)
    found = []
    for at in range(len(block)):
        if is_alive[at]:
            found.append((int(block[at]), float(nearest[at])))
            is_alive &= cosines[at] <= threshold + TIE
            nearest = np.maximum(nearest, cosines[at])
    return found


def _cosines(rows: Rows, a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.float64]:
    """Float64 [m]: of each pair a[i], b[i]."""
    products: NDArray[np.float64] = (rows.exact(a) * rows.exact(b)).sum(1).clamp_(max=1.0).cpu().numpy()
    return products
