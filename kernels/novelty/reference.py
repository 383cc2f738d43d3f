"""novelty as its formula reads: all distances at once."""

import torch

from fastsel.kernels.novelty.api import distance_keys


def unsupported(*inputs: object) -> str | None:
    """It takes everything."""
    return None


def compute(
    rows: torch.Tensor,
    picks: torch.Tensor,
    weights: torch.Tensor,
    row_density: torch.Tensor | None,
    pick_density: torch.Tensor | None,
    rank_by: str,
) -> torch.Tensor:
    """See api.novelty; weights [t, s], result [n, s]."""
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    distances_nt = 1 - rows.to(dtype) @ picks.to(dtype).T
    factors_nt = torch.ones_like(distances_nt)
    if row_density is not None:
        factors_nt = row_density.to(dtype)[:, None].expand_as(distances_nt)
    if pick_density is not None:
        factors_nt = pick_density.to(dtype) + (0 if row_density is None else factors_nt)
    values_nt = distances_nt * factors_nt
    if rank_by != "order":
        values_nt, by_value_nt = values_nt.sort(dim=1)
        if rank_by == "distance":
            by_distance_nt = distance_keys(distances_nt).gather(1, by_value_nt).sort(dim=1, stable=True).indices
            values_nt = values_nt.gather(1, by_distance_nt)
    return (values_nt.double() @ weights.double()).to(dtype)
