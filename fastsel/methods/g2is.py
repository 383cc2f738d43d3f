"""G2IS: Gradient-Based Graph Instruction Selection (Zhao et al., "Beyond Similarity: A Gradient-Based Graph Method for
Instruction Tuning Data Selection", ACL 2025, arXiv 2502.11062; authors' code zy125413/G2IS@990409b).

Keeps examples on walks through the pool's gradients: each walk follows one principal component of the target's
gradients (what target rows differ in, not what they share), from the row nearest it to the row most similar to the
last, as long as no two picks conflict and their sum keeps the component's direction. Fails where the target is one
thing, whose gradients differ by noise only; copies of a row follow each other: drop them first.

Differences from the released code; `official=True` takes its side in each:
- A component points where the mean target gradient does; the code's sign is a convention of scikit-learn's.
- A walk that no row may continue is followed by another one of the same component; the code returns fewer rows.
The code is given gradients and a graph of all pairs of rows, and the programs that make them are not released: here
gradients are LESS's (Adam steps of pool rows, plain gradients of target rows, projected to `sketch_size` numbers) at
the last checkpoint, and the walk is the same without the graph. Or give both: gradients=, target_gradients=.
"""

from functools import partial
from typing import Any

from fastsel.errors import UsageError
from fastsel.features.gradient_matrix import given_matrix, projected
from fastsel.features.gradient_setup import set_up
from fastsel.features.influence import running
from fastsel.features.leaks import REASON
from fastsel.features.target_setup import set_up_targets
from fastsel.io import open_pool
from fastsel.selection import Budget, Selection, build_in_turn, read_budget, spread
from fastsel.selectors import graph_walk
from fastsel.selectors.under_budget import pick_under
from fastsel.unused_options import refuse_unused


def g2is(
    pool: Any, *, target: Any = None, subtask_column: str | None = None, gradients: Any = None,
    target_gradients: Any = None, checkpoints: Any = None, model: Any = None, variance: float = 0.5,
    consistency: float = 0.8, sketch_size: int = 8192, eps_mode: str = "inside", warmup_fraction: float = 0.05,
    epochs: int = 4, lora_r: int = 128, learning_rate: float = 2e-5, template: Any = "less",
    max_length: int | None = None, overflow: str = "truncate", turns: str = "all", leaks: str = "near",
    drop_leaks: bool = False, official: bool = False, budget: Budget | str | float = 0.1, device: str = "auto",
    dtype: str = "auto", implementation: str = "auto", batch_tokens: int | None = None, seed: int = 0,
    store: Any = None, executor: Any = None, progress: str = "auto", per: Any = None,
) -> Selection:  # fmt: skip
    """Keep rows on walks along what the target's gradients differ in; the paper keeps 1 %.

    Args:
        pool: see ifd.    target, subtask_column: see open_targets; all its rows count alike, whatever their subtask.
        gradients, target_gradients: the user's own, see given_matrix; then no model is run.
        checkpoints, model, warmup_fraction, epochs, lora_r, learning_rate, template, max_length, device, dtype: see
            features.gradient_setup.set_up.
        variance, consistency: the share of the target's variance that components explain, and the paper's delta.
        sketch_size, eps_mode, overflow, turns, implementation, batch_tokens, store, executor, progress: see projected.
        leaks, drop_leaks: see find_leaks.    official: take the authors' side in the differences above.
        budget, per, seed: see ifd; no budget in tokens.

    Returns:
        Selection in order of choice; scores and gains are cosines with the pick before, of the first row of a walk with
        its component.

    Raises:
        UsageError, InputError: an option has no such value; a budget in tokens; the pool, target, model, checkpoints,
            gradients or store cannot be used.
    """
    refuse_unused(g2is, locals())
    pool = open_pool(pool)
    budget = read_budget(budget, pool, per)
    limits = spread(budget, pool, None, per)
    if target is None and target_gradients is None:
        raise UsageError("which target? --target names a file of rows, --target-gradients their gradients")
    if gradients is not None or target_gradients is not None:
        taken = given_matrix(pool, gradients, target_gradients)
        sought = set_up_targets(
            pool, target, subtask_column=subtask_column, leaks=leaks, drop_leaks=drop_leaks, device=device,
            store=store, progress=progress, optional=True,
        )  # fmt: skip
        taken.provenance |= sought.record
    else:
        setup = set_up(
            pool, target=target, subtask_column=subtask_column, leaks=leaks, drop_leaks=drop_leaks, model=model,
            checkpoints=checkpoints, warmup_fraction=warmup_fraction, epochs=epochs, lora_r=lora_r,
            learning_rate=learning_rate, template=template, max_length=max_length, official=official, device=device,
            dtype=dtype, seed=seed, store=store, progress=progress,
        )  # fmt: skip
        last, sought = setup.run[-1], setup.sought
        with running(last, setup.base) as state:
            taken = projected(
                pool, sought.targets, state, setup, sketch_size=sketch_size, seed=seed, eps_mode=eps_mode,
                overflow=overflow, turns=turns, batch_tokens=batch_tokens, implementation=implementation,
                store=store and f"{store}/checkpoint-{last.step}", executor=executor, progress=progress,
            )  # fmt: skip
        taken.provenance |= setup.record({last.step: "gradients"})
        taken.notes.append(setup.note({last.step: "gradients"}))
    taken.drop(sought.kept_out(len(pool)), REASON)
    walk = partial(
        graph_walk, target=taken.target, variance=variance, consistency=consistency,
        rule="official" if official else "restart",
    )  # fmt: skip
    with taken.timed("choose"):
        indices, gains = pick_under(limits, taken.rows, taken.matrix, walk)
    selection = build_in_turn(
        pool, "g2is", taken, indices, gains, budget=budget, per=per, seed=seed, official=official,
        config={"variance": variance, "consistency": consistency, "sketch_size": sketch_size, "eps_mode": eps_mode,
                "drop_leaks": drop_leaks, "budget": str(budget), "per": per},
    )  # fmt: skip
    selection.notes += sought.notes
    missing = min(sum(limits.limits), len(taken.rows)) - len(indices)
    if missing > 0:
        selection.notes.append(
            f"{missing:,} {'row' if missing == 1 else 'rows'} fewer than asked for: walks ended early"
        )
    return selection
