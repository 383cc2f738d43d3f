"""Taking turns: each target in turn takes the row most similar to it that nobody has taken yet."""

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from fastsel.selectors.neighbours import nearest_rows
from fastsel.selectors.rows import Rows, check_k, check_rows
from fastsel.selectors.target_similarity import check_groups, check_targets


def round_robin(
    x: Any,
    k: int,
    *,
    targets: Any,
    groups: ArrayLike | None = None,
    initial: ArrayLike | None = None,
    implementation: str = "auto",
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The rows that targets take by turns, by cosine.

    Args:
        x: [n, d] finite numbers; numpy, mapped from a file, or torch on any device.
        k: how many; all rows when there are fewer.
        targets: [m, d] finite numbers, at least one row.
        groups: [m] numbers 0 to g - 1, each of them at least once: then the g groups take turns, and a row's similarity
            to a group is that to its nearest target. None: every target takes turns.
        initial: row numbers that are taken already; they are not returned.
        implementation: of the kernel topk_similarity.

    Returns:
        indices int64 [k] in the order of the turns, and gains float64 [k]: the cosine for which each was taken. Ties go
        to the lowest row. The first j are the selection for k = j.

    Raises:
        UsageError: a row is not finite, or an argument is not as above.

    Cost: 2 n m d flops; 16 bytes for each of about 2 k places on the targets' lists, or n g with groups.
    Source: Ivison et al. 2025 (RDS+), arXiv 2503.01807, section 3.
    """
    rows, wanted = Rows(x, unit=True), Rows(targets, unit=True, name="targets")
    check_targets(wanted, rows.d)
    taken = np.zeros(rows.n, np.bool_)
    taken[check_rows(initial, rows.n, "initial")] = True
    k = check_k(k, int((~taken).sum()))
    if not k:
        return np.zeros(0, np.int64), np.zeros(0)
    turns = (
        _Targets(rows, wanted, k, implementation) if groups is None else _Groups(rows, wanted, groups, implementation)
    )
    indices, gains = np.zeros(k, np.int64), np.zeros(k)
    at = np.zeros(turns.n, np.int64)  # where each one's list has been read to
    for turn in range(k):
        who = turn % turns.n
        while True:
            row, similarity = turns.place(who, int(at[who]))
            at[who] += 1
            if not taken[row]:
                break
        taken[row], indices[turn], gains[turn] = True, row, similarity
    return indices, gains


class _Targets:
    """Each target's list, as far as it has been asked for."""

    def __init__(self, rows: Rows, targets: Rows, k: int, implementation: str) -> None:
        self.n = targets.n
        self._rows, self._targets, self._implementation = rows, targets, implementation
        best = self._best(slice(None), min(rows.n, 2 * -(-k // targets.n) + 8))
        self._lists = list(zip(*best, strict=True))

    def _best(self, which: slice, length: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        targets = Rows(self._targets.whole()[which])
        found = nearest_rows(targets, self._rows, length, implementation=self._implementation)
        return found.indices.cpu().numpy(), found.values.double().cpu().numpy()

    def place(self, who: int, at: int) -> tuple[int, float]:
        if at == len(self._lists[who][0]):
            (indices,), (values,) = self._best(slice(who, who + 1), min(self._rows.n, 2 * at))
            self._lists[who] = (indices, values)
        indices, values = self._lists[who]
        return int(indices[at]), float(values[at])


class _Groups:
    """All rows in each group's order."""

    def __init__(self, rows: Rows, targets: Rows, groups: ArrayLike, implementation: str) -> None:
        of = check_groups(groups, targets.n)
        self.n = int(of.max()) + 1
        self._similarities, self._orders = [], []
        for group in range(self.n):
            points = targets.whole()[torch.from_numpy(np.flatnonzero(of == group)).to(targets.device)]
            nearest = nearest_rows(rows, Rows(points), 1, implementation=implementation).values[:, 0]
            self._similarities.append(nearest.double().cpu().numpy())
            self._orders.append(np.argsort(-self._similarities[-1], kind="stable"))

    def place(self, who: int, at: int) -> tuple[int, float]:
        row = int(self._orders[who][at])
        return row, float(self._similarities[who][row])
