"""facility_location in plain torch, one tile of similarities at a time: any device, bounded memory.

A tile is read by the matrix product and then by three to five elementwise passes into two buffers that all tiles share:
a fresh buffer of this size costs as much in page faults as the product. 16-bit inputs are widened tile by tile. Sums
over the points of a tile are float64, because a float32 sum over thousands of points would drift.
"""

import torch

TILE_ROWS, TILE_POINTS = 512, 2048  # on a CPU: 4 MB, twice
DEVICE_TILE_ROWS, DEVICE_TILE_POINTS = 4096, 8192  # other devices: large enough to keep them busy, 128 MB, twice


def unsupported(*inputs: object) -> str | None:
    """It takes everything."""
    return None


def compute(
    candidates: torch.Tensor,
    points: torch.Tensor,
    best: torch.Tensor,
    raised: torch.Tensor | None,
    weights: torch.Tensor | None,
    similarity: str,
    gamma: float,
) -> torch.Tensor:
    """See api.facility_location."""
    dtype = torch.float64 if candidates.dtype == torch.float64 else torch.float32
    (n, m), device = (len(candidates), len(points)), candidates.device
    rows, columns = (TILE_ROWS, TILE_POINTS) if device.type == "cpu" else (DEVICE_TILE_ROWS, DEVICE_TILE_POINTS)
    best, raised = best.to(dtype), None if raised is None else raised.to(dtype)
    # max(s, best) - base is max(s - best, 0), and s itself where best is -inf; 0 exactly where s <= best.
    base = torch.where(best == -torch.inf, 0.0, best)
    room = min(rows, n) * min(columns, m)
    tile, terms = (torch.empty(room, dtype=dtype, device=device) for _ in range(2))
    gains = torch.zeros(n, dtype=torch.float64, device=device)
    for first in range(0, m, columns):
        over = slice(first, first + columns)
        block = points[over].to(dtype)
        weights_m = None if weights is None else weights[over].double()
        for start in range(0, n, rows):
            some = candidates[start : start + rows].to(dtype)
            shape = (len(some), len(block))
            s = tile[: shape[0] * shape[1]].view(shape)
            torch.mm(some, block.T, out=s)
            if similarity != "dot":
                squared = s.mul_(-2).add_(some.square().sum(1)[:, None]).add_(block.square().sum(1)).clamp_(min=0)
                s = (squared if similarity == "rbf" else squared.sqrt_()).mul_(-gamma).exp_()
            a = terms[: shape[0] * shape[1]].view(shape)
            torch.maximum(s, best[over], out=a).sub_(base[over])
            if raised is not None:
                a.sub_(s.sub_(raised[over]).clamp_(min=0))
            if weights_m is None:
                gains[start : start + rows] += a.sum(1, dtype=torch.float64)
            else:
                gains[start : start + rows] += a.double() @ weights_m
    return gains
