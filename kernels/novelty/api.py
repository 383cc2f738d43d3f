"""The contract of novelty and the table of its implementations."""

import torch

from fastsel.kernels._runtime.checks import check_tensor
from fastsel.kernels._runtime.dispatch import run

IMPLEMENTATIONS = {  # tried in this order
    "triton": "fastsel.kernels.novelty.gpu_triton",
    "native": "fastsel.kernels.novelty.cpu_native",
    "torch": "fastsel.kernels.novelty.torch_blocked",
    "reference": "fastsel.kernels.novelty.reference",
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
RANKINGS = ("weighted", "distance", "order")
# Float64 distances rank by multiples of this: rounding, which differs from one product to another, is below it.
DISTANCE_STEP = 2.0**-40


def distance_keys(distances: torch.Tensor) -> torch.Tensor:
    """What "distance" sorts by: distances as they are, in float64 rounded to DISTANCE_STEP."""
    return (distances / DISTANCE_STEP).round_() if distances.dtype == torch.float64 else distances


def novelty(
    rows: torch.Tensor,
    picks: torch.Tensor,
    weights: torch.Tensor,
    row_density: torch.Tensor | None = None,
    pick_density: torch.Tensor | None = None,
    *,
    rank_by: str = "weighted",
    implementation: str = "auto",
) -> torch.Tensor:
    """Sum over the picks of their distance to each row, weighted by density and by rank of nearness.

        D[i, j] = 1 - rows[i] . picks[j]
        A[i, j] = D[i, j] * c,   c = row_density[i] + pick_density[j] where both are given, the one that is given, or 1
        novelty[i] = sum_r weights[r] A[i, j_r],   j_1, j_2, ... the picks in the order that rank_by names:
            "weighted"  by A, smallest first
            "distance"  by D, smallest first; where D is equal (in float64: to 2^-40), by A
            "order"     as the picks are given: nothing is sorted

    For weights that do not increase, "weighted" is the least that any order of the picks gives (the rearrangement
    inequality). So the append bound of greedy selection is one call with "order": what a row scored against t picks,
    plus the "order" sum over the picks that came later with the weights of their places t + 1, t + 2, ..., is no less
    than its score against all of them.

    Args:
        rows: [n, d] float32 | bfloat16 | float16 | float64, at unit length for cosine distances; n may be 0.
        picks: [t, d] same dtype and device; t may be 0, d >= 1.
        weights: [t] or [t, s] float64: of the ranks from the nearest on; s sets of weights share one sorting.
        row_density: [n] float64 or None.    pick_density: [t] float64 or None.
        rank_by: "weighted", "distance" or "order".
        implementation: "auto", "triton", "native", "torch" or "reference".

    Returns:
        [n], or [n, s] where weights is: float32, float64 for float64 inputs. A row that is not finite makes its own
        result NaN or infinite and no other's; a pick that is not finite spoils every row.

    Raises:
        ValueError: shapes, dtypes, devices or rank_by do not match the above.
        NoImplementationError: the implementation asked for cannot take these inputs; the message says why.

    Ties: equal values have equal weights to share, so that their order changes nothing: permuting the picks changes
        no result but by rounding (except with "order").
    Determinism: the same bits from run to run. native: a row's bits depend on that row, the picks and the weights
        only, not on the other rows or the number of threads.
    Cost: "order": 2 n d flops (4 n d with row_density) a set of weights, whatever t is, as the sum over the picks is
        taken before the product with the rows; rows are read once. Others: 2 n t d flops and a sort of t values a
        row. Products in float32 at least, sums over the ranks in float64. Extra memory: native 4 bytes x t x 256 rows
        at most, torch 16 MB and what torch.sort takes for it, triton 4 (8 for "distance") n t bytes.
    Source: Yang et al., "Measuring Data Diversity for Instruction Tuning: A Systematic Analysis and A Reliable
        Metric" (NovelSum, ACL 2025, arXiv 2502.17184): the proximity-weighted and density-aware sum of its metric
        (rank_by "distance"), and of the authors' greedy selection (both densities, "weighted").
    """
    check_tensor("rows", rows, ("n", "d"), dtypes=DTYPES)
    n, d = rows.shape
    check_tensor("picks", picks, ("t", d), dtypes=(rows.dtype,), device=rows.device)
    t = picks.shape[0]
    if d < 1:
        raise ValueError("rows must have at least one column")
    check_tensor("weights", weights, (t, "s")[: max(1, weights.ndim)], dtypes=(torch.float64,), device=rows.device)
    if row_density is not None:
        check_tensor("row_density", row_density, (n,), dtypes=(torch.float64,), device=rows.device)
    if pick_density is not None:
        check_tensor("pick_density", pick_density, (t,), dtypes=(torch.float64,), device=rows.device)
    if rank_by not in RANKINGS:
        raise ValueError(f"rank_by must be one of {', '.join(RANKINGS)}, got {rank_by!r}")
    weights_ts = weights[:, None] if weights.ndim == 1 else weights
    with torch.no_grad():
        values: torch.Tensor = run(
            IMPLEMENTATIONS, implementation, rows, picks, weights_ts, row_density, pick_density, rank_by
        )
    return values[:, 0] if weights.ndim == 1 else values
