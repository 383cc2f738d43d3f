"""RDS+: Large-Scale Data Selection for Instruction Tuning (Ivison et al. 2025, arXiv 2503.01807; authors' code
hamishivi/automated-instruction-selection@df71a04): rows whose hidden states are near those of the target rows.

Keeps examples that a language model represents as it does the target's: the mean of its last hidden states over prompt
and answer, the t-th token weighted by t, compared by cosine. Target rows take turns, each the most similar row not yet
taken ("round_robin"), so that no one of them decides alone; with several subtasks these take turns, by their nearest
target row. `aggregate="mean"` (LESS's order: the mean over a subtask's rows, then the best subtask; LESS's RDS baseline
with pooling="last") and "max" rank instead. Fails where nearness is form (language, length, markup) and not skill.

Differences from the authors' code:
- The text is the conversation, one line break between its parts, where the code writes Tulu's tags.
- With several subtasks a subtask whose next row is taken already takes the one after it; the code's loses its turn.
- The model is the bundled one where the paper's is the one to be tuned; any encoder will do (`encoder="bundled"` is a
  sentence encoder: lighter, and often nearer in topic). The window is 512 tokens, the code's 2,048.
"""

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastsel.errors import UsageError
from fastsel.features.embeddings import embed_pool
from fastsel.features.leaks import REASON
from fastsel.features.target_setup import set_up_targets
from fastsel.features.target_vectors import target_vectors
from fastsel.io import open_pool
from fastsel.models.encoders import is_language_model, load_encoder
from fastsel.selection import Budget, Selection, build_in_turn, rank_rows, read_budget, spread
from fastsel.selectors.round_robin import round_robin
from fastsel.selectors.target_similarity import target_similarity
from fastsel.selectors.under_budget import pick_under


def rds(
    pool: Any,
    *,
    target: Any = None,
    subtask_column: str | None = None,
    encoder: Any = "lm:bundled",
    text: str = "conversation",
    pooling: str = "auto",
    aggregate: str = "round_robin",
    leaks: str = "near",
    drop_leaks: bool = False,
    budget: Budget | str | float = 0.1,
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
    """Keep the rows nearest to the target.

    Args:
        pool: see ifd.
        target, subtask_column: see features.targets.open_targets.
        encoder, text, pooling, max_length, device, dtype, batch_tokens, implementation, store, executor, progress: see
            embed_pool; pooling "auto" takes "weighted" for language models.
        aggregate: "round_robin", "mean" or "max".
        leaks: target rows in the pool that are looked for: "near", "equal" or "none"; see find_leaks.
        drop_leaks: leave out the pool rows that hold one.
        budget, per, seed: see facility_location.

    Returns:
        Selection; scores are the cosine with the nearest target row (round_robin, max), or the best subtask's mean.

    Raises:
        UsageError, InputError: an option has no such value; the pool, the target, the encoder or the store cannot be
            used.
    """
    if aggregate not in ("round_robin", "mean", "max"):
        raise UsageError(f"aggregate={aggregate!r} is not known; it is one of: round_robin, mean, max")
    pool = open_pool(pool)
    budget = read_budget(budget, pool, per)
    sought = set_up_targets(
        pool, target, subtask_column=subtask_column, leaks=leaks, drop_leaks=drop_leaks, device=device, store=store,
        progress=progress)  # fmt: skip
    if pooling == "auto" and is_language_model(encoder):
        pooling = "weighted"
    loaded = load_encoder(
        encoder, pooling=pooling, max_length=max_length, device=device, dtype=dtype, implementation=implementation
    )
    machine: dict[str, Any] = {"text": text, "batch_tokens": batch_tokens, "implementation": implementation}
    embeddings = embed_pool(pool, loaded, **machine, store=store, executor=executor, progress=progress)
    embeddings.drop(sought.kept_out(len(pool)), REASON)
    wanted = target_vectors(sought.targets, loaded, **machine)
    scores_n = np.full(len(pool), np.nan)
    limits = spread(budget, pool, embeddings.n_tokens, per)
    with embeddings.timed("choose"):
        scores_n[embeddings.rows] = target_similarity(
            embeddings.matrix, wanted.matrix, groups=wanted.groups, mean=aggregate == "mean",
            implementation=implementation,
        )  # fmt: skip
        if aggregate == "round_robin":
            groups = wanted.groups if len(wanted.subtasks) > 1 else None
            pick = partial(round_robin, targets=wanted.matrix, groups=groups, implementation=implementation)
            indices, gains = pick_under(limits, embeddings.rows, embeddings.matrix, pick)
        else:
            indices = limits.take(rank_rows(scores_n, embeddings.has_vector))
            gains = scores_n[indices]
    selection = build_in_turn(
        pool, "rds", embeddings, indices, gains, budget=budget, per=per, seed=seed, scores=scores_n,
        config={"text": text, "pooling": loaded.pooling, "aggregate": aggregate, "drop_leaks": drop_leaks,
                "budget": str(budget), "per": per},
    )  # fmt: skip
    selection.provenance |= sought.record
    selection.notes += [*(one.note for one in wanted.targets), sought.leaks.note, _beside_random(selection, scores_n)]
    return selection


def _beside_random(selection: Selection, scores: NDArray[np.float64]) -> str:
    chosen, drawn = (float(np.nanmean(scores[rows])) for rows in (selection.indices, selection.baseline))
    return f"cosine with the target, mean over the chosen rows: {chosen:.3f}; random draw: {drawn:.3f}"
