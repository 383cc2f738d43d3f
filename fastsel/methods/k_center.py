"""k-center: each pick is the row farthest from all rows chosen before (Gonzalez 1985; "k-center greedy" of Sener and
Savarese, ICLR 2018, arXiv 1708.00489; the K-Center-Greedy baseline of the NovelSum paper).

Keeps rows unlike each other, so that no row is far from a chosen one: at most twice the best possible radius. Fails on
noisy pools, where what is farthest from everything is often garbage, and gives dense regions no more than sparse ones.

Differences: the start is one row drawn with the seed (Sener and Savarese start from rows already labelled, DiverseEvol
from 100 drawn at random); copies of a chosen row come last, at distance 0 (code that takes roots of rounded squares may
choose near-copies first). A token budget takes rows in greedy order, up to the first that would exceed it. Quotas fill
one source after another, largest first, each going on from what the others chose.
"""

from functools import partial
from typing import Any

from fastsel.features.beside_random import note_nearness
from fastsel.features.embeddings import embed_pool
from fastsel.io import open_pool
from fastsel.selection import Budget, Selection, build_in_turn, read_budget, spread
from fastsel.selectors import k_center as select
from fastsel.selectors.under_budget import pick_under


def k_center(
    pool: Any,
    *,
    encoder: Any = "bundled",
    text: str = "instruction",
    metric: str = "euclidean",
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
    """Keep rows that leave no other row far away.

    Args:
        pool: see ifd.
        encoder, text, pooling, max_length, device, dtype, batch_tokens, implementation, store, executor, progress: see
            embed_pool; implementation is of the kernels.
        metric: "euclidean", or "cosine": 1 - cos. On vectors of unit length both choose the same rows.
        budget, per: a share of all pool rows, rows, or tokens (of whole rows, under the encoder's tokenizer); quotas.
        seed: of the first pick, and of the random draw that the selection is compared with.

    Returns:
        Selection; scores and gains are the distances at which rows were picked; infinite for the first.

    Raises:
        UsageError, InputError: an option has no such value; the pool, the encoder or the store cannot be used.
    """
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
    pick = partial(select, metric=metric, first="random", seed=seed, implementation=implementation)
    limits = spread(budget, pool, embeddings.n_tokens, per)
    with embeddings.timed("choose"):
        indices, gains = pick_under(limits, embeddings.rows, embeddings.matrix, pick)
    selection = build_in_turn(
        pool, "k_center", embeddings, indices, gains, budget=budget, per=per, seed=seed,
        config={"text": text, "metric": metric, "budget": str(budget), "per": per},
    )  # fmt: skip
    note_nearness(selection, embeddings)
    return selection
