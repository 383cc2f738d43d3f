"""What a greedy selector may still choose: a number of rows, a total cost, a quota for each group."""

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastsel.errors import UsageError
from fastsel.selectors.rows import check_k, check_values


class Constraints:
    """Which rows may be chosen next.

    Attributes:
        may_take: bool [n]; False once there is no room for a row.
        costs: float64 [n], or None where every row counts as one.
        groups: as given.
        room: how much cost, or how many rows, are left.
    """

    def __init__(
        self,
        n: int,
        k: float,
        costs: ArrayLike | None = None,
        groups: tuple[ArrayLike, Mapping[Any, int]] | None = None,
        taken: NDArray[np.int64] | None = None,
    ) -> None:
        """Everything may be taken but the rows already taken, which use up nothing of k or of the quotas.

        Args:
            n: rows.
            k: how many, or with costs the total cost of what may be chosen.
            costs: [n] above 0, or None.
            groups: (labels [n], label -> how many of its rows may be chosen); a label without a quota is not limited.
            taken: rows chosen before.

        Raises:
            UsageError: k, a cost or a quota is no number of the kind; labels are not [n].
        """
        self.costs = None if costs is None else check_values(costs, n, "costs")
        if self.costs is None:
            self.room: float = check_k(int(k) if isinstance(k, float) and k.is_integer() else k, n)  # type: ignore[arg-type]
        else:
            if n and self.costs.min() <= 0:
                raise UsageError(
                    f"costs: row {int(self.costs.argmin())} costs {self.costs.min():g}, it must be above 0"
                )
            if isinstance(k, bool) or not isinstance(k, (int, float, np.number)) or not 0 <= k < np.inf:
                raise UsageError(f"with costs, k is the total cost, a finite number of at least 0; got {k!r}")
            self.room = float(k)
        self.may_take = np.ones(n, bool)
        if taken is not None:
            self.may_take[taken] = False
        self.groups = groups
        self._group_of: NDArray[np.int64] | None = None
        if groups is not None:
            self._read_groups(n, *groups)
        self._close()

    def _read_groups(self, n: int, labels: ArrayLike, quotas: Mapping[Any, int]) -> None:
        names: list[Hashable] = np.asarray(labels).tolist()
        if np.ndim(labels) != 1 or len(names) != n:
            raise UsageError(f"groups must be (labels, quotas) with one label a row, [{n}]; got {np.shape(labels)}")
        number: dict[Hashable, int] = {}
        self._group_of = np.array([number.setdefault(name, len(number)) for name in names], np.int64)
        self._quota = np.full(len(number), n, np.int64)
        for name, quota in quotas.items():
            if isinstance(quota, bool) or not isinstance(quota, (int, np.integer)) or quota < 0:
                raise UsageError(f"groups: the quota of {name!r} must be a whole number of rows, got {quota!r}")
            if name not in number:
                raise UsageError(f"groups: no row has the label {name!r}")
            self._quota[number[name]] = quota

    def take(self, row: int) -> None:
        """Choose a row."""
        self.may_take[row] = False
        self.room -= 1 if self.costs is None else self.costs[row]
        if self._group_of is not None:
            self._quota[self._group_of[row]] -= 1
        self._close()

    def _close(self) -> None:
        if self.costs is None:
            if self.room < 1:
                self.may_take[:] = False
        else:
            # A total that is used up to the last digit must not fail by the rounding of its sums.
            self.may_take &= self.costs <= self.room + 1e-9 * np.maximum(self.costs, abs(self.room))
        if self._group_of is not None:
            self.may_take &= self._quota[self._group_of] > 0
