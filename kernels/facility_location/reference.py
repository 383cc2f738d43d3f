"""facility_location as its formulas read: all similarities at once."""

import torch


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
    candidates, points, best = candidates.to(dtype), points.to(dtype), best.to(dtype)
    s_nm = candidates @ points.T
    if similarity != "dot":
        squared_nm = candidates.square().sum(1)[:, None] + points.square().sum(1) - 2 * s_nm
        squared_nm = squared_nm.clamp(min=0)
        s_nm = torch.exp(-gamma * (squared_nm if similarity == "rbf" else squared_nm.sqrt()))
    terms_nm = torch.where(best == -torch.inf, s_nm, (s_nm - best).clamp(min=0))
    if raised is not None:
        terms_nm = terms_nm - (s_nm - raised.to(dtype)).clamp(min=0)
    if weights is not None:
        terms_nm = terms_nm * weights.to(dtype)
    return terms_nm.sum(1, dtype=torch.float64)
