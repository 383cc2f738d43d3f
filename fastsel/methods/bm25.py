"""BM25: rows whose words are the target's. A baseline of targeted selection (LESS, ICML 2024).

Keeps examples that share rare words with the target rows: the same topic, names, notation or format; fails where what
the target teaches is said in other words, and on targets whose words are everybody's. No model runs.

Each target row is a query, its scores are averaged over the rows of a subtask (`aggregate="mean"`, LESS's order) or the
best is taken ("max"), and a row counts by its best subtask. Long target rows weigh more, as they ask for more words.
LESS's own BM25 baseline is not released; k1, b and the tokens here are the usual ones (see features/bm25.py).
"""

import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastsel.errors import UsageError
from fastsel.features.bm25 import BM25, mean_query, single_queries
from fastsel.features.row_texts import RowText
from fastsel.features.target_setup import set_up_targets
from fastsel.features.targets import Target
from fastsel.io import open_pool
from fastsel.io.examples import OK
from fastsel.selection import Budget, Selection, build_selection, choose, read_budget


def bm25(
    pool: Any,
    *,
    target: Any = None,
    subtask_column: str | None = None,
    text: str = "conversation",
    aggregate: str = "mean",
    k1: float = 1.5,
    b: float = 0.75,
    leaks: str = "equal",
    drop_leaks: bool = False,
    budget: Budget | str | float = 0.1,
    seed: int = 0,
    per: Any = None,
) -> Selection:
    """Keep the rows with the highest BM25 scores for the target.

    Args:
        pool: see ifd.
        target, subtask_column: see features.targets.open_targets.
        text: of both; see RowText.
        aggregate: over the rows of a subtask: "mean" or "max".
        k1, b: see features.bm25.BM25.
        leaks: target rows in the pool that are looked for: "near", "equal" or "none"; see find_leaks.
        drop_leaks: pool rows that hold a target row are not eligible.
        budget: a share of all pool rows or a number of rows.
        seed: of the random draw that the selection is compared with.
        per: quotas, such as "source".

    Returns:
        Selection; with several subtasks a metric for each, `bm25_<subtask>`. Ties go to the lowest row.

    Raises:
        UsageError, InputError: an option has no such value; a budget in tokens; the pool or the target cannot be used.
    """
    if aggregate not in ("mean", "max"):
        raise UsageError(f"aggregate={aggregate!r} is not known; it is one of: mean, max")
    if k1 < 0 or not 0 <= b <= 1:
        raise UsageError(f"k1={k1} must be at least 0, and b={b} from 0 to 1")
    pool, started, row_text = open_pool(pool), time.perf_counter(), RowText(text)
    budget = read_budget(budget, pool, per)
    sought = set_up_targets(
        pool, target, subtask_column=subtask_column, leaks=leaks, drop_leaks=drop_leaks, device="auto", store=None,
        progress="none",
    )  # fmt: skip
    usable = pool.status == OK
    examples = (example for chunk in pool.chunks() for example in chunk if usable[example.row_id])
    index = BM25((row_text(example) for example in examples), k1=k1, b=b)
    by_subtask = {name: np.full(len(pool), np.nan) for one in sought.targets for name in one.subtasks}
    for one in sought.targets:
        for name, scores in _scores(index, one, row_text, aggregate):
            by_subtask[name][usable] = np.fmax(by_subtask[name][usable], scores)  # two targets may share a name
    best = np.max(list(by_subtask.values()), axis=0)
    eligible = usable & ~sought.kept_out(len(pool))
    return build_selection(
        pool=pool, method="bm25", indices=choose(best, eligible, budget, pool=pool, per=per), scores=best,
        status=pool.status, reasons=pool.reasons, n_tokens=None, eligible=eligible, seed=seed, budget=budget, per=per,
        rule=sought.rule, provenance=sought.record, notes=sought.notes,
        metrics={f"bm25_{name}": scores for name, scores in by_subtask.items()} if len(by_subtask) > 1 else {},
        config={"text": text, "aggregate": aggregate, "k1": k1, "b": b, "drop_leaks": drop_leaks,
                "budget": str(budget), "per": per},
        timings={"score": time.perf_counter() - started},
    )  # fmt: skip


def _scores(index: BM25, target: Target, row_text: RowText, aggregate: str) -> list[tuple[str, NDArray[np.float64]]]:
    """Name of each subtask, and float64 [n]."""
    texts = np.array([row_text(example) for example in target.examples()], object)
    scores = []
    for number, name in enumerate(target.subtasks):
        mine = texts[target.subtask == number]
        if aggregate == "mean":
            scores.append((name, index.scores(mean_query(mine))))
        else:
            scores.append((name, np.max([index.scores(query) for query in single_queries(mine)], axis=0)))
    return scores
