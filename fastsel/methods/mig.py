"""MIG: Automatic Data Selection by Maximizing Information Gain in Semantic Space (Chen et al., Findings of ACL 2025,
arXiv 2504.13835; authors' code yichengchen24/MIG@969eb53).

Keeps rows whose tags, weighed by quality and spread over similar tags, add most to what the chosen rows have. Fails
when tags are noise: a misspelt one looks like news (see valid_tags), and the first row of a label is worth many later
ones (x^0.8 is steep at 0). The threshold of 0.9 was tuned on e5-mistral-7b-instruct; other encoders spread otherwise.

Differences from the authors' code; `official=True` takes its side in each:
- Rows without quality count as 1 when no row has any, a score column may be the quality, and a pool without tags gets
  labels by k-means over its embeddings (clusters; our extension). The code takes annotated rows only.
- A row with tags, but no valid one, is skipped; in the code it stays, worth nothing, and may fill up a large budget.
- A label's similarity to itself is 1; the code takes the product that came out, within 1e-7 of it.
Not reproduced: float32, whose rounding decides between gains nearer than 1e-7 (here float64; nearer than 1e-9 is equal,
lowest row first), and tags looked up in a list, one by one.
"""

from functools import partial
from typing import Any

from fastsel.errors import UsageError
from fastsel.features.embeddings import embed_pool, embed_texts
from fastsel.features.labels import carries, one_label_a_row, read_labels
from fastsel.io import open_pool
from fastsel.selection import Budget, Selection, build_in_turn, read_budget, spread
from fastsel.selectors import mig as select
from fastsel.selectors.clustering import assign, kmeans
from fastsel.selectors.label_matrix import CompressedRows
from fastsel.selectors.rows import Rows
from fastsel.selectors.under_budget import pick_under

QUALITY = ("annotation.deita.quality_scores", "annotation.deita.complexity_scores")


def mig(
    pool: Any,
    *,
    label_column: str = "annotation.instag.content",
    quality_columns: Any = None,
    valid_tags: Any = None,
    clusters: int | None = None,
    encoder: Any = "bundled",
    text: str = "instruction",
    threshold: float = 0.9,
    propagation: float = 1.0,
    gain: str = "first_order",
    phi: str = "power",
    phi_a: float = 1e-6,
    phi_b: float = 0.8,
    phi_alpha: float = 1.0,
    norm: bool = False,
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
    """Keep the rows that bring most information, one after another: see fastsel.selectors.mig for the formula.

    Args:
        pool: see ifd; opened with a score column, that is the quality.
        label_column, quality_columns, valid_tags, norm: see read_labels (norm: share_among_tags); quality_columns None
            takes DEITA's two where a row has them.
        clusters: labels are this many clusters of embedded rows; None: only if no row has tags, one for 100 rows.
        encoder, text, pooling, max_length, device, dtype, batch_tokens, implementation, store, executor, progress: of
            the label names (or, for clusters, of the rows), see embed_pool; implementation is of the kernels.
        threshold, propagation, gain, phi, phi_a, phi_b, phi_alpha: see fastsel.selectors.mig.
        budget, per: rows or a share of all pool rows; quotas. seed: of the clusters, and of the random draw beside.
        official: compute and choose as the authors' code does; see above.

    Returns:
        Selection; scores and gains are what a row added when it was chosen; metrics: quality.

    Raises:
        UsageError, InputError: an option has no such value; the pool, its labels or the encoder cannot be used.
    """
    pool = open_pool(pool)
    budget = read_budget(budget, pool, per)
    embedding: dict[str, Any] = {"pooling": pooling, "max_length": max_length, "device": device, "dtype": dtype}
    embedding |= {"batch_tokens": batch_tokens, "implementation": implementation, "progress": progress}
    by_cluster = clusters is not None or not carries(pool, label_column)
    if by_cluster and official:
        raise UsageError(f"the authors' code reads tags, and no row has any in {label_column} (or clusters is set)")
    if by_cluster:
        rows = embed_pool(pool, encoder, text=text, store=store, executor=executor, **embedding)
        vectors = kmeans(Rows(rows.matrix), clusters or -(-len(rows.rows) // 100), seed=seed)
        labels = one_label_a_row(pool, rows, assign(Rows(rows.matrix), vectors)[0])
    else:
        if quality_columns is None and (official or carries(pool, QUALITY[0])):
            quality_columns = QUALITY
        labels = read_labels(
            pool, label_column, quality_columns, valid_tags=valid_tags, share_among_tags=norm,
            keep_unlabelled=official, progress=progress,
        )  # fmt: skip
        vectors = embed_texts(labels.names, encoder, **embedding)
    matrix = CompressedRows(labels.indptr, labels.indices, labels.values, len(vectors))
    pick = partial(
        select, embeddings=vectors, threshold=threshold, propagation=propagation, gain=gain, phi=phi, a=phi_a, b=phi_b,
        alpha=phi_alpha, implementation=implementation,
    )  # fmt: skip
    limits = spread(budget, pool, labels.n_tokens, per)
    with labels.timed("choose"):
        indices, gains = pick_under(limits, labels.rows, matrix, pick, quality=labels.quality)
    options = {"label_column": label_column, "clusters": clusters, "threshold": threshold, "propagation": propagation}
    return build_in_turn(
        pool, "mig", labels, indices, gains, budget=budget, per=per, seed=seed, official=official,
        metrics={"quality": labels.quality_of_pool()},
        config={**options, "gain": gain, "phi": phi, "norm": norm, "text": text, "budget": str(budget), "per": per},
    )  # fmt: skip
