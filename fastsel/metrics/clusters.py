"""Clusters: how far rows lie from theirs, and how evenly a set is spread over those of a reference."""

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastsel.errors import UsageError
from fastsel.selectors.clustering import assign, kmeans
from fastsel.selectors.rows import Rows


def cluster_inertia(
    x: Any,
    *,
    clusters: int = 200,
    metric: str = "sqeuclidean",
    iterations: int = 20,
    seed: int = 42,
    centroids: ArrayLike | None = None,
) -> float:
    """Cluster inertia: the distances of the rows to the nearest of the centroids of their own k-means, added up.

    Args:
        x: [n, d] finite numbers; numpy, mapped from a file, or torch on any device.
        clusters: 200 as emb_diversity has it, for sets of 10,000 rows; at most n.
        metric: "sqeuclidean", or "cosine" (1 - cos to the centroid, which is what ODA-DataScorer takes unless told).
        iterations, seed: of faiss' k-means.
        centroids: [clusters, d] to use instead, as ODA-DataScorer is given them.

    Returns:
        The sum; 0 without rows.

    Raises:
        MissingExtraError: faiss is not installed, and there are no centroids.

    Cost: 2 iterations min(n, 256 clusters) clusters d + 2 n clusters d flops.
    Source: Du & Black, "Boosting Dialog Response Generation", ACL 2019; as in NovelSum (arXiv 2502.17184).
    """
    if metric not in ("sqeuclidean", "cosine"):
        raise UsageError(f"metric must be one of sqeuclidean, cosine; got {metric!r}")
    rows = Rows(x)
    if rows.n == 0:
        return 0.0
    if centroids is None:
        found = kmeans(rows, clusters, iterations=iterations, seed=seed)
    else:
        found = Rows(centroids, name="centroids").whole().cpu().numpy()
    if metric == "sqeuclidean":
        return float(assign(rows, found)[1].sum())
    directions = Rows(found, unit=True).whole().numpy()
    return float(assign(Rows(x, unit=True), directions, spherical=True)[1].sum())


def partition_entropy(
    x: Any,
    reference: Any = None,
    *,
    clusters: int = 100,
    base: float = 2.0,
    normalised: bool = False,
    iterations: int = 20,
    seed: int = 42,
    centroids: ArrayLike | None = None,
) -> float:
    """Partition entropy: how evenly the rows fall into the clusters of a reference.

        -sum_c p_c log p_c,   p_c the share of the rows in cluster c

    Args:
        x: [n, d] finite numbers; numpy, mapped from a file, or torch on any device.
        reference: [m, d] the pool whose clusters count.
        clusters, iterations, seed: of faiss' k-means: 100, 20 and 42 as in entropy.py of NovelSum's code; faiss takes
            256 rows of the reference for each cluster.
        base: of the logarithm: 2 as NovelSum's code; math.e as ODA-DataScorer.
        normalised: divide by the logarithm of the number of clusters, as ODA-DataScorer also reports.
        centroids: [clusters, d] to use instead of a reference's.

    Returns:
        Between 0 and log(clusters); NaN without rows.

    Raises:
        MissingExtraError: faiss is not installed, and there are no centroids.
        UsageError: neither a reference nor centroids.

    Cost: 2 iterations min(m, 256 clusters) clusters d + 2 n clusters d flops.
    Source: Han et al., "Measuring and Improving the Semantic Diversity of Dialogue Generation", 2022; as in NovelSum.
    """
    if not (base > 1 and math.isfinite(base)):
        raise UsageError(f"base must be above 1, got {base}")
    rows = Rows(x)
    if centroids is None:
        if reference is None:
            raise UsageError("partition_entropy needs a reference: it counts the clusters of a pool")
        found = reference_centroids(reference, clusters=clusters, iterations=iterations, seed=seed)
    else:
        found = Rows(centroids, name="centroids").whole().cpu().numpy()
    if rows.n == 0:
        return float("nan")
    shares = np.bincount(assign(rows, found)[0]) / rows.n
    shares = shares[shares > 0]
    entropy = max(0.0, -float((shares * np.log(shares)).sum()))
    if normalised:
        return entropy / math.log(len(found)) if len(found) > 1 else 0.0
    return entropy / math.log(base)


def reference_centroids(
    reference: Any, *, clusters: int = 100, iterations: int = 20, seed: int = 42
) -> NDArray[np.float32]:
    """Float32 [clusters, d]: what partition_entropy computes of a reference, to be used for several sets."""
    return kmeans(Rows(reference, name="reference"), clusters, iterations=iterations, seed=seed)
