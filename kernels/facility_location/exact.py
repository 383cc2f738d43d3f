"""Similarities of a few rows to all points in float64: what picks are decided by."""

import torch

from fastsel.kernels._runtime import native
from fastsel.kernels._runtime.checks import check_tensor
from fastsel.kernels.facility_location import cpu_native

BLOCK_NUMBERS = 2**22  # of points, widened to float64 at a time: 34 MB


def similarity_rows(
    rows: torch.Tensor,
    points: torch.Tensor,
    *,
    lengths: torch.Tensor | None = None,
    similarity: str = "dot",
    gamma: float = 1.0,
) -> torch.Tensor:
    """s[i, v] of api.facility_location in float64, from points as they were given.

    Args:
        rows: [b, d] float64; b is meant to be small.
        points: [m, d] float32 | bfloat16 | float16 | float64, same device; read once, never copied as a whole.
        lengths: [m] float64 that dot products are divided by (0 gives 0), or None.
        similarity, gamma: as in api.facility_location; distances are sums of squared differences.

    Returns:
        [b, m] float64.

    Raises:
        ValueError: shapes, dtypes or devices do not match the above.

    Determinism: on a CPU the bits of s[i, v] depend on the two rows only, not on the threads or on the other rows.
    """
    check_tensor("rows", rows, ("b", "d"), dtypes=(torch.float64,))
    check_tensor("points", points, ("m", rows.shape[1]), device=rows.device)
    if rows.device.type == "cpu" and native.unavailable() is None:
        return cpu_native.similarity_rows(rows, points, lengths, similarity, gamma)
    out = torch.empty(len(rows), len(points), dtype=torch.float64, device=rows.device)
    step = max(1, BLOCK_NUMBERS // max(1, rows.shape[1]))
    for start in range(0, len(points), step):
        over = slice(start, start + step)
        block = points[over].double()
        for i, row in enumerate(rows):
            # Sums along rows of memory: their order does not depend on the number of threads.
            if similarity == "dot":
                s = (block * row).sum(1)
                if lengths is not None:
                    s = torch.where(lengths[over] > 0, s / lengths[over], 0.0)
            else:
                squared = (block - row).square_().sum(1)
                s = torch.exp(-gamma * (squared if similarity == "rbf" else squared.sqrt()))
            out[i, over] = s
    return out
