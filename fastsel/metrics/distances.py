"""Distances within a set: their sum, those to the nearest neighbours, and the spread of each feature."""

from typing import Any

import numpy as np
import torch

from fastsel.errors import UsageError
from fastsel.selectors.neighbours import nearest_rows
from fastsel.selectors.rows import Rows

METRICS = ("cosine", "euclidean", "sqeuclidean")
AVERAGES = ("none", "pairs", "all")
STATISTICS = ("mean", "kth")
BLOCK_ROWS = 2048


def dist_sum(x: Any, *, metric: str = "cosine", average: str = "none") -> float:
    """DistSum: the distances between all ordered pairs of different rows, added up.

    Args:
        x: [n, d] finite numbers; numpy, mapped from a file, or torch on any device.
        metric: "cosine" (1 - cos; a row of zeros is at distance 1 from every row, and from itself), "euclidean"
            (DistSum_L2), or "sqeuclidean".
        average: "none" adds up; "pairs" divides by the n (n - 1) pairs; "all" is the mean of the whole n x n matrix,
            its diagonal included, as cos_distance of NovelSum's code is.

    Returns:
        The sum or mean; 0 for one row ("pairs": NaN), NaN for none where it is a mean.

    Cost: cosine and sqeuclidean O(n d), from the sum of all rows: sum_ij cos_ij = |sum_i x_i|^2. euclidean n^2 d flops
        in float64, in tiles; no matrix [n, n].
    Source: the metrics that NovelSum (arXiv 2502.17184) compares with.
    """
    _check("metric", metric, METRICS)
    _check("average", average, AVERAGES)
    rows = Rows(x, unit=metric == "cosine")
    n = rows.n
    if metric == "cosine":
        total = torch.zeros(rows.d, dtype=torch.float64, device=rows.device)
        for start in range(0, n, BLOCK_ROWS):
            total += rows.exact(slice(start, min(n, start + BLOCK_ROWS))).sum(0)
        whole = n * n - float(total.square().sum())
        diagonal = float((rows.lengths == 0).sum())
        # Rounding may leave a trace below nothing where all rows are one.
        added = max(whole if average == "all" else whole - diagonal, 0.0)
    elif metric == "sqeuclidean":
        mean = _mean(rows)
        added = 0.0
        for start in range(0, n, BLOCK_ROWS):
            added += float((rows.exact(slice(start, min(n, start + BLOCK_ROWS))) - mean).square().sum())
        added *= 2.0 * n
    else:
        added = _euclidean_sum(rows)
    if average == "none":
        return added
    number = n * (n - 1) if average == "pairs" else n * n
    return added / number if number else float("nan")


def knn(x: Any, *, k: int = 5, metric: str = "euclidean", statistic: str = "mean") -> float:
    """KNN: how far a row's nearest neighbours among the other rows are, on average.

    Args:
        x: [n, d] finite numbers; numpy, mapped from a file, or torch on any device.
        k: neighbours of a row; with fewer other rows, all of them.
        metric: "euclidean", "cosine" (1 - cos) or "sqeuclidean".
        statistic: "mean" over the k nearest, as ODA-DataScorer (k = 5, euclidean); or "kth" only, as emb_diversity
            (k = 2, cosine).

    Returns:
        The mean over rows; NaN for fewer than two rows. A copy of a row is a neighbour at distance 0.

    Cost: 2 n^2 d flops in float32; distances of the neighbours are exact to one rounding.
    Source: the metrics that NovelSum (arXiv 2502.17184) compares with; its k is not stated.
    """
    _check("metric", metric, METRICS)
    _check("statistic", statistic, STATISTICS)
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
        raise UsageError(f"k must be a whole number of at least 1, got {k!r}")
    rows = Rows(x, unit=metric == "cosine")
    if rows.n < 2:
        return float("nan")
    k = min(int(k), rows.n - 1)
    found = nearest_rows(rows, rows, k, metric="dot" if metric == "cosine" else "sqeuclidean", excludes_itself=True)
    distances = found.values.double()
    if metric == "cosine":
        distances = (1.0 - distances).clamp(min=0)
    elif metric == "euclidean":
        distances = distances.sqrt()
    return float((distances.mean(1) if statistic == "mean" else distances[:, -1]).mean())


def radius(x: Any, *, least: float = 1e-10) -> float:
    """Radius: the geometric mean of the standard deviations of the features.

    Args:
        x: [n, d] finite numbers; numpy, mapped from a file, or torch on any device.
        least: stands in for a standard deviation (population, divided by n) of 0, as in ODA-DataScorer.

    Returns:
        (prod_h sigma_h)^(1/d); NaN without rows.

    Cost: O(n d), two passes.
    Source: Lai et al., "Diversity, Density, and Homogeneity", LREC 2020 (arXiv 2003.08529).
    """
    if not 0 < least < float("inf"):
        raise UsageError(f"least must be positive, got {least}")
    rows = Rows(x)
    if rows.n == 0:
        return float("nan")
    mean = _mean(rows)
    squares = torch.zeros(rows.d, dtype=torch.float64, device=rows.device)
    for start in range(0, rows.n, BLOCK_ROWS):
        squares += (rows.exact(slice(start, min(rows.n, start + BLOCK_ROWS))) - mean).square().sum(0)
    deviations = (squares / rows.n).sqrt()
    return float(torch.where(deviations > 0, deviations, least).log().mean().exp())


def _mean(rows: Rows) -> torch.Tensor:
    total = torch.zeros(rows.d, dtype=torch.float64, device=rows.device)
    for start in range(0, rows.n, BLOCK_ROWS):
        total += rows.exact(slice(start, min(rows.n, start + BLOCK_ROWS))).sum(0)
    return total / max(1, rows.n)


def _euclidean_sum(rows: Rows) -> float:
    """Each tile of pairs once, on one side of the diagonal; in float64, of rows less their mean."""
    mean, added = _mean(rows), 0.0
    for start in range(0, rows.n, BLOCK_ROWS):
        left = rows.exact(slice(start, min(rows.n, start + BLOCK_ROWS))) - mean
        left_squares = left.square().sum(1)
        for other in range(start, rows.n, BLOCK_ROWS):
            right = left if other == start else rows.exact(slice(other, min(rows.n, other + BLOCK_ROWS))) - mean
            squares = torch.addmm(left_squares[:, None] + right.square().sum(1), left, right.T, alpha=-2)
            if other == start:
                squares.fill_diagonal_(0)
            added += float(squares.clamp_(min=0).sqrt_().sum()) * (1.0 if other == start else 2.0)
    return added


def _check(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UsageError(f"{name} must be one of {', '.join(known)}; got {value!r}")
