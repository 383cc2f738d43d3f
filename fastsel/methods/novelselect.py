"""NovelSelect: Measuring Data Diversity for Instruction Tuning: A Systematic Analysis and A Reliable Metric (Yang et
al., ACL 2025, arXiv 2502.17184; authors' code UmeanNever/NovelSum@b594962).

Keeps rows that are far from what is chosen already, near ones weighing most, and far from the rest of the pool where
many rows lie close together: each pick is the row that adds most novelty, as NovelSum measures it. Fails on pools with
garbage, which is novel; exact copies of a row far out may both be chosen: drop copies first. `quality` multiplies the
novelty with what a row is worth (the hook that the authors' README describes).

The rule is the authors' code's unless `rule="paper"`: a distance is weighted by the sum of both rows' densities and
ranked after weighting, where the paper weighs by the chosen row's alone; the lists share less than half of their rows.
Differences from the code; `official=True` takes its side in each:
- The text is the instruction; the code's is the whole conversation (text="conversation").
- The seed is 0, as everywhere here; official's is 42, the code's, and the first row is drawn with it as the code does.
The code's vectors are last-token states of the base model that is to be tuned (`encoder="lm:MODEL"`, the first 256
tokens: max_length=256); here a sentence encoder is the default, so that it runs anywhere. One thing is not reproduced:
the code scores in half precision, where rounding decides near-ties; here scores are exact.
A token budget takes rows in greedy order, up to the first that would exceed it. Quotas fill one source after another,
largest first, each going on from what the others chose; density is always that of the whole pool.
"""

from functools import partial
from typing import Any

import numpy as np

from fastsel.errors import UsageError
from fastsel.features.beside_random import note_nearness
from fastsel.features.embeddings import embed_pool
from fastsel.features.quality import row_quality
from fastsel.io import open_pool
from fastsel.selection import Budget, Selection, build_in_turn, read_budget, spread
from fastsel.selectors import novelselect as select
from fastsel.selectors.density import local_density
from fastsel.selectors.under_budget import pick_under


def novelselect(
    pool: Any,
    *,
    encoder: Any = "bundled",
    text: str = "instruction",
    rule: str = "official",
    distance_power: float = 1.0,
    density_power: float = 0.5,
    neighbours: int = 10,
    quality: str = "none",
    model: Any = None,
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
    """Keep rows that are novel beside each other.

    Args:
        pool: see ifd; with quality="score" opened with score_column.
        encoder, text, pooling, max_length, device, dtype, batch_tokens, implementation, store, executor, progress: see
            embed_pool; implementation is also of the kernels.
        rule: "official" or "paper".
        distance_power, density_power, neighbours: alpha, beta and K of the paper; see selectors.novelselect.
        quality, model: "none", or what multiplies the novelty, at least 0: "score", "perplexity" or "reward", and the
            model for the last two; see row_quality.
        official: take the authors' side in the differences above.
        budget, per: a share of all pool rows, rows, or tokens (of whole rows, under the encoder's tokenizer); quotas.
        seed: of the first pick, and of the random draw that the selection is compared with.

    Returns:
        Selection; scores and gains are the novelty of rows when they were picked; 0 for the first.

    Raises:
        UsageError, InputError: an option has no such value; the pool, a model or the store cannot be used.
    """
    pool = open_pool(pool)
    budget = read_budget(budget, pool, per)
    machine: dict[str, Any] = {
        "device": device, "dtype": dtype, "batch_tokens": batch_tokens, "implementation": implementation,
        "store": store, "executor": executor, "progress": progress,
    }  # fmt: skip
    if official:
        rule, text, seed = "official", "conversation", 42
    if quality == "none" and model is not None:
        raise UsageError("model is for quality='perplexity' or 'reward'; vectors come from encoder")
    q = None if quality == "none" else row_quality(pool, quality, model=model, **machine)
    embeddings = embed_pool(pool, encoder, text=text, pooling=pooling, max_length=max_length, **machine)
    if q is not None:
        embeddings.drop(np.isnan(q.values), q.missing)
    options: dict[str, Any] = {"rule": rule, "neighbours": neighbours, "implementation": implementation}
    pick = partial(select, alpha=distance_power, seed=seed, **options)
    limits = spread(budget, pool, embeddings.n_tokens, per)
    with embeddings.timed("choose"):
        sigma = local_density(embeddings.matrix, beta=density_power, **options)
        by_row: dict[str, Any] = (
            {"density": sigma} if q is None else {"density": sigma, "quality": q.values[embeddings.rows]}
        )
        indices, gains = pick_under(limits, embeddings.rows, embeddings.matrix, pick, **by_row)
    if q is not None:
        embeddings.provenance["quality"] = q.provenance
    selection = build_in_turn(
        pool, "novelselect", embeddings, indices, gains, budget=budget, per=per, seed=seed, official=official,
        config={"text": text, "rule": rule, "distance_power": distance_power, "density_power": density_power,
                "neighbours": neighbours, "quality": quality, "budget": str(budget), "per": per},
    )  # fmt: skip
    selection.notes += [] if q is None else q.notes
    note_nearness(selection, embeddings)
    return selection
