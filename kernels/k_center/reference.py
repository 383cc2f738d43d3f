"""k_center as its formula reads: all distances at once."""

import torch

from fastsel.kernels.k_center.api import FARTHEST_BLOCK


def unsupported(*inputs: object) -> str | None:
    """It takes everything."""
    return None


def compute(
    points: torch.Tensor,
    centres: torch.Tensor,
    nearest: torch.Tensor | None,
    rows: torch.Tensor | None,
    point_sqnorms: torch.Tensor,
    centre_sqnorms: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See api.k_center."""
    dtype = torch.float64 if points.dtype == torch.float64 else torch.float32
    if rows is not None:
        points, point_sqnorms = points[rows], point_sqnorms[rows]
    product_mb = points.to(dtype) @ centres.to(dtype).T
    square_mb = (point_sqnorms[:, None] + centre_sqnorms[None, :] - 2 * product_mb).clamp(min=0)
    out_m = square_mb.amin(1)
    if nearest is not None:
        out_m = torch.minimum(nearest, out_m)
    firsts = []
    for start in range(0, len(out_m), FARTHEST_BLOCK):
        block = out_m[start : start + FARTHEST_BLOCK]
        firsts.append(start + int((block == block.max()).nonzero()[0, 0]))
    return out_m, torch.tensor(firsts, dtype=torch.int64, device=points.device)
