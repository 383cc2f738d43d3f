"""Length: the longest answers (Zhao et al., Long Is More for Alignment, ICML 2024, arXiv 2402.04833). A baseline.

Keeps the examples with the longest answers; fails where long answers are padding, lists or code dumps.

The paper counts tokens of its model's tokenizer. Here an answer's characters are counted, so that no model is needed;
in scripts that pack more into a character the two differ (Chinese answers look shorter than they are).
"""

import time
from typing import Any

import numpy as np

from fastsel.io import open_pool
from fastsel.io.examples import OK, STATUS, Example
from fastsel.selection import Budget, Selection, build_selection, choose

ROWS_AT_ONCE = 4096


def length(pool: Any, *, budget: Budget | str | float = 0.1, seed: int = 0, per: Any = None) -> Selection:
    """Keep the rows whose assistant turns have the most characters in all.

    Args:
        pool: see ifd.
        budget: a share of all pool rows or a number of rows.
        seed: of the random draw that the selection is compared with.
        per: quotas, such as "source".

    Returns:
        Selection with the metric answer_characters; ties go to the lowest row.

    Raises:
        UsageError: a budget in tokens, which nothing counts here.
    """
    pool = open_pool(pool)
    started = time.perf_counter()
    scores = np.full(len(pool), np.nan)
    for examples in pool.chunks(rows=ROWS_AT_ONCE):
        for example in examples:
            if example.status == STATUS[OK]:
                scores[example.row_id] = _answer_characters(example)
    return build_selection(
        pool=pool,
        method="length",
        indices=choose(scores, ~np.isnan(scores), budget, pool=pool, per=per),
        scores=scores,
        status=pool.status,
        reasons=pool.reasons,
        n_tokens=None,
        metrics={"answer_characters": scores},
        config={"budget": str(Budget.parse(budget)), "per": per},
        timings={"count": time.perf_counter() - started},
        seed=seed,
        budget=budget,
        per=per,
    )


def _answer_characters(example: Example) -> int:
    return sum(
        len(message.content)
        for place, message in enumerate(example.messages)
        if message.role == "assistant" and (example.trained is None or place in example.trained)
    )
