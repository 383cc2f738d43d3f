"""k-means by cosine, from rows drawn or given: ClusterUCB's clusters."""

from random import Random

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from fastsel.errors import UsageError
from fastsel.kernels.topk_similarity import topk_similarity
from fastsel.selectors.rows import BLOCK_ROWS, BLOCK_VALUES, Rows, check_rows


def spherical_kmeans(
    x: Rows,
    clusters: int,
    *,
    iterations: int = 20,
    seed: int = 42,
    initial: ArrayLike | None = None,
    official: bool = False,
    implementation: str = "auto",
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Lloyd's iterations: a row goes to the centroid of the largest inner product, a centroid to its rows' direction.

    Args:
        x: [n, d] rows, read at unit length.
        clusters: how many; at most n.
        iterations: at most; fewer when no row changes its cluster.
        seed: of the first centroids: rows random.Random(seed).sample(range(n), clusters), as the authors draw them.
        initial: row numbers [clusters] to begin with instead.
        official: as in the authors' code, labels are those that the last centroids were made of, and a cluster that
            became empty keeps a centroid of zeros (which draws rows that point away from all others). Otherwise labels
            are the nearest of the centroids returned, and an empty cluster begins anew at the row that is least similar
            to its own centroid.
        implementation: of topk_similarity.

    Returns:
        labels int64 [n], and centroids float32 [clusters, d] of unit length. Ties go to the lowest centroid.

    Raises:
        UsageError: clusters or iterations below 1, no rows, or initial is not as above.

    Determinism: the same bits whatever the number of threads; sums run in float64 over rows in order.
    Cost: 2 iterations n clusters d flops in float32; memory 8 clusters d bytes and blocks of rows.
    Source: ClusterUCB's kmeans_clustering.py, ZigeW/ClusterUCB@8cbd9f0; Dhillon & Modha, Machine Learning 42, 2001.
    """
    for name, value in (("clusters", clusters), ("iterations", iterations)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
            raise UsageError(f"{name} must be a whole number of at least 1, got {value!r}")
    if x.n == 0:
        raise UsageError("there are no rows to cluster")
    k = min(int(clusters), x.n)
    if initial is None:
        first = np.array(Random(seed).sample(range(x.n), k), np.int64)
    else:
        first = check_rows(initial, x.n, "initial")
        if len(first) != k:
            raise UsageError(f"initial has {len(first)} rows, for {k} clusters")
    centroids = x.take(first)
    labels = np.full(x.n, -1, np.int64)
    is_settled = False
    for _ in range(int(iterations)):
        before = labels
        labels, sums, farthest = _step(x, centroids, k if not official else 0, implementation)
        is_settled = bool((labels == before).all())
        if is_settled:
            break
        lengths = np.linalg.norm(sums, axis=1, keepdims=True)
        means = np.divide(sums, lengths, out=np.zeros_like(sums), where=lengths > 0)
        if not official:
            empty = np.flatnonzero(np.bincount(labels, minlength=k) == 0)
            means[empty] = x.exact(farthest[: len(empty)]).cpu().numpy()
        centroids = torch.from_numpy(means).float().to(x.device)
    if not official and not is_settled:
        labels = _step(x, centroids, 0, implementation)[0]
    return labels, centroids.cpu().numpy().copy()


def _step(
    x: Rows, centroids: torch.Tensor, n_far: int, implementation: str
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
    """Labels [n]; sums of each cluster's rows [clusters, d]; the n_far rows least similar to their centroid."""
    labels = np.zeros(x.n, np.int64)
    nearness = np.zeros(x.n)
    sums = np.zeros(tuple(centroids.shape))
    for start, block in x.blocks(min(BLOCK_ROWS, max(1, BLOCK_VALUES // x.d))):
        found = topk_similarity(block, centroids, 1, implementation=implementation)
        part = slice(start, start + len(block))
        labels[part] = found.indices[:, 0].cpu().numpy()
        nearness[part] = found.values[:, 0].cpu().numpy()
        order = np.argsort(labels[part], kind="stable")
        here, begins = np.unique(labels[part][order], return_index=True)
        sums[here] += np.add.reduceat(block.cpu().numpy()[order].astype(np.float64), begins, axis=0)
    return labels, sums, np.argsort(nearness, kind="stable")[:n_far]
