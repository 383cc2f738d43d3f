"""topk_similarity in plain torch, one tile of similarities at a time: any device, bounded memory.

Each query carries its best similarities so far, ordered, and the least similarity. torch.topk finds the best of a tile;
it promises nothing about equal entries, so that rows whose last place is tied are sorted as a whole. For distances
the tile holds q . p - |p|^2 / 2, which has the same order. 16-bit inputs are widened tile by tile.
"""

import torch

from fastsel.kernels.topk_similarity.contenders import common_centre, decide, number_kept

TILE_ROWS = {"cpu": 256}
TILE_POINTS = {"cpu": 8192}
DEVICE_TILE_ROWS, DEVICE_TILE_POINTS = 4096, 16384  # other devices: large enough to keep them busy, 256 MB


def unsupported(*inputs: object) -> str | None:
    """It takes everything."""
    return None


def compute(
    queries: torch.Tensor, points: torch.Tensor, k: int, metric: str, exclude: torch.Tensor | None, minimum: bool
) -> dict[str, torch.Tensor | None]:
    """See api.topk_similarity."""
    dtype = torch.float64 if queries.dtype == torch.float64 else torch.float32
    kept = min(number_kept(k, exclude), len(points))
    contenders = torch.empty(len(queries), kept, dtype=torch.int64, device=queries.device)
    lowest = torch.empty(len(queries), dtype=dtype, device=queries.device)
    centre = common_centre(points) if metric == "sqeuclidean" else None
    step = TILE_ROWS.get(queries.device.type, DEVICE_TILE_ROWS)
    for start in range(0, len(queries), step):
        rows = slice(start, start + step)
        contenders[rows], lowest[rows] = _scan(queries[rows].to(dtype), points, kept, centre)
    values, indices = decide(queries, points, contenders, k, metric, exclude)
    return {"values": values, "indices": indices, "minimum": lowest if minimum else None}


def _scan(
    queries: torch.Tensor, points: torch.Tensor, kept: int, centre: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Contenders [b, kept], and the minimum [b] of the contract; a centre means squared distances."""
    device, dtype, b = queries.device, queries.dtype, len(queries)
    best = torch.full((b, kept), -torch.inf, dtype=dtype, device=device)
    found = torch.full((b, kept), -1, dtype=torch.int64, device=device)
    lowest = torch.full((b,), torch.inf, dtype=dtype, device=device)
    if centre is not None:
        queries = queries - centre
    step = TILE_POINTS.get(device.type, DEVICE_TILE_POINTS)
    for start in range(0, len(points), step):
        tile_points = points[start : start + step].to(dtype)
        if centre is not None:
            tile_points = tile_points - centre
        similarity = queries @ tile_points.T
        if centre is not None:
            similarity -= tile_points.square().sum(1) / 2
        least = similarity.amin(1)
        if bool(least.isnan().any()):  # NaN must neither be a minimum nor stand before a number
            least = torch.where(similarity.isnan(), torch.inf, similarity).amin(1)
            similarity = similarity.masked_fill(similarity.isnan(), -torch.inf)
        lowest = torch.minimum(lowest, least)
        more, column = _best_of(similarity, kept)
        more_found = torch.where(more > -torch.inf, column + start, -1)
        # Kept ones stand first and points ascend, so a stable sort leaves the lowest point first among equals.
        best, order = torch.cat([best, more], 1).sort(dim=1, descending=True, stable=True)
        best, found = best[:, :kept], torch.cat([found, more_found], 1).gather(1, order[:, :kept])
    if centre is not None:  # +inf where no similarity was a number
        furthest = (queries.square().sum(1) - 2 * lowest).clamp(min=0)
        lowest = torch.where(lowest < torch.inf, furthest, -torch.inf)
    return found, lowest


def _best_of(similarity: torch.Tensor, kept: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best entries of each row and their columns, at most `kept`: largest first, of equals the first column."""
    if similarity.shape[1] <= kept:
        return similarity.sort(dim=1, descending=True, stable=True)
    values, columns = similarity.topk(kept + 1, dim=1)
    is_tied = values[:, kept - 1] == values[:, kept]
    columns = columns[:, :kept].sort(dim=1).values
    values, order = similarity.gather(1, columns).sort(dim=1, descending=True, stable=True)
    columns = columns.gather(1, order)
    if bool(is_tied.any()):
        whole, order = similarity[is_tied].sort(dim=1, descending=True, stable=True)
        values[is_tied], columns[is_tied] = whole[:, :kept], order[:, :kept]
    return values, columns
