"""The eigenvalues of a set's similarities: how many directions it fills, and the volume that it spans."""

import math
from typing import Any

import numpy as np

from fastsel.errors import UsageError
from fastsel.selectors.rows import Rows
from fastsel.selectors.spectrum import gram_eigenvalues, vendi_score


def vendi(x: Any, *, q: float = 1.0) -> float:
    """The Vendi score: the effective number of different rows.

        exp(-sum_i l_i log l_i),   l_i the eigenvalues of K / n, K the cosines between rows

    Args:
        x: [n, d] finite numbers; numpy, mapped from a file, or torch on any device. A row of zeros is like nothing,
            itself included: it counts in n only, as in vendi_score.
        q: the order of the entropy: 1 as published first; at q -> 0 every direction counts the same, at infinity
            (math.inf) the largest only. (vendi.score_X of the package vendi_score ignores its q; score_K and score_dual
            agree with this.)

    Returns:
        1 for copies of one row, n for orthogonal ones; 0 without rows.

    Cost: 2 n d min(n, d) + 10 min(n, d)^3 flops in float64: K and the d x d scatter matrix have the same eigenvalues
        but for zeros, and the smaller is formed.
    Source: Friedman & Dieng, "The Vendi Score", TMLR 2023 (arXiv 2210.02410); its orders: Pasarkar & Dieng, 2023
        (arXiv 2310.12952).
    """
    return vendi_score(Rows(x, unit=True), q)


def log_determinant(x: Any, *, ridge: float = 1e-6, similarity: str = "cosine") -> float:
    """LDD: the logarithm of the determinant of the similarities plus a ridge, log det(K + ridge I).

    Args:
        x: [n, d] finite numbers; numpy, mapped from a file, or torch on any device.
        ridge: what is added to the diagonal: 1e-6 as emb_diversity, 1e-10 as ODA-DataScorer. With more rows than
            features K has n - d eigenvalues of 0, and the ridge sets the value: (n - d) log ridge is part of it.
            Compare sets of the same size and the same ridge only.
        similarity: "cosine" or "dot".

    Returns:
        Natural logarithm; 0 without rows. -inf for a singular K without a ridge.

    Cost: that of vendi, by the determinant lemma: log det(X X^T + r I) = (n - d) log r + log det(X^T X + r I).
    Source: the log determinant distance of Wang et al., "Diversity Measurement and Subset Selection for Instruction
        Tuning Datasets", 2024 (arXiv 2402.02318); as in NovelSum (arXiv 2502.17184).
    """
    if not 0 <= ridge < float("inf"):
        raise UsageError(f"ridge must be at least 0, got {ridge}")
    if similarity not in ("cosine", "dot"):
        raise UsageError(f"similarity must be one of cosine, dot; got {similarity!r}")
    rows = Rows(x, unit=similarity == "cosine")
    values = gram_eigenvalues(rows) + ridge
    nothing = rows.n - len(values)
    if not (values > 0).all() or (nothing and ridge == 0):
        return float("-inf")
    return float(np.log(values).sum()) + (nothing * math.log(ridge) if nothing else 0.0)
