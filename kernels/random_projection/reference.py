"""random_projection as its formula reads: the matrix R, and a product."""

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
) -> None:
    """See api.random_projection."""
    coordinates = torch.arange(first, first + x.shape[1], device=x.device)
    if kind == "sjlt":
        rows, signs = sjlt_map(seed, coordinates, k, sparsity)
        matrix_pk = torch.zeros(x.shape[1], k, dtype=out.dtype, device=x.device)
        matrix_pk.scatter_(1, rows.T, signs.T.to(out.dtype) / sparsity**0.5)
    else:
        matrix_pk = rademacher_signs(seed, coordinates, torch.arange(k, device=x.device)).to(out.dtype)
    out += x.to(out.dtype) @ matrix_pk
