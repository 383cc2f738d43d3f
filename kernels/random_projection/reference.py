"""random_projection as its formula reads: each coordinate added where its map says, or the matrix R and a product."""

import torch

from fastsel.kernels._runtime.rng import rademacher_signs, sjlt_map


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
    coordinates = torch.arange(first, first + x.shape[1], device=x.device)
    if kind == "sjlt":
        for rows, signs in zip(*sjlt_map(seed, coordinates, k, sparsity), strict=True):
            out.index_add_(1, rows, x.to(out.dtype) * (signs.to(out.dtype) / sparsity**0.5))
        return out
    matrix_pk = rademacher_signs(seed, coordinates, torch.arange(k, device=x.device)).to(out.dtype)
    return out.add_(x.to(out.dtype) @ matrix_pk)
