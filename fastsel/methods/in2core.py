"""In2Core-style coresets: In2Core: Leveraging Influence Functions for Coreset Selection in Instruction Finetuning of
Large Language Models (San Joaquin et al., EMNLP Findings 2024, arXiv 2408.03560), by DataInf (Kwon et al., ICLR 2024,
arXiv 2310.00902; authors' code ykwon0407/DataInf@fe9145a).

Keeps examples on which one more step would lower the target's loss most, by influence functions: the gradients of a
LoRA adapter, weighed layer by layer with the inverse of their second moments, in DataInf's closed form. Fails where the
adapter has not converged, which influence functions assume, and prefers rows with large gradients: hard rows, short
answers, and garbage whose gradient happens to point right.

In2Core has no released code: which layers, ranks and damping it used is not known, and no parity is claimed. DataInf is
exact (`layers=` names LoRA matrices; all by default). The paper keeps half of the pool: budget=0.5.
Differences from DataInf's code:
- Gradients are of the answer's tokens; the code's generation examples label the prompt's too.
- Rows without a labelled token, or with a gradient that is not finite, are left out.
- Nothing is kept of a gradient: each of the three passes of the closed form takes them anew, where the code holds all
  of them in memory. An interrupted run goes on; the second pass, which only adds up, begins anew.
- `gradients=` and `target_gradients=` take kept ones: whole or projected, they are one layer.
"""

import time
from typing import Any

import numpy as np

from fastsel.errors import UsageError
from fastsel.features.gradient_matrix import given_matrix
from fastsel.features.gradient_rows import GradientRule
from fastsel.features.gradient_setup import set_up
from fastsel.features.influence import running
from fastsel.features.row_gradients import RowGradients, matrices_of
from fastsel.features.sharded_influence import sharded_influences
from fastsel.features.target_setup import set_up_targets
from fastsel.io import open_pool
from fastsel.selection import Budget, Selection, build_selection, rank_rows, read_budget, spread
from fastsel.selectors.data_influence import InfluencePasses, influences
from fastsel.unused_options import refuse_unused


def in2core(
    pool: Any, *, target: Any = None, subtask_column: str | None = None, gradients: Any = None,
    target_gradients: Any = None, checkpoints: Any = None, model: Any = None, layers: Any = None,
    damping: float = 0.1, warmup_fraction: float = 0.05, epochs: int = 4, lora_r: int = 8, learning_rate: float = 2e-5,
    template: Any = "less", max_length: int | None = None, overflow: str = "truncate", turns: str = "all",
    leaks: str = "near", drop_leaks: bool = False, budget: Budget | str | float = 0.1, device: str = "auto",
    dtype: str = "auto", implementation: str = "auto", batch_tokens: int | None = None, seed: int = 0,
    store: Any = None, executor: Any = None, progress: str = "auto", per: Any = None,
) -> Selection:  # fmt: skip
    """Keep the rows with the most negative influence on the target's loss.

    Args:
        pool: see ifd.    target, subtask_column: see open_targets; all its rows count alike.
        gradients, target_gradients: the user's own, see given_matrix; then no model is run.
        layers: LoRA matrices that count: those with one of these texts in their name ("layers.29"); None: all.
        damping: of a layer, as a share of its mean squared gradient.
        checkpoints, model, warmup_fraction, epochs, lora_r, learning_rate, template, max_length, device, dtype, store:
            see features.gradient_setup.set_up; gradients are those at the last checkpoint.
        overflow, turns: see TrainingTokenizer.    leaks, drop_leaks: see find_leaks.
        budget, per, seed: see ifd; no budget in tokens.
        implementation, batch_tokens, executor, progress: see lora_gradients.

    Returns:
        Selection; scores are minus the influences, so that high ones are good.

    Raises:
        UsageError, InputError: an option has no such value; a budget in tokens; the pool, target, model, checkpoints or
            gradients cannot be used.
    """
    refuse_unused(in2core, locals())
    pool, started = open_pool(pool), time.perf_counter()
    budget = read_budget(budget, pool, per)
    limits = spread(budget, pool, None, per)
    if not 0 < damping < np.inf:
        raise UsageError(f"damping must be a number above 0, got {damping}")
    if target is None and target_gradients is None:
        raise UsageError("which target? --target names a file of rows, --target-gradients their gradients")
    scores = np.full(len(pool), np.nan)
    taken: Any
    if gradients is not None or target_gradients is not None:
        taken = given_matrix(pool, gradients, target_gradients)
        scores[taken.rows] = -influences(taken.matrix, taken.target, damping=damping)
        sought = set_up_targets(
            pool, target, subtask_column=subtask_column, leaks=leaks, drop_leaks=drop_leaks, device=device,
            store=store, progress=progress, optional=True,
        )  # fmt: skip
        notes, provenance = [*taken.notes, *sought.notes], {**taken.provenance, **sought.record}
    else:
        setup = set_up(
            pool, target=target, subtask_column=subtask_column, leaks=leaks, drop_leaks=drop_leaks, model=model,
            checkpoints=checkpoints, warmup_fraction=warmup_fraction, epochs=epochs, lora_r=lora_r,
            learning_rate=learning_rate, template=template, max_length=max_length, device=device, dtype=dtype,
            seed=seed, store=store, progress=progress, needs_adam=False,
        )  # fmt: skip
        last, sought = setup.run[-1], setup.sought
        with running(last, setup.base) as state:
            how: tuple[Any, ...] = (setup.max_length, overflow, turns, batch_tokens, implementation)
            wanted = [
                RowGradients(one.pool, state.forward, setup.target_template, GradientRule("sgd", dense=True), *how)
                .whole(one.rows) for one in sought.targets
            ]  # fmt: skip
            spans = [(name, *span) for name, span in matrices_of(state.forward, layers).items()]
            taken = sharded_influences(
                pool, state.forward, InfluencePasses(spans, np.concatenate(wanted).mean(0, np.float64, keepdims=True)),
                template=setup.template, damping=damping, max_length=setup.max_length, overflow=overflow, turns=turns,
                batch_tokens=batch_tokens, implementation=implementation, store=store and f"{store}/influences",
                executor=executor, progress=progress,
            )  # fmt: skip
            scores = -taken.values
        notes = [*sought.notes, setup.note({last.step: "influence"})]
        provenance = {**taken.provenance, **setup.record({last.step: "influence"})}
    scores[~taken.has_vector] = np.nan
    eligible = taken.has_vector & ~sought.kept_out(len(pool))
    return build_selection(
        pool=pool, method="in2core", indices=limits.take(rank_rows(scores, eligible)), scores=scores,
        status=taken.status, reasons=taken.reasons, n_tokens=taken.n_tokens, metrics={}, eligible=eligible,
        budget=budget, per=per, seed=seed, rule=sought.rule, provenance=provenance,
        config={"layers": layers, "damping": damping, "drop_leaks": drop_leaks, "budget": str(budget), "per": per},
        notes=notes, timings={"influence": time.perf_counter() - started},
    )  # fmt: skip
