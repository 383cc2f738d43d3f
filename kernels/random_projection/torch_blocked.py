"""random_projection in plain torch, some coordinates at a time: any device, bounded memory."""

import torch

from fastsel.kernels._runtime.rng import rademacher_signs, sjlt_map

SJLT_TILE = 1 << 18  # coordinates whose rows and signs are in memory: about 20 MB a nonzero
RADEMACHER_TILE, TILE_COLUMNS = 1 << 12, 1 << 10  # a tile of signs is 16 MB


def unsupported(*inputs: object) -> str | None:
    """It takes everything."""
    return None


def compute(
    x: torch.Tensor,
    k: int,
    kind: str,
    sparsity: int,
    seed: int,
    first: int,
    out: torch.Tensor,
) -> torch.Tensor:
    """See api.random_projection."""
    step = SJLT_TILE if kind == "sjlt" else RADEMACHER_TILE
    for start in range(0, x.shape[1], step):
        tile = x[:, start : start + step].to(out.dtype)
        numbers = torch.arange(first + start, first + start + tile.shape[1], device=x.device)
        if kind == "sjlt":
            rows, signs = sjlt_map(seed, numbers, k, sparsity)
            for row, sign in zip(rows, signs, strict=True):
                out.index_add_(1, row, tile * sign.to(out.dtype), alpha=sparsity**-0.5)
        else:
            for column in range(0, k, TILE_COLUMNS):
                columns = torch.arange(column, min(k, column + TILE_COLUMNS), device=x.device)
                out[:, column : column + TILE_COLUMNS].addmm_(
                    tile, rademacher_signs(seed, numbers, columns).to(out.dtype)
                )
    return out
