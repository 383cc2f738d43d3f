"""The contract of topk_similarity and the table of its implementations."""

from typing import NamedTuple

import torch

from fastsel.kernels._runtime.checks import check_tensor
from fastsel.kernels._runtime.dispatch import run

IMPLEMENTATIONS = {  # tried in this order
    "triton": "fastsel.kernels.topk_similarity.gpu_triton",
    "native": "fastsel.kernels.topk_similarity.cpu_native",
    "torch": "fastsel.kernels.topk_similarity.torch_blocked",
    "reference": "fastsel.kernels.topk_similarity.reference",
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
METRICS = ("dot", "sqeuclidean")


class TopK(NamedTuple):
    """The most similar points of each query, best first; minimum is None unless it was asked for."""

    values: torch.Tensor
    indices: torch.Tensor
    minimum: torch.Tensor | None = None


def topk_similarity(
    queries: torch.Tensor,
    points: torch.Tensor,
    k: int,
    *,
    metric: str = "dot",
    exclude: torch.Tensor | None = None,
    minimum: bool = False,
    implementation: str = "auto",
) -> TopK:
    """The k points most similar to each query, and the similarity of the least similar one, without storing the rest.

        dot:          s[i, j] = sum_c queries[i, c] points[j, c]             largest first; cosine for unit rows
        sqeuclidean:  s[i, j] = sum_c (queries[i, c] - points[j, c])^2       smallest first

    Args:
        queries: [b, d] float32 | bfloat16 | float16 | float64; any stride; b may be 0.
        points: [n, d] same dtype and device; any stride; n may be 0; d >= 1.
        k: how many points a query gets, at least 1.
        metric: "dot" or "sqeuclidean".
        exclude: [b] int64, or None: a point that the query must not get (itself, say); -1 excludes none.
        minimum: whether the similarity to the least similar point is wanted too.
        implementation: "auto", "triton", "native", "torch" or "reference".

    Returns:
        TopK. values [b, k] float32 (float64 for float64 inputs), best first; indices [b, k] int64. Where fewer than k
        points are left, values are -inf (dot) or +inf (sqeuclidean) and indices -1. minimum [b]: the smallest dot
        product, or the largest squared distance, over all points, the excluded one too; +inf or -inf without points.
        A similarity that is NaN, or infinitely bad, is as if the point were not there.

    Raises:
        ValueError: shapes, dtypes, devices, k, metric or exclude do not match the above.
        NoImplementationError: the implementation asked for cannot take these inputs; the message says why.

    Ties and exactness: equal similarities go to the lowest point. Products are made in float32 (for distances, of rows
        less the mean of the points); the best k + 5 of each query are then computed again in float64, distances as
        differences, and ordered by that, so that values are right to one rounding. A point can be missed only where
        more than 5 others agree with it to within the rounding of float32 products; points with equal entries tie
        exactly. minimum is right to the rounding of those products.
    Determinism: the same bits from run to run. native: a query's bits depend on that query and on points only, not on
        the other queries or the number of threads.
    Cost: 2 b n d flops (native: half of them where queries are points themselves, the same memory, from 1,000 rows on
        and without minimum); queries and points are read; about k (1 + ln(n / k)) insertions a query; 2 b (k + 5) d
        flops in float64. Extra memory: native 12 b (k + 5) bytes, a few times that when there are few queries, and
        about 0.5 MB a thread; torch about 20 MB; triton 8 to 16 b (k + 5) bytes for each slice
        of the points, 4 n for their lengths. Never an array [b, n].
    Source: exact search by brute force, as IndexFlat of Johnson, Douze & Jegou, "Billion-scale similarity search with
        GPUs", 2017 (arXiv 1702.08734); the running minimum serves bounds of selectors at no pass of its own.
    """
    check_tensor("queries", queries, ("b", "d"), dtypes=DTYPES)
    b, d = queries.shape
    check_tensor("points", points, ("n", d), dtypes=(queries.dtype,), device=queries.device)
    if d < 1:
        raise ValueError(f"queries must have at least one column, got {list(queries.shape)}")
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k must be a whole number of at least 1, got {k!r}")
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}; got {metric!r}")
    if exclude is not None:
        check_tensor("exclude", exclude, (b,), dtypes=(torch.int64,), device=queries.device)
    with torch.no_grad():
        values = run(IMPLEMENTATIONS, implementation, queries, points, k, metric, exclude, bool(minimum))
    return TopK(**values)
