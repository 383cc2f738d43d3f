"""How near each row is to a target: by cosine, to its nearest row or to the mean of a subtask."""

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from fastsel.errors import UsageError
from fastsel.kernels.topk_similarity import topk_similarity
from fastsel.selectors.rows import Rows


def target_similarity(
    x: Any, targets: Any, *, groups: ArrayLike | None = None, mean: bool = False, implementation: str = "auto"
) -> NDArray[np.float64]:
    """Each row's cosine with its nearest target row, or with a subtask on average.

    Args:
        x: [n, d] finite numbers; numpy, mapped from a file, or torch on any device.
        targets: [m, d] finite numbers, at least one row.
        groups: [m] the subtask of each target row, 0 to g - 1, each of them at least once; None makes them one.
        mean: the largest over subtasks of the mean cosine (LESS's order), exact through the mean of unit vectors.
        implementation: of the kernel topk_similarity.

    Returns:
        Float64 [n], from float32 products. A row of zeros has 0.

    Raises:
        UsageError: a row is not finite, or an argument is not as above.

    Cost: 2 n m d flops (2 n g d for the mean), memory beside x one block of rows.
    """
    rows, wanted = Rows(x, unit=True), Rows(targets, unit=True, name="targets")
    points = check_targets(wanted, rows.d).whole()
    if mean:
        of = check_groups(np.zeros(wanted.n, np.int64) if groups is None else groups, wanted.n)
        points = torch.stack([points[torch.from_numpy(of == g).to(points.device)].mean(0) for g in range(of.max() + 1)])
    nearest = [
        topk_similarity(block, points, 1, implementation=implementation).values[:, 0] for _, block in rows.blocks()
    ]
    return torch.cat(nearest).double().cpu().numpy() if nearest else np.zeros(0)


def check_targets(targets: Rows, d: int) -> Rows:
    """The targets.

    Raises:
        UsageError: there are none, or they are of another width.
    """
    if targets.d != d or not targets.n:
        raise UsageError(f"targets must be one or more rows of {d} numbers, got [{targets.n}, {targets.d}]")
    return targets


def check_groups(groups: ArrayLike, m: int) -> NDArray[np.int64]:
    """Int64 [m].

    Raises:
        UsageError: not a number for each target, or a gap between them.
    """
    of = np.asarray(groups)
    if of.shape != (m,) or of.dtype.kind not in "iu" or not np.array_equal(np.unique(of), np.arange(of.max() + 1)):
        raise UsageError(f"groups must be a whole number for each of {m} targets, from 0 on without a gap")
    return of.astype(np.int64)
