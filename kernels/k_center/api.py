"""The contract of k_center and the table of its implementations."""

from typing import NamedTuple

import torch

from fastsel.kernels._runtime.checks import check_tensor
from fastsel.kernels._runtime.dispatch import run

IMPLEMENTATIONS = {  # tried in this order
    "triton": "fastsel.kernels.k_center.gpu_triton",
    "native": "fastsel.kernels.k_center.cpu_native",
    "torch": "fastsel.kernels.k_center.torch_blocked",
    "reference": "fastsel.kernels.k_center.reference",
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FARTHEST_BLOCK = 128  # consecutive points that share one entry of KCenter.farthest


class KCenter(NamedTuple):
    """nearest: [m]; farthest: [ceil(m / FARTHEST_BLOCK)] int64, for each block of points where its largest stands."""

    nearest: torch.Tensor
    farthest: torch.Tensor


def k_center(
    points: torch.Tensor,
    centres: torch.Tensor,
    nearest: torch.Tensor | None = None,
    *,
    rows: torch.Tensor | None = None,
    point_sqnorms: torch.Tensor | None = None,
    centre_sqnorms: torch.Tensor | None = None,
    implementation: str = "auto",
) -> KCenter:
    """Squared distance of each point to its nearest centre, after a block of new centres has been added.

        square[i, j] = max(0, point_sqnorms[i] + centre_sqnorms[j] - 2 sum_k points[i, k] centres[j, k])
        out[i] = min(nearest[i], min_j square[i, j])
        farthest[c] = the first i of 128 c <= i < 128 (c + 1) with the largest out[i]

    With `rows`, i runs over those rows of points only, in the order given: row rows[i] stands for points[i].

    Args:
        points: [n, d] float32 | bfloat16 | float16 | float64, finite; any stride; n may be 0, d >= 1.
        centres: [b, d] same dtype and device, finite; any stride; b >= 1.
        nearest: [m] float32 (float64 for float64 points), so far; None = no centre yet, infinity. Not written to.
        rows: [m] int64, 0 to n - 1, any order; None = all, m = n.
        point_sqnorms: [n] as nearest; the squared lengths of the points, computed when None. Giving 1 for a row of
            zeros beside unit rows makes half of a square the cosine distance, 1 for such a row.
        centre_sqnorms: [b] likewise.
        implementation: "auto", "triton", "native", "torch" or "reference".

    Returns:
        KCenter(nearest [m] float32 (float64 for float64 points), farthest [ceil(m / 128)] int64, indices into nearest).

    Raises:
        ValueError: shapes, dtypes, devices or row numbers do not match the above.
        NoImplementationError: the implementation asked for cannot take these inputs; the message says why.

    Ties: farthest is the lowest index. A NaN among the points or centres is not looked for.
    Accuracy: the square is a difference of larger numbers. A point closer to its centre than about 1e-3 of its length
        has few correct digits in float32, a duplicate has 0 plus or minus about 2e-7 of its squared length times the
        root of d. Callers who must decide keep that margin and decide in float64 (fastsel.selectors.k_center does).
    Determinism: the same bits from run to run; native: whatever the number of threads, of points and of centres.
    Cost: 2 m b d flops; points are read once, whatever b; 8 m bytes beside them. Extra memory, native: 4 b d bytes for
        packed centres and 260 d bytes a thread; torch: about 12 MB; never an array [m, b].
    Source: farthest-first traversal, Gonzalez, "Clustering to minimize the maximum intercluster distance", 1985; as
        k-center greedy in Sener & Savarese, "Active learning for convolutional neural networks: a core-set approach",
        ICLR 2018 (arXiv 1708.00489). One read of the points serves a block of centres.
    """
    check_tensor("points", points, ("n", "d"), dtypes=DTYPES)
    n, d = points.shape
    check_tensor("centres", centres, ("b", d), dtypes=(points.dtype,), device=points.device)
    if len(centres) < 1 or d < 1:
        raise ValueError(f"centres must have at least one row and one column, got {list(centres.shape)}")
    dtype = torch.float64 if points.dtype == torch.float64 else torch.float32
    m = n
    if rows is not None:
        check_tensor("rows", rows, ("m",), dtypes=(torch.int64,), device=points.device)
        m = len(rows)
        if m and (int(rows.min()) < 0 or int(rows.max()) >= n):
            raise ValueError(f"rows must be 0 to {n - 1}, got {int(rows.min())} to {int(rows.max())}")
    if nearest is not None:
        check_tensor("nearest", nearest, (m,), dtypes=(dtype,), device=points.device)
    with torch.no_grad():
        sqnorms = []
        for name, matrix, given in (
            ("point_sqnorms", points, point_sqnorms),
            ("centre_sqnorms", centres, centre_sqnorms),
        ):
            if given is None:
                given = torch.linalg.vector_norm(matrix, dim=1, dtype=dtype).square_()
            check_tensor(name, given, (len(matrix),), dtypes=(dtype,), device=points.device)
            sqnorms.append(given)
        return KCenter(*run(IMPLEMENTATIONS, implementation, points, centres, nearest, rows, *sqnorms))
