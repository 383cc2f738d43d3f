"""k-means centroids (faiss), and each row's nearest one."""

import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastsel.errors import MissingExtraError, UsageError
from fastsel.selectors.neighbours import nearest_rows
from fastsel.selectors.rows import Rows


def kmeans(
    x: Rows, clusters: int, *, iterations: int = 20, seed: int = 42, spherical: bool = False, per_cluster: int = 256
) -> NDArray[np.float32]:
    """Centroids by Lloyd's iterations, as faiss.Kmeans(d, clusters, niter=iterations, seed=seed) finds them.

    Args:
        x: the rows. Only the training sample is read: at most per_cluster * clusters rows, those that faiss would take.
        clusters: how many; at most as many as there are rows.
        iterations: of Lloyd's algorithm, from random rows.
        seed: of the sample and the first centroids.
        spherical: centroids are brought to unit length after every iteration.
        per_cluster: rows of the sample for each centroid.

    Returns:
        Float32 [clusters, d].

    Raises:
        MissingExtraError: faiss is not installed.
        UsageError: clusters, iterations or per_cluster below 1, or no rows.
    """
    for name, value in (("clusters", clusters), ("iterations", iterations), ("per_cluster", per_cluster)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
            raise UsageError(f"{name} must be a whole number of at least 1, got {value!r}")
    if x.n == 0:
        raise UsageError("there are no rows to cluster")
    faiss = _faiss()
    clusters = min(int(clusters), x.n)
    sample: Any = slice(0, x.n)
    if x.n > clusters * per_cluster:
        # The rows that faiss takes when it is given all of them, in its order.
        order = np.zeros(x.n, np.int32)
        faiss.rand_perm(faiss.swig_ptr(order), x.n, seed)
        sample = order[: clusters * per_cluster].astype(np.int64)
    taken = np.ascontiguousarray(x.take(sample).cpu().numpy())
    trained = faiss.Kmeans(
        x.d, clusters, niter=int(iterations), seed=int(seed), spherical=spherical,
        min_points_per_centroid=1, max_points_per_centroid=len(taken),
    )  # fmt: skip
    trained.train(taken)
    return np.array(trained.centroids, dtype=np.float32).reshape(clusters, x.d)


def assign(
    x: Rows, centroids: NDArray[np.float32], *, spherical: bool = False
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Each row's nearest centroid, int64 [n], and the squared distance to it, float64 [n] (1 - the dot product when
    spherical); ties go to the lowest centroid.
    """
    if centroids.ndim != 2 or centroids.shape[1] != x.d or len(centroids) < 1:
        raise UsageError(f"centroids must be [clusters, {x.d}], got {list(centroids.shape)}")
    points = Rows(torch.from_numpy(np.ascontiguousarray(centroids, np.float32)).to(x.device), name="centroids")
    found = nearest_rows(x, points, 1, metric="dot" if spherical else "sqeuclidean")
    values = found.values[:, 0].double().cpu().numpy()
    return found.indices[:, 0].cpu().numpy(), 1.0 - values if spherical else values


def _faiss() -> Any:
    try:
        with warnings.catch_warnings():  # its SWIG types have no module on Python 3.12 and above
            warnings.simplefilter("ignore", DeprecationWarning)
            import faiss
    except ModuleNotFoundError:
        raise MissingExtraError("k-means", "faiss-cpu", "diversity") from None
    return faiss
