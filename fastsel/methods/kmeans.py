"""k-means: cluster the rows, then take rows from every cluster. A baseline of the NovelSum paper (arXiv 2502.17184),
which states neither the number of clusters nor their shares; k-means itself is faiss's (Lloyd's, on a subsample of 256
rows a cluster, seeded).

Keeps all topics, in proportion or equally; fails where clusters follow form (language, length) rather than content, and
within a cluster chooses by chance, or the typical rows. A token budget takes rows in turn over the clusters, up to the
first that would exceed it; under quotas a source that is full is passed over.
"""

from typing import Any

import numpy as np

from fastsel.features.beside_random import note_nearness
from fastsel.features.embeddings import embed_pool
from fastsel.io import open_pool
from fastsel.selection import Budget, Selection, build_in_turn, read_budget, spread
from fastsel.selectors import kmeans_sample as select
from fastsel.selectors.clustering import assign
from fastsel.selectors.clustering import kmeans as cluster
from fastsel.selectors.rows import Rows


def kmeans(
    pool: Any,
    *,
    encoder: Any = "bundled",
    text: str = "instruction",
    clusters: int = 100,
    pick: str = "random",
    shares: str = "proportional",
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
    """Keep rows from every cluster.

    Args:
        pool: see ifd.
        encoder, text, pooling, max_length, device, dtype, batch_tokens, implementation, store, executor, progress: see
            embed_pool.
        clusters: how many; no more than there are rows.
        pick: which rows of a cluster: "random", or the "nearest" to its centre.
        shares: of the clusters: "proportional" to their sizes, or "equal" until they are empty.
        budget, per: see facility_location.
        seed: of k-means, of random picks, and of the random draw that the selection is compared with.

    Returns:
        Selection with `clusters`, the cluster of each row; scores are minus squared distances to the centre.

    Raises:
        UsageError, InputError: an option has no such value; the pool, the encoder or the store cannot be used.
        MissingExtraError: faiss is missing.
    """
    pool = open_pool(pool)
    budget = read_budget(budget, pool, per)
    embeddings = embed_pool(
        pool, encoder, text=text, pooling=pooling, max_length=max_length, device=device, dtype=dtype, store=store,
        batch_tokens=batch_tokens, implementation=implementation, executor=executor, progress=progress,
    )  # fmt: skip
    x, rows, clusters = embeddings.matrix, embeddings.rows, min(clusters, len(embeddings.rows))
    with embeddings.timed("choose"):
        # All rows, in turn over the clusters: whatever the budget, a selection is the beginning of this order.
        order, _ = select(x, len(rows), clusters=clusters, rule=pick, allocation=shares, seed=seed)
        labels, distances = assign(Rows(x), cluster(Rows(x), clusters, seed=seed))
    indices = spread(budget, pool, embeddings.n_tokens, per).take(rows[order])
    scores = np.full(len(pool), np.nan)
    scores[rows] = -distances
    label_of_row = np.full(len(pool), -1, np.int32)
    label_of_row[rows] = labels
    selection = build_in_turn(
        pool, "kmeans", embeddings, indices, scores[indices], budget=budget, per=per, seed=seed, scores=scores,
        clusters=label_of_row,
        config={"text": text, "clusters": clusters, "pick": pick, "shares": shares, "budget": str(budget), "per": per},
    )  # fmt: skip
    note_nearness(selection, embeddings)
    return selection
