"""novelty in plain torch, a block of rows at a time: any device, bounded memory.

"order" needs no distances: with a = sum_r w_r picks[r] and b = sum_r w_r p_r picks[r] (p the picks' densities)

    sum_r w_r (1 - x . picks[r]) (q + p_r) = q (sum_r w_r - x . a) + (sum_r w_r p_r - x . b)

so one product of the rows with two vectors serves any number of picks. The other two take the distances of as many
rows as VALUES allows, and torch sorts them.
"""

import torch

from fastsel.kernels.novelty.api import distance_keys

VALUES = 2**22  # distances held at a time
ORDER_ROWS = 8192  # rows widened at a time


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
    picks, weights = picks.to(dtype), weights.double()
    out = torch.empty(len(rows), weights.shape[1], dtype=dtype, device=rows.device)
    step = ORDER_ROWS if rank_by == "order" else max(1, VALUES // max(1, len(picks)))
    totals = _totals(picks, weights, row_density, pick_density) if rank_by == "order" else None
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        block, density = rows[part].to(dtype), None if row_density is None else row_density[part]
        if totals is not None:
            out[part] = _in_order(block, density, weights.shape[1], *totals)
        else:
            out[part] = _sorted(block, picks, density, pick_density, rank_by, weights)
    return out


def _totals(
    picks: torch.Tensor,
    weights: torch.Tensor,
    row_density: torch.Tensor | None,
    pick_density: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[s or 2 s] sums of weights and [same, d] weighted sums of picks: of row_density first, then the others."""
    parts = [] if row_density is None else [weights]
    if pick_density is not None:
        parts.append(weights * pick_density.double()[:, None])
    elif row_density is None:
        parts.append(weights)
    weights = torch.cat(parts, dim=1)
    return weights.sum(0), (weights.T @ picks.double()).to(picks.dtype)


def _in_order(
    block: torch.Tensor, density: torch.Tensor | None, n_sets: int, sums: torch.Tensor, vectors: torch.Tensor
) -> torch.Tensor:
    values = sums - (block @ vectors.T).double()
    if density is None:
        return values
    weighted = values[:, :n_sets] * density.double()[:, None]
    return weighted if len(sums) == n_sets else weighted + values[:, n_sets:]


def _sorted(
    block: torch.Tensor,
    picks: torch.Tensor,
    density: torch.Tensor | None,
    pick_density: torch.Tensor | None,
    rank_by: str,
    weights: torch.Tensor,
) -> torch.Tensor:
    distances = torch.rsub(block @ picks.T, 1)
    if density is None and pick_density is None:
        values = distances
    elif density is None:
        assert pick_density is not None
        values = distances * pick_density.to(distances.dtype)
    else:
        factors = density.to(distances.dtype)[:, None]
        values = distances * (factors if pick_density is None else factors + pick_density.to(distances.dtype))
    values, order = values.sort(dim=1)
    if rank_by == "distance":
        values = values.gather(1, distance_keys(distances).gather(1, order).sort(dim=1, stable=True).indices)
    return values.double() @ weights
