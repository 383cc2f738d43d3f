"""Products of all rows with the few vectors that are chosen next, one column after the other."""

import torch

from fastsel.kernels._runtime import native
from fastsel.kernels._runtime.checks import check_tensor
from fastsel.kernels.novelty import cpu_native


def similarity_columns(rows: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """Float32 [c, n]: vectors[j] . rows[i], each column of rows @ vectors.T in one piece.

    Args:
        rows: [n, d] float32; n may be 0, d >= 1.
        vectors: [c, d] float32 on the same device; c is meant to be small.

    Raises:
        ValueError: shapes, dtypes or devices do not match the above.

    Determinism: on a CPU a product's bits depend on its row and its vector only.
    Cost: 2 n c d flops; rows are read once, as they lie. torch.mm reads them at half the speed where c is small, and
        lays the products of a row together, not those of a vector.
    """
    check_tensor("rows", rows, ("n", "d"), dtypes=(torch.float32,))
    check_tensor("vectors", vectors, ("c", rows.shape[1]), dtypes=(torch.float32,), device=rows.device)
    if rows.device.type != "cpu" or native.unavailable() is not None:
        return vectors @ rows.T
    return cpu_native.columns(rows, vectors)
