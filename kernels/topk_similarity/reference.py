"""topk_similarity as its formulas read: all similarities at once."""

import torch
from torch.nn.functional import pad


def unsupported(*inputs: object) -> str | None:
    """It takes everything."""
    return None


def compute(
    queries: torch.Tensor, points: torch.Tensor, k: int, metric: str, exclude: torch.Tensor | None, minimum: bool
) -> dict[str, torch.Tensor | None]:
    """See api.topk_similarity."""
    dtype = torch.float64 if queries.dtype == torch.float64 else torch.float32
    queries, points, n = queries.to(dtype), points.to(dtype), len(points)
    if metric == "dot":
        similarity_bn, sign = queries @ points.T, 1.0
    else:
        distance_bn = torch.cdist(queries, points, compute_mode="donot_use_mm_for_euclid_dist")
        similarity_bn, sign = -distance_bn.square(), -1.0
    lowest_b = pad(torch.where(similarity_bn.isnan(), torch.inf, similarity_bn), (0, 1), value=torch.inf).amin(1)
    ranked_bn = torch.where(similarity_bn.isnan(), -torch.inf, similarity_bn)
    if exclude is not None:
        is_excluded = exclude[:, None] == torch.arange(n, device=points.device)
        ranked_bn = ranked_bn.masked_fill(is_excluded, -torch.inf)
    best, order = pad(ranked_bn, (0, k), value=-torch.inf).sort(dim=1, descending=True, stable=True)
    best, order = best[:, :k], order[:, :k]
    return {
        "values": sign * best,
        "indices": torch.where(best == -torch.inf, -1, order),
        "minimum": sign * lowest_b if minimum else None,
    }
