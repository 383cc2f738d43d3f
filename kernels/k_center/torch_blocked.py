"""k_center in plain torch, one tile of squared distances at a time: any device, bounded memory.

A tile is read by the matrix product, which adds the norms of the centres (baddbmm's beta), and once more by the
minimum; the norm of the point and the clamp are applied to the minimum alone: both keep the order.
"""

import torch

from fastsel.kernels.k_center.api import FARTHEST_BLOCK

TILE_POINTS = {"cpu": 2048}
TILE_CENTRES = {"cpu": 1024}
DEVICE_TILE_POINTS, DEVICE_TILE_CENTRES = 65_536, 4096  # other devices: large enough to keep them busy


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
    m = len(points) if rows is None else len(rows)
    out_m = torch.empty(m, dtype=dtype, device=points.device)
    step = TILE_POINTS.get(points.device.type, DEVICE_TILE_POINTS)
    width = TILE_CENTRES.get(points.device.type, DEVICE_TILE_CENTRES)
    centres_db = centres.to(dtype).T
    for start in range(0, m, step):
        stop = min(m, start + step)
        which = slice(start, stop) if rows is None else rows[start:stop]
        tile = points[which].to(dtype)
        least = torch.full((stop - start,), torch.inf, dtype=dtype, device=points.device)
        for first in range(0, len(centres), width):
            norms = centre_sqnorms[first : first + width].expand(len(tile), -1)
            values = torch.addmm(norms, tile, centres_db[:, first : first + width], alpha=-2)
            torch.minimum(least, values.amin(1), out=least)
        least.add_(point_sqnorms[which]).clamp_(min=0)
        out_m[start:stop] = least if nearest is None else torch.minimum(nearest[start:stop], least)
    return out_m, _farthest(out_m)


def _farthest(out_m: torch.Tensor) -> torch.Tensor:
    blocks = -(-len(out_m) // FARTHEST_BLOCK)
    padded = torch.nn.functional.pad(out_m, (0, blocks * FARTHEST_BLOCK - len(out_m)), value=-1.0)
    table = padded.view(blocks, FARTHEST_BLOCK)
    places = torch.arange(FARTHEST_BLOCK, device=out_m.device)
    # Spelt out because torch.argmax promises no particular index on ties.
    first = torch.where(table == table.amax(1, keepdim=True), places, FARTHEST_BLOCK - 1).amin(1)
    return first + FARTHEST_BLOCK * torch.arange(blocks, device=out_m.device)
