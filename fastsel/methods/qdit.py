"""QDIT: Data Diversity Matters for Robust Instruction Tuning (Bukharin et al., EMNLP Findings 2024, arXiv 2311.14736).

    f(A) = (1 - alpha) d(A) + alpha sum over a in A of q(a),  d(A) = sum over all rows v of max over a in A of cos(a, v)

Keeps good rows that stand for many others; alpha 0 is facility_location, alpha 1 the best rows by q. Fails where q is
noise, or where it dislikes a kind of row that is needed. For q >= 0 the exact greedy reaches 1 - 1/e of the best value.

The authors' code is not public, and the paper leaves two things open, which are options here:
- how d and q are scaled (`scale`). The default "minmax" brings q to [0, 1] over the rows that may be chosen and leaves
  d as it is: a row then gains at most 1 from q, and 1 - (its best cosine so far) from standing for itself.
- the value of d for no row: a cosine below 0 counts as 0, from the start.
The paper embeds instructions with all-mpnet-base-v2 (name it as `encoder`), takes q from ChatGPT's ratings or a reward
model, and finds alpha 0.5 to 0.9 best. A token budget and quotas are as in facility_location.
"""

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastsel.errors import UsageError
from fastsel.features.beside_random import note_nearness
from fastsel.features.embeddings import embed_pool
from fastsel.features.quality import row_quality
from fastsel.io import open_pool
from fastsel.selection import Budget, Selection, build_in_turn, read_budget, spread
from fastsel.selectors import facility_location as select
from fastsel.selectors.under_budget import pick_under


def qdit(
    pool: Any,
    *,
    encoder: Any = "bundled",
    text: str = "instruction",
    quality: str = "score",
    model: Any = None,
    alpha: float = 0.7,
    scale: str = "minmax",
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
    """Keep good rows that represent the pool.

    Args:
        pool: see ifd; with quality="score" opened with score_column.
        encoder, text, pooling, max_length, device, dtype, batch_tokens, implementation, store, executor, progress: see
            embed_pool.
        quality, model: "score", "perplexity" or "reward", and the model for the last two; see row_quality.
        alpha: weight of quality, 0 to 1.
        scale: "raw" (d and q as they are), "mean" (d / number of rows), "minmax" (q to [0, 1]) or "zscore" (q less its
            mean, over its standard deviation).
        budget, per, seed: see facility_location.

    Returns:
        Selection; scores are q as it was given, gains what each pick added to f on the scale chosen.

    Raises:
        UsageError, InputError: an option has no such value; the pool, a model or the store cannot be used.
    """
    pool = open_pool(pool)
    budget = read_budget(budget, pool, per)
    machine: dict[str, Any] = {
        "device": device, "dtype": dtype, "batch_tokens": batch_tokens, "implementation": implementation,
        "store": store, "executor": executor, "progress": progress,
    }  # fmt: skip
    q = row_quality(pool, quality, model=model, **machine)
    embeddings = embed_pool(pool, encoder, text=text, pooling=pooling, max_length=max_length, **machine)
    embeddings.drop(np.isnan(q.values), q.missing)
    scaled, weight = _scaled(q.values[embeddings.rows], len(embeddings.rows), scale)
    pick = partial(select, alpha=alpha, implementation=implementation)
    limits = spread(budget, pool, embeddings.n_tokens, per)
    with embeddings.timed("choose"):
        indices, gains = pick_under(
            limits, embeddings.rows, embeddings.matrix, pick, points_as="queries", quality=scaled * weight
        )
    embeddings.provenance["quality"] = q.provenance
    selection = build_in_turn(
        pool, "qdit", embeddings, indices, gains / weight, budget=budget, per=per, seed=seed,
        scores=np.where(embeddings.has_vector, q.values, np.nan),
        config={"text": text, "quality": quality, "alpha": alpha, "scale": scale, "budget": str(budget), "per": per},
    )  # fmt: skip
    selection.notes += q.notes
    note_nearness(selection, embeddings)
    return selection


def _scaled(q: NDArray[np.float64], n: int, scale: str) -> tuple[NDArray[np.float64], float]:
    """Q on its scale [m], and what f is multiplied with so that d is the plain sum that the selector makes."""
    if scale not in ("raw", "mean", "minmax", "zscore"):
        raise UsageError(f"scale={scale!r} is not known; it is one of: raw, mean, minmax, zscore")
    if scale == "minmax":
        spread_of_q = np.ptp(q)
        return (q - q.min()) / (spread_of_q if spread_of_q > 0 else 1.0), 1.0
    if scale == "zscore":
        deviation = q.std()
        return (q - q.mean()) / (deviation if deviation > 0 else 1.0), 1.0
    return q, float(n) if scale == "mean" else 1.0
