"""The k best scores."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastsel.budget import rank_rows
from fastsel.errors import UsageError


def top_k(
    scores: ArrayLike, k: int, *, eligible: ArrayLike | None = None, largest: bool = True
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The rows with the k largest scores.

    Args:
        scores: [n] numbers; NaN means no score, and such a row is never taken.
        k: how many, at least 0; all eligible rows when there are fewer.
        eligible: [n] bool, rows that may be taken; all when None.
        largest: False takes the smallest scores.

    Returns:
        indices int64 [k], best first, and their scores float64 [k]. Ties go to the lowest row.

    Raises:
        UsageError: k is negative, or the arrays are not [n].
    """
    values: NDArray[Any] = np.asarray(scores, dtype=np.float64)
    allowed = np.ones(values.shape, bool) if eligible is None else np.asarray(eligible, dtype=bool)
    if values.ndim != 1 or allowed.shape != values.shape:
        raise UsageError(f"scores must be [n] and eligible too, got {list(values.shape)} and {list(allowed.shape)}")
    if k < 0:
        raise UsageError(f"k={k} must not be negative")
    indices = rank_rows(values, allowed, largest=largest)[:k]
    return indices, values[indices]
