"""Several scores for each row, and one selection: whoever gives the scores takes turns, or each takes a share."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastsel.errors import UsageError

COMBINE = ("round_robin", "union")


def score_turns(
    scores: Any,
    eligible: NDArray[np.bool_] | None = None,
    *,
    take: Callable[[NDArray[np.int64]], NDArray[np.int64]] | None = None,
    combine: str = "round_robin",
) -> NDArray[np.int64]:
    """Rows chosen by several columns of scores.

    Args:
        scores: [n, m] numbers, the highest best; m at least 1. Rows with a NaN are not chosen.
        eligible: bool [n], rows that may be chosen; None: all.
        take: cuts a ranking to a budget (Limits.take); None takes all of it.
        combine: "round_robin": columns take turns, each its best row not yet taken, and the budget cuts that ranking;
            "union": each column's ranking is cut to the whole budget, and what any of them takes is chosen, in the
            order of turns.

    Returns:
        int64, in the order of the turns; the first column begins. Ties go to the lowest row. One column is a plain
        ranking.

    Raises:
        UsageError: scores is not a matrix with a column; combine has no such value.

    Cost: m sorts of n.
    """
    matrix = np.asarray(scores, np.float64)
    if matrix.ndim != 2 or matrix.shape[1] < 1:
        raise UsageError(f"scores must be [rows, columns] with a column, got {list(matrix.shape)}")
    if combine not in COMBINE:
        raise UsageError(f"combine={combine!r} is not known; it is one of: {', '.join(COMBINE)}")
    free = ~np.isnan(matrix).any(axis=1)
    if eligible is not None:
        free &= eligible
    rows = np.flatnonzero(free)
    orders = [rows[np.argsort(-matrix[rows, column], kind="stable")] for column in range(matrix.shape[1])]
    if take is not None and combine == "union":
        orders = [take(order) for order in orders]
    ranked = orders[0] if len(orders) == 1 else _by_turns(orders, len(matrix))
    return take(ranked) if take is not None and combine == "round_robin" else ranked


def _by_turns(orders: list[NDArray[np.int64]], n: int) -> NDArray[np.int64]:
    """Who has no row left is passed over."""
    taken = np.zeros(n, np.bool_)
    ranked: list[int] = []
    waiting = [iter(order.tolist()) for order in orders]
    while waiting:
        for order in list(waiting):
            row = next((row for row in order if not taken[row]), None)
            if row is None:
                waiting.remove(order)
            else:
                taken[row] = True
                ranked.append(row)
    return np.array(ranked, np.int64)
