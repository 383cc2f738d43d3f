"""Random: each usable row with the same chance. The baseline that every other run is compared with.

Keeps whatever the dice say; it fails at nothing in particular, and is hard to beat on clean pools.
"""

from typing import Any

import numpy as np

from fastsel.io import open_pool
from fastsel.io.examples import OK
from fastsel.selection import Budget, Selection, build_selection, choose, random_scores


def random(pool: Any, *, budget: Budget | str | float = 0.1, seed: int = 0, per: Any = None) -> Selection:
    """Draw rows without replacement.

    Args:
        pool: see ifd.
        budget: a share of all pool rows or a number of rows.
        seed: the same seed gives the same rows; a larger budget contains the rows of a smaller one.
        per: quotas, such as "source".

    Returns:
        Selection whose scores are the uniform numbers in [0, 1) that decided.

    Raises:
        UsageError: a budget in tokens, which nothing counts here.
    """
    pool = open_pool(pool)
    usable = pool.status == OK
    scores = np.where(usable, random_scores(len(pool), seed), np.nan)
    return build_selection(
        pool=pool,
        method="random",
        indices=choose(scores, usable, budget, pool=pool, per=per),
        scores=scores,
        status=pool.status,
        reasons=pool.reasons,
        n_tokens=None,
        metrics={},
        config={"budget": str(Budget.parse(budget)), "per": per},
        timings={},
        seed=seed,
        budget=budget,
        per=per,
    )
