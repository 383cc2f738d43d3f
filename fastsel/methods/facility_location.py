"""Facility location: rows that stand for all others (Cornuejols, Fisher and Nemhauser 1977; the greedy: Nemhauser,
Wolsey and Fisher 1978; QDIT without quality, EMNLP Findings 2024, arXiv 2311.14736). There is no official code.

    f(A) = sum over all rows v of max(floor, max over a in A of s(a, v));  each pick adds the most to f

Keeps rows that many others resemble, dense regions first; fails where most of the pool is noise, which it then
represents faithfully, and knows nothing of quality (see qdit). The greedy is exact: at least 1 - 1/e of the best value.

Differences from apricot and submodlib: cosine is the cosine (apricot squares it), no n x n matrix is made, and equal
gains go to the lowest row. A token budget takes rows in greedy order, up to the first that would exceed it. Quotas fill
one source after another, largest first, each going on from what the others chose; all rows still count in f.
"""

from functools import partial
from typing import Any

from fastsel.errors import UsageError
from fastsel.features.beside_random import note_nearness
from fastsel.features.embeddings import embed_pool
from fastsel.io import open_pool
from fastsel.selection import Budget, Selection, build_in_turn, read_budget, spread
from fastsel.selectors import facility_location as select
from fastsel.selectors.under_budget import pick_under


def facility_location(
    pool: Any,
    *,
    encoder: Any = "bundled",
    text: str = "instruction",
    similarity: str = "cosine",
    gamma: float | None = None,
    floor: float | str | None = 0.0,
    optimizer: str = "auto",
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
    """Keep the rows that represent the pool best.

    Args:
        pool: see ifd.
        encoder, text, pooling, max_length, device, dtype, batch_tokens, implementation, store, executor, progress: see
            embed_pool; implementation is of the kernels.
        similarity, gamma: "cosine", "dot", "rbf" (exp(-gamma d^2)) or "exp_distance" (exp(-gamma d)); None is 1 / d.
        floor: a similarity below it counts as it, so that nothing is gained from unlike rows; None or "none" keeps all.
        optimizer: "auto", "incremental", "lazy" and "naive" choose the same rows; "stochastic", "threshold" and
            "partitioned" approximate the greedy, for pools of many millions of rows.
        budget, per: a share of all pool rows, rows, or tokens (of whole rows, under the encoder's tokenizer); quotas.
        seed: of the random draw that the selection is compared with, and of an approximate optimizer.

    Returns:
        Selection; scores and gains are what each pick added to f, for the chosen rows.

    Raises:
        UsageError, InputError: an option has no such value; the pool, the encoder or the store cannot be used.
    """
    if isinstance(floor, str) and floor != "none":
        raise UsageError(f"floor={floor!r} must be a number or none")
    pool = open_pool(pool)
    budget = read_budget(budget, pool, per)
    embeddings = embed_pool(
        pool,
        encoder,
        text=text,
        pooling=pooling,
        max_length=max_length,
        device=device,
        dtype=dtype,
        batch_tokens=batch_tokens,
        implementation=implementation,
        store=store,
        executor=executor,
        progress=progress,
    )
    options: dict[str, Any] = {"similarity": similarity, "gamma": gamma, "floor": None if floor == "none" else floor}
    pick = partial(select, optimizer=optimizer, seed=seed, implementation=implementation, **options)
    limits = spread(budget, pool, embeddings.n_tokens, per)
    with embeddings.timed("choose"):
        indices, gains = pick_under(limits, embeddings.rows, embeddings.matrix, pick, points_as="queries")
    selection = build_in_turn(
        pool, "facility_location", embeddings, indices, gains, budget=budget, per=per, seed=seed,
        config={"text": text, **options, "floor": floor, "optimizer": optimizer, "budget": str(budget), "per": per},
    )  # fmt: skip
    note_nearness(selection, embeddings)
    return selection
