"""The last step of topk_similarity in plain torch: contenders found in float32 are decided in float64."""

import torch

BEYOND_K = 5  # contenders kept besides the k: float32 products may order near neighbours wrongly
GATHERED_ELEMENTS = {"cpu": 2**19}  # float64 numbers gathered at a time
DEVICE_GATHERED_ELEMENTS = 2**25


def decide(
    queries: torch.Tensor,
    points: torch.Tensor,
    contenders: torch.Tensor,
    k: int,
    metric: str,
    exclude: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best contenders of each query by similarities computed anew in float64.

    Args:
        queries: [b, d]. points: [n, d].
        contenders: [b, c] int64 point numbers, each at most once a row; -1 is none.
        k: how many are wanted; metric, exclude: see api.topk_similarity.

    Returns:
        values [b, k] float32 (float64 for float64 inputs) and indices [b, k] int64, as in api.TopK.
    """
    (b, c), d = contenders.shape, points.shape[1]
    dtype = torch.float64 if queries.dtype == torch.float64 else torch.float32
    values = torch.full((b, k), -torch.inf if metric == "dot" else torch.inf, dtype=dtype, device=queries.device)
    indices = torch.full((b, k), -1, dtype=torch.int64, device=queries.device)
    if c == 0:
        return values, indices
    step = max(1, GATHERED_ELEMENTS.get(queries.device.type, DEVICE_GATHERED_ELEMENTS) // (c * d))
    for start in range(0, b, step):
        rows = slice(start, start + step)
        # The lowest point first: the stable sort by similarity then keeps it first among equals.
        found = contenders[rows].sort(dim=1).values
        near = points[found.clamp(min=0)].double()  # [rows, c, d]
        queries_1d = queries[rows].double()[:, None]
        # Elementwise, then summed row by row: equal rows give equal bits, which a matrix product does not promise.
        if metric == "dot":
            similarity = near.mul_(queries_1d).sum(2)
        else:
            similarity = -near.sub_(queries_1d).square_().sum(2)
        is_none = found < 0 if exclude is None else (found < 0) | (found == exclude[rows, None])
        best, order = similarity.masked_fill_(is_none, -torch.inf).sort(dim=1, descending=True, stable=True)
        best, order = best[:, :k], order[:, :k]
        is_there = best > -torch.inf
        indices[rows, : best.shape[1]] = torch.where(is_there, found.gather(1, order), -1)
        values[rows, : best.shape[1]] = (best if metric == "dot" else -best).to(dtype)
    return values, indices


def number_kept(k: int, exclude: torch.Tensor | None) -> int:
    """How many contenders a query needs: k, some more, and one in whose place the excluded point may stand."""
    return k + BEYOND_K + (exclude is not None)


def common_centre(points: torch.Tensor) -> torch.Tensor:
    """A vector [d] to subtract from queries and points before distances are expanded into products.

    No distance changes, but embeddings share a large mean, in whose square a small distance would be lost.
    """
    dtype = torch.float64 if points.dtype == torch.float64 else torch.float32
    mean = points.mean(0, dtype=dtype) if len(points) else points.new_zeros(points.shape[1], dtype=dtype)
    return torch.where(mean.isfinite(), mean, 0.0)
