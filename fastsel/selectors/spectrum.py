"""Eigenvalues of a Gram matrix, from the smaller side, and the effective number of rows that they stand for."""

import numpy as np
import torch
from numpy.typing import NDArray

from fastsel.errors import UsageError
from fastsel.selectors.rows import Rows

BLOCK_ROWS = 4096  # rows in float64 at a time


def gram_eigenvalues(x: Rows) -> NDArray[np.float64]:
    """Eigenvalues of X X^T that may differ from 0, float64 [min(n, d)], ascending, at least 0.

    The Gram matrix [n, n] and the scatter matrix X^T X [d, d] have the same ones: the smaller is formed, in float64.
    Cost: 2 n d min(n, d) + 10 min(n, d)^3 flops; 8 min(n, d)^2 bytes beside a block of rows.
    """
    if x.n == 0:
        return np.zeros(0)
    if x.n > x.d:
        matrix = torch.zeros(x.d, x.d, dtype=torch.float64, device=x.device)
        for start in range(0, x.n, BLOCK_ROWS):
            block = x.exact(slice(start, min(x.n, start + BLOCK_ROWS)))
            matrix.addmm_(block.T, block)
    else:
        rows = x.exact(slice(0, x.n))
        matrix = rows @ rows.T
    # Rounding leaves eigenvalues of -1e-16 where there should be none.
    values: NDArray[np.float64] = torch.linalg.eigvalsh(matrix).clamp(min=0).cpu().numpy()
    return values


def effective_number(shares: NDArray[np.float64], q: float = 1.0) -> float:
    """exp of the Renyi entropy of order q of some shares; of Shannon's for q = 1, 1 / max for infinity.

    Raises:
        UsageError: q is negative or NaN.
    """
    if not q >= 0:
        raise UsageError(f"q must be at least 0, got {q}")
    p = shares[shares > 0]
    if len(p) == 0:
        return 0.0
    if q == 1:
        return float(np.exp(-(p * np.log(p)).sum()))
    if q == np.inf:
        return float(1.0 / p.max())
    if q == 0:  # the rank: what is left of zero eigenvalues by rounding is no dimension
        return float((p > p.max() * len(shares) * np.finfo(np.float64).eps).sum())
    return float(np.exp(np.log((p**q).sum()) / (1.0 - q)))


def vendi_score(x: Rows, q: float = 1.0) -> float:
    """The Vendi score of rows read at unit length; see fastsel.metrics.vendi."""
    return effective_number(gram_eigenvalues(x) / max(1, x.n), q)
