"""A greedy choice under a budget of rows or tokens, with or without quotas: how methods call a selector.

Rows without quotas: the first k picks. Tokens: picks in greedy order, up to the first that would exceed the budget; no
shorter row from further down is pulled up. Quotas: the groups are filled one after another, largest limit first, each
going on from what the others have chosen; on a monotone submodular objective that keeps half of the best value
(Fisher, Nemhauser and Wolsey 1978, "locally greedy").
"""

from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fastsel.budget import Limits

MARGIN = 1.1  # of the picks that a token budget is expected to need


class Select(Protocol):
    """A selector with its options filled in."""

    def __call__(
        self, x: Any, k: int, *, initial: NDArray[np.int64], **by_row: Any
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Picks int64 [k] in order, none of `initial`, and gains float64 [k]; the first j are those for k = j."""


def pick_under(
    limits: Limits, rows: NDArray[np.int64], x: Any, select: Select, *, points_as: str | None = None, **by_row: Any
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Let a selector choose within limits.

    Args:
        limits: from fastsel.budget.spread, over the n rows of the pool.
        rows: int64 [m], the pool row of each row of x.
        x: [m, d].
        select: the selector.
        points_as: name of the selector's argument for rows that count although they are not offered; under quotas it
            gets all of x.
        by_row: arguments of the selector that have an entry for each row of x.

    Returns:
        Pool rows int64 [k] in the order of choice, and their gains float64 [k].
    """
    nothing = np.zeros(0, np.int64)
    if len(limits.limits) == 1:
        picks, gains = _pick(limits, 0, rows, x, partial(select, **by_row), nothing)
        return rows[picks], gains
    chosen, all_gains = nothing, [np.zeros(0)]
    codes = limits.codes[rows]
    for code in sorted(range(len(limits.limits)), key=lambda code: (-limits.limits[code], code)):
        group = np.flatnonzero(codes == code)
        if not len(group) or not limits.limits[code]:
            continue
        part = np.concatenate([chosen, group])
        given = {name: values[part] for name, values in by_row.items()}
        of_part = partial(select, **given) if points_as is None else partial(select, **given, **{points_as: x})
        picks, gains = _pick(limits, code, rows[part], x[part], of_part, np.arange(len(chosen)))
        chosen = np.concatenate([chosen, part[picks]])
        all_gains.append(gains)
    return rows[chosen], np.concatenate(all_gains)


def _pick(
    limits: Limits, code: int, rows: NDArray[np.int64], x: Any, select: Select, initial: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Picks of one group, as row numbers of x."""
    limit, available = limits.limits[code], len(rows) - len(initial)
    if limits.sizes is None:
        return select(x, min(limit, available), initial=initial)
    sizes = limits.sizes[rows]
    mean = float(sizes[len(initial) :].mean()) if available else 1.0
    k = min(available, int(MARGIN * limit / max(mean, 1.0)) + 8)
    while True:
        picks, gains = select(x, k, initial=initial)
        fitting = int(np.searchsorted(np.cumsum(sizes[picks], dtype=np.int64), limit, side="right"))
        if fitting < k or k == available:
            return picks[:fitting], gains[:fitting]
        k = min(available, 2 * k)
