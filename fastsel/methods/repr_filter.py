"""Repr Filter of DEITA: What Makes Good Data for Alignment? (Liu et al., ICLR 2024, arXiv 2312.15685; authors' code
hkust-nlp/deita, filter/base.py).

Goes down the rows, best first, and keeps each whose cosine to every row kept before is at most the threshold, until the
budget is filled. Keeps good rows without near-copies; fails where the threshold does not suit the encoder (with cosines
near 1 throughout, as hidden states of a language model have, almost nothing passes), and then ends short of the budget.

DEITA ranks by complexity times quality, summed over turns: give that as the score column. Without one the order is
random (the NovelSum paper's baseline). DEITA embeds whole conversations by the last token of a 13B LLaMA
(`encoder="lm:..."`, pooling="last"); the default here is the bundled encoder.

Differences from the authors' code; `official=True` takes its side in the first:
- Rows with equal scores keep the order of the pool; the code's sort (pandas, quicksort, descending) mixes them.
- Of several rows compared at once only kept ones reject; with the code's batch_size above 1 (its default is 1) rows
  that were themselves rejected do too.
- A token budget takes kept rows in order, up to the first that would exceed it; quotas fill one source after another.
"""

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastsel.errors import InputError, UsageError
from fastsel.features.beside_random import note_nearness
from fastsel.features.embeddings import embed_pool
from fastsel.io import open_pool
from fastsel.selection import Budget, Selection, build_in_turn, random_scores, read_budget, spread
from fastsel.selectors import repr_filter as select
from fastsel.selectors.under_budget import pick_under


def repr_filter(
    pool: Any,
    *,
    encoder: Any = "bundled",
    text: str = "conversation",
    threshold: float = 0.9,
    rank_by: str = "auto",
    official: bool = False,
    budget: Budget | str | float = 0.1,
    pooling: str = "auto",
    max_length: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    implementation: str = "auto",
    batch_tokens: int | None = None,
    seed: int = 0,
    store: Any = None,
    executor: Any = None,
    progress: str = "auto",
    per: Any = None,
) -> Selection:
    """Keep the best rows that are not too similar to each other.

    Args:
        pool: see ifd; opened with score_column to rank by it.
        encoder, text, pooling, max_length, device, dtype, batch_tokens, implementation, store, executor, progress: see
            embed_pool.
        threshold: a row is dropped when its cosine to a kept row is above this.
        rank_by: "score", "pool" (as the rows stand), "random" (by the seed), or "auto": score, else random.
        official: equal scores in the order of the authors' sort.
        budget, per, seed: see facility_location.

    Returns:
        Selection; gains are 1 less the cosine to the nearest row kept before (infinite for the first), scores the
        numbers that rows were ranked by.

    Raises:
        UsageError, InputError: an option has no such value; the pool, the encoder or the store cannot be used.
    """
    pool = open_pool(pool)
    budget = read_budget(budget, pool, per)
    scores = _ranked_by(pool, "score" if official else rank_by, seed)
    embeddings = embed_pool(
        pool, encoder, text=text, pooling=pooling, max_length=max_length, device=device, dtype=dtype, store=store,
        batch_tokens=batch_tokens, implementation=implementation, executor=executor, progress=progress,
    )  # fmt: skip
    embeddings.drop(np.isnan(scores), "no finite number in the score column")
    rows = embeddings.rows
    place = np.zeros(len(rows))  # higher is looked at earlier
    place[_descending(scores[rows], official)] = np.arange(len(rows), 0, -1)
    limits = spread(budget, pool, embeddings.n_tokens, per)
    with embeddings.timed("choose"):
        picks = partial(select, threshold=threshold)
        indices, gains = pick_under(limits, rows, embeddings.matrix, picks, scores=place)
    eligible = embeddings.has_vector
    if limits.sizes is None:  # a source that is not filled has no other row left that may stay
        taken = np.bincount(limits.codes[indices], minlength=len(limits.limits))
        is_spent = (taken < limits.limits)[limits.codes]
        eligible &= ~is_spent | np.isin(np.arange(len(pool)), indices)
    selection = build_in_turn(
        pool, "repr_filter", embeddings, indices, gains, budget=budget, per=per, seed=seed, official=official,
        scores=np.where(embeddings.has_vector, scores, np.nan), eligible=eligible,
        rule=f"cosine above {threshold:g} to a kept row",
        config={"text": text, "threshold": threshold, "rank_by": rank_by, "budget": str(budget), "per": per},
    )  # fmt: skip
    note_nearness(selection, embeddings)
    return selection


def _ranked_by(pool: Any, rank_by: str, seed: int) -> NDArray[np.float64]:
    """Float64 [n], the highest first."""
    if rank_by not in ("auto", "score", "pool", "random"):
        raise UsageError(f"rank_by={rank_by!r} is not known; it is one of: auto, score, pool, random")
    if rank_by == "score" and pool.scores is None:
        raise InputError(f"{pool.name} carries no scores: name their column with --score-column (open_pool(...))")
    if rank_by == "score" or (rank_by == "auto" and pool.scores is not None):
        return np.where(pool.status == 0, pool.scores, np.nan)
    return -np.arange(len(pool), dtype=np.float64) if rank_by == "pool" else random_scores(len(pool), seed)


def _descending(scores: NDArray[np.float64], official: bool) -> NDArray[np.int64]:
    if official:
        return (len(scores) - 1 - np.argsort(scores[::-1], kind="quicksort"))[::-1]
    return np.argsort(-scores, kind="stable")
