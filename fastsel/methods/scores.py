"""Ready scores: rank a pool by a number that its rows already carry.

For pools that were scored elsewhere (OpenDataArena's processed_scores.*, Data-Juicer's __dj__stats__.*, a column of
your own): open the pool with score_column="processed_scores.IFD". No model runs.

Keeps rows whose number is high (or low); fails when the number means something else than its name says, so look at the
highest and lowest rows in the report. There is no paper: the rule is a sort, ties to the lowest row.
"""

from typing import Any

import numpy as np

from fastsel.errors import InputError, UsageError
from fastsel.io import open_pool
from fastsel.selection import STATUS, Selection, build_selection, choose


def scores(
    pool: Any,
    *,
    budget: str | int | float = 0.1,
    keep: str = "highest",
    drop_above: float | None = None,
    seed: int = 0,
    per: Any = None,
) -> Selection:
    """Choose the rows with the highest (or lowest) ready score.

    Args:
        pool: a pool opened with score_column; what else open_pool takes has no scores.
        budget: share of all pool rows, rows or tokens; see Budget.parse.
        keep: "highest" or "lowest".
        drop_above: rows with a higher score are not eligible; 1.0 is IFD's rule.
        seed: of the random draw that the result is compared with.
        per: quotas by source.

    Returns:
        Selection; a row without a usable number has status "skipped" and no score.

    Raises:
        InputError: the pool was opened without score_column.
        UsageError: keep is neither word, or a token budget (nothing counts tokens here).
    """
    if keep not in ("highest", "lowest"):
        raise UsageError(f"keep={keep!r} is not known; it is highest or lowest")
    opened = open_pool(pool)
    if opened.scores is None:
        raise InputError(
            f"{opened.name} carries no scores: name their column with --score-column (open_pool(..., score_column=...))"
        )
    status, reasons = opened.status.copy(), dict(opened.reasons)
    usable = status <= STATUS.index("truncated")
    missing = usable & ~np.isfinite(opened.scores)
    status[missing] = STATUS.index("skipped")
    reasons |= dict.fromkeys(np.flatnonzero(missing).tolist(), "no finite number in the score column")
    values = np.where(usable & ~missing, opened.scores, np.nan)
    eligible = ~np.isnan(values)
    if drop_above is not None:
        eligible &= ~(values > drop_above)
    options = {"budget": budget, "keep": keep, "drop_above": drop_above, "seed": seed, "per": per}
    chosen = choose(values, eligible, budget, pool=opened, n_tokens=None, per=per, largest=keep == "highest")
    return build_selection(
        pool=opened,
        method="scores",
        indices=chosen,
        scores=values,
        status=status,
        reasons=reasons,
        n_tokens=None,
        metrics={},
        config=options,
        timings={},
        seed=seed,
        budget=budget,
        per=per,
        eligible=eligible,
        rule=None if drop_above is None else f"score above {drop_above:g}",
        largest=keep == "highest",
    )
