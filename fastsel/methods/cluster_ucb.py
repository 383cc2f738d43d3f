"""ClusterUCB: Efficient Gradient-Based Data Selection for Targeted Fine-Tuning of LLMs (Wang et al., EMNLP 2025
Findings, arXiv 2506.10288; authors' code ZigeW/ClusterUCB@8cbd9f0).

Keeps examples that LESS would keep, for a part of the gradients: rows are clustered once by theirs at an early
checkpoint; at the last one a bandit draws rows from clusters whose rows helped the target so far, and only rows drawn
get a gradient there. Fails where clusters say nothing about help for the target (then it is LESS on a random part),
and saves nothing on a single selection with one checkpoint: it is for choosing anew as the model learns. The paper
reselects 5 % after each epoch from 20 % drawn; one call here is one such selection, epoch by epoch with `store=` kept.

Differences from the released code; `official=True` takes its side where it says so:
- The budget of gradients counts the cold start too, and each cluster's rows are shuffled once, so that gradients are
  taken in batches; officially every draw takes one number of a shared stream.
- Clusters that are used up are passed over, where the code may stop with an error; empty ones begin anew elsewhere
  (officially they keep a centroid of zeros, and labels are a step older). Rows without a finite gradient are left out.
- Whole gradients are compared, where the code projects both sides; only clusters are made of projections.
- Seeds are one's own, the code's is 42 for all; answers of target rows end in the end of text.
"""

from typing import Any

import numpy as np

from fastsel.errors import UsageError
from fastsel.features.gradient_matrix import projected
from fastsel.features.gradient_rows import GradientRule
from fastsel.features.gradient_setup import set_up
from fastsel.features.influence import running, target_directions
from fastsel.features.leaks import REASON
from fastsel.features.row_gradients import RowGradients
from fastsel.io import open_pool
from fastsel.selection import Budget, Selection, build_selection, rank_rows, read_budget, spread
from fastsel.selectors.bandit import draw_rows
from fastsel.selectors.rows import Rows
from fastsel.selectors.spherical_kmeans import spherical_kmeans
from fastsel.unused_options import refuse_unused


def cluster_ucb(
    pool: Any, *, target: Any = None, subtask_column: str | None = None, checkpoints: Any = None,
    model: Any = None, clusters: int = 100, draw_share: float = 0.2, cold_start: float = 0.05,
    ucb_beta: float = 1.0, sketch_size: int = 8192, eps_mode: str = "inside", warmup_fraction: float = 0.05,
    epochs: int = 4, lora_r: int = 128, learning_rate: float = 2e-5, template: Any = "less",
    max_length: int | None = None, overflow: str = "truncate", turns: str = "all", leaks: str = "near",
    drop_leaks: bool = False, official: bool = False, budget: Budget | str | float = 0.1, device: str = "auto",
    dtype: str = "auto", implementation: str = "auto", batch_tokens: int | None = None, seed: int = 0,
    store: Any = None, executor: Any = None, progress: str = "auto", per: Any = None,
) -> Selection:  # fmt: skip
    """Keep the rows drawn whose training step helps the target most.

    Args:
        pool: see ifd.    target, subtask_column: see open_targets; one target.    leaks, drop_leaks: see find_leaks.
        clusters: of spherical k-means, 20 iterations.
        draw_share, cold_start, ucb_beta: of all rows those that get a gradient at the last checkpoint; of each cluster
            the share drawn first (the code's default is none); weight of the deviation. See selectors.bandit.
        checkpoints, model, warmup_fraction, epochs, lora_r, learning_rate, template, max_length, device, dtype: see
            features.gradient_setup.set_up. The first checkpoint gives clusters, the last rewards.
        sketch_size, eps_mode, overflow, turns, implementation, batch_tokens, store, executor, progress: see projected.
        official: see above.    budget, per, seed: see ifd; at most draw_share is chosen, and no budget in tokens.

    Returns:
        Selection; scores are rewards of the rows drawn (see methods.less), NaN of the others; clusters of all rows.

    Raises:
        UsageError, InputError: an option has no such value; a budget in tokens; the pool, target, model, checkpoints or
            store cannot be used.
    """
    refuse_unused(cluster_ucb, locals())
    pool = open_pool(pool)
    budget = read_budget(budget, pool, per)
    limits = spread(budget, pool, None, per)
    if not 0 < draw_share <= 1:
        raise UsageError(f"draw_share must be a share above 0 and at most 1, got {draw_share}")
    setup = set_up(
        pool, target=target, subtask_column=subtask_column, leaks=leaks, drop_leaks=drop_leaks, model=model,
        checkpoints=checkpoints, warmup_fraction=warmup_fraction, epochs=epochs, lora_r=lora_r,
        learning_rate=learning_rate, template=template, max_length=max_length, official=official, device=device,
        dtype=dtype, seed=seed, store=store, progress=progress, one_target="cluster_ucb",
    )  # fmt: skip
    first, last = setup.run[0], setup.run[-1]
    with running(first, setup.base) as state:
        taken = projected(
            pool, setup.sought.targets, state, setup, sketch_size=sketch_size, seed=seed, eps_mode=eps_mode,
            overflow=overflow, turns=turns, batch_tokens=batch_tokens, implementation=implementation,
            store=store and f"{store}/checkpoint-{first.step}", executor=executor, progress=progress,
        )  # fmt: skip
    taken.drop(setup.sought.kept_out(len(pool)), REASON)
    labels, scores = np.full(len(pool), -1, np.int64), np.full(len(pool), np.nan)
    with taken.timed("cluster"):
        unit = Rows(taken.matrix, unit=True)
        labels[taken.rows] = spherical_kmeans(unit, clusters, seed=42 if official else seed, official=official)[0]
    with running(last, setup.base) as state, taken.timed("draw"):
        wanted = target_directions(
            setup.sought.targets, state, template=setup.target_template, max_length=setup.max_length,
            implementation=implementation, progress=progress,
        )  # fmt: skip
        rule = GradientRule("adam", eps_mode=eps_mode, moments=state.moments, targets=wanted.vectors)
        rows = RowGradients(
            pool, state.forward, setup.template, rule, setup.max_length, overflow, turns, batch_tokens, implementation
        )
        with rows.kept(store and f"{store}/rewards", int(draw_share * len(taken.rows)), progress):
            draws = draw_rows(
                labels, rows.rewards, budget=draw_share, cold_start=cold_start, beta=ucb_beta, batch=16,
                rule="official" if official else "shuffled", seed=42 if official else seed,
            )  # fmt: skip
    scores[draws.rows] = draws.rewards
    taken.drop(~rows.has_vector, "its gradient is not finite")
    scores[~taken.has_vector] = np.nan
    uses = {last.step: "rewards"} | {first.step: "clusters" if first != last else "clusters, rewards"}
    drawn = f"{draws.n_evaluated:,} gradients at checkpoint {last.step} for {len(draws.rows):,} draws"
    if len(draws.rows) > draw_share * len(taken.rows) + 1:
        drawn += f", more than draw_share: each of {labels.max() + 1:,} clusters gives a row; take fewer clusters"
    return build_selection(
        pool=pool, method="cluster_ucb", indices=limits.take(rank_rows(scores, taken.has_vector)), scores=scores,
        status=taken.status, reasons=taken.reasons, n_tokens=taken.n_tokens, metrics={}, timings=taken.timings, per=per,
        budget=budget, seed=seed, official=official, clusters=labels.astype(np.int32),
        provenance={**rows.provenance, **setup.record(uses, wanted.targets)},
        config={"clusters": clusters, "draw_share": draw_share, "cold_start": cold_start, "ucb_beta": ucb_beta,
                "sketch_size": sketch_size, "drop_leaks": drop_leaks, "budget": str(budget), "per": per},
        notes=[*(one.note for one in wanted.targets), setup.sought.leaks.note, *taken.notes, setup.note(uses), drawn],
    )  # fmt: skip
