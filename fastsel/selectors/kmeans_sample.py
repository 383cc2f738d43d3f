"""Rows spread over k-means clusters."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastsel.errors import UsageError
from fastsel.selectors.clustering import assign, kmeans
from fastsel.selectors.rows import Rows, check_k, check_rows

RULES = ("nearest", "random")
ALLOCATIONS = ("proportional", "largest_remainder", "equal")


def kmeans_sample(
    x: Any,
    k: int,
    *,
    clusters: int = 100,
    rule: str = "nearest",
    allocation: str = "proportional",
    spherical: bool = False,
    iterations: int = 20,
    seed: int = 42,
    initial: ArrayLike | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Cluster the rows, give every cluster its share of k, and take that many rows from it.

    Args:
        x: [n, d] finite numbers; numpy, mapped from a file, or torch on any device.
        k: how many; all rows when there are fewer.
        clusters: number of clusters, at most n.
        rule: which rows of a cluster come first: "nearest" to its centroid, or "random".
        allocation: a cluster's share. "proportional" to its size, one row after another, by the method of Sainte-Lague:
            the next row goes to the cluster with the largest size / (2 taken + 1). "largest_remainder": the whole parts
            of k size / n, then one more where the rest is largest (of equals, the lower cluster). "equal": in turns.
        spherical: rows and centroids at unit length, compared by their cosine.
        iterations, seed: of k-means, as in faiss; the seed also draws the "random" order.
        initial: row numbers chosen before; they count for their clusters and are not returned.

    Returns:
        indices int64 [k], and gains float64 [k]: minus the squared distance to the row's centroid (cosine - 1 when
        spherical). Ties go to the lowest row. The first j are the selection for k = j, except by largest
        remainder, which may take a row back when k grows (the Alabama paradox).

    Raises:
        MissingExtraError: faiss is not installed.
        UsageError: a row is not finite (it is named), or an argument is not as above.

    Cost: 2 iterations min(n, 256 clusters) clusters d + 2 n clusters d flops; 40 n bytes.
    Source: k-means as a baseline of NovelSum (arXiv 2502.17184), which states neither its clusters nor its shares.
    """
    if rule not in RULES:
        raise UsageError(f"rule must be one of {', '.join(RULES)}; got {rule!r}")
    if allocation not in ALLOCATIONS:
        raise UsageError(f"allocation must be one of {', '.join(ALLOCATIONS)}; got {allocation!r}")
    rows = Rows(x, unit=spherical)
    chosen = check_rows(initial, rows.n, "initial")
    k = check_k(k, rows.n - len(chosen))
    if k == 0:
        return np.zeros(0, np.int64), np.zeros(0)
    centroids = kmeans(rows, clusters, iterations=iterations, seed=seed, spherical=spherical)
    labels, distances = assign(rows, centroids, spherical=spherical)
    order_key = distances if rule == "nearest" else np.random.default_rng(seed).random(rows.n)
    is_new = np.ones(rows.n, bool)
    is_new[chosen] = False
    # Within a cluster: what was chosen before, then the others by the rule; place[i] is row i's number in that order.
    in_order = np.lexsort((np.arange(rows.n), order_key, is_new, labels))
    sizes = np.bincount(labels, minlength=len(centroids))
    place = np.empty(rows.n, np.int64)
    place[in_order] = np.arange(rows.n) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    if allocation == "equal":
        turn = place.astype(np.float64)
    else:
        turn = (2.0 * place + 1.0) / sizes[labels]
    is_allowed = is_new
    if allocation == "largest_remainder":
        is_allowed = is_new & (place < _largest_remainder(sizes, k + len(chosen))[labels])
    ranked = np.lexsort((np.arange(rows.n), labels, turn))
    indices = ranked[is_allowed[ranked]][:k].astype(np.int64)
    if len(indices) < k:  # earlier rows crowd a cluster beyond its share: the others' next rows fill up
        rest = ranked[is_new[ranked] & ~is_allowed[ranked]]
        indices = np.concatenate([indices, rest[: k - len(indices)].astype(np.int64)])
    return indices, -distances[indices]


def _largest_remainder(sizes: NDArray[np.int64], k: int) -> NDArray[np.int64]:
    """Int64 [c] that sums to k: shares of sizes, in whole numbers, no float involved."""
    shares, rests = np.divmod(sizes * k, int(sizes.sum()))
    more = np.argsort(-rests, kind="stable")[: k - int(shares.sum())]
    shares[more] += 1
    return shares
