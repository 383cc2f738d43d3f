"""LESS: Selecting Influential Data for Targeted Instruction Tuning (Xia et al., ICML 2024, arXiv 2402.04333; authors'
code princeton-nlp/LESS@8abf962).

Keeps examples whose Adam step, at checkpoints of a short LoRA warm-up, points where the gradients of target rows point.
Fails where a target has so few rows that their gradients are noise, and where eps hides Adam's second moments.

The rule is the released code's, from which the published numbers came: cosines are averaged inside a subtask, a row
counts by its best one, eps stands inside the root, moments are not corrected. aggregation="paper" takes one cosine with
the mean gradient, as the paper says; eps_mode="outside" is Adam as published.

Differences from the released code; `official=True` takes its side in all but the first:
- Rows without a labelled token or with a gradient that is not finite have no score and do not enter a target's mean;
  the code scores them by Adam's momentum alone, and takes NaN first. Ties go to the lowest row.
- mode="direct" multiplies whole gradients; "sketch" projects them by SJLT, for a store that serves later targets;
  "trak" as the code without fast_jl, to the bit on a CPU: bfloat16, row by row, TRAK's matrix; cosines 0.011 off.
- The warm-up draws among usable rows, the code among all with seed 42; target answers end in the end of text.
"""

from typing import Any

from fastsel.features.gradient_setup import set_up
from fastsel.features.influence import influence
from fastsel.io import open_pool
from fastsel.selection import Budget, Selection, build_selection, read_budget, spread
from fastsel.selectors.score_turns import score_turns
from fastsel.unused_options import refuse_unused


def less(
    pool: Any,
    *,
    target: Any = None,
    subtask_column: str | None = None,
    checkpoints: Any = None,
    model: Any = None,
    mode: str | None = None,
    sketch_size: int = 8192,
    aggregation: str = "official",
    eps_mode: str = "inside",
    combine: str = "round_robin",
    warmup_fraction: float = 0.05,
    epochs: int = 4,
    lora_r: int = 128,
    learning_rate: float = 2e-5,
    template: Any = "less",
    max_length: int | None = None,
    overflow: str = "truncate",
    turns: str = "all",
    leaks: str = "near",
    drop_leaks: bool = False,
    official: bool = False,
    budget: Budget | str | float = 0.1,
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
    """Keep the rows whose training step helps the target most.

        score(i) = max over subtasks s of  sum_c w_c <Gamma_c(i) / |Gamma_c(i)|, u_c(s)>
        u_c(s) = mean over the rows j of s of g_c(j) / |g_c(j)|;   w_c: learning rates of checkpoints, over their sum

    Args:
        pool, budget, per, seed: see ifd. target, subtask_column: see open_targets.
        model, checkpoints, device, dtype: folders of a LoRA run, and the model that it trained (None takes what they
            name). No checkpoints: the model (None: "bundled") warms up on warmup_fraction of the pool, for that many
            epochs with lora_r and learning_rate; see fastsel.warmup. These four are refused beside checkpoints.
        mode: see influence; None is "direct", or "trak" where official. sketch_size, aggregation: see influence.
        eps_mode: see GradientRule. leaks, drop_leaks: see find_leaks.
        combine: of several targets: "round_robin" (they take turns), or "union" (each chooses a budget of its own).
        template, max_length (None takes the paper's 2,048), overflow, turns, implementation, batch_tokens, store,
            executor, progress: see lora_gradients.

    Returns:
        Selection with a metric for each subtask, `infl_<subtask>`.

    Raises:
        UsageError, InputError: an option has no such value; the pool, the target, the model or the store is unusable.
    """
    refuse_unused(less, locals())
    pool = open_pool(pool)
    budget = read_budget(budget, pool, per)
    mode = mode or ("trak" if official else "direct")
    setup = set_up(
        pool, target=target, subtask_column=subtask_column, leaks=leaks, drop_leaks=drop_leaks, model=model,
        checkpoints=checkpoints, warmup_fraction=warmup_fraction, epochs=epochs, lora_r=lora_r,
        learning_rate=learning_rate, template=template, max_length=max_length, official=official, device=device,
        dtype=dtype, seed=seed, store=store, progress=progress,
        base_dtype="bfloat16" if mode == "trak" and dtype == "auto" else dtype,
    )  # fmt: skip
    helped = influence(
        pool, setup.sought.targets, setup.run, setup.base, template=setup.template, max_length=setup.max_length,
        target_template=setup.target_template, mode=mode, sketch_size=sketch_size, aggregation=aggregation,
        eps_mode=eps_mode, overflow=overflow, turns=turns, batch_tokens=batch_tokens, implementation=implementation,
        store=store, executor=executor, progress=progress, seed=seed,
    )  # fmt: skip
    gradients, scores_nt = helped.gradients, helped.by_target
    eligible = gradients.has_gradient & ~setup.sought.kept_out(len(pool))
    take = spread(budget, pool, gradients.n_tokens, per).take
    indices, n_targets = score_turns(scores_nt, eligible, take=take, combine=combine), scores_nt.shape[1]
    union = [f"union: {n_targets} targets with a budget each chose {len(indices):,} rows together"]
    return build_selection(
        pool=pool, method="less", indices=indices, eligible=eligible, scores=scores_nt.max(axis=1),
        status=gradients.status, reasons=gradients.reasons,
        n_tokens=gradients.n_tokens, metrics={f"infl_{name}": column for name, column in helped.by_subtask.items()},
        config={"mode": mode, "aggregation": aggregation, "eps_mode": eps_mode, "combine": combine, "per": per,
                "max_length": setup.max_length, "drop_leaks": drop_leaks, "budget": str(budget)},
        notes=[*helped.notes, setup.note(helped.uses), setup.sought.leaks.note,
               *(union if combine == "union" and n_targets > 1 else [])],
        rule=setup.sought.rule, budget=budget, per=per, timings=gradients.timings, seed=seed, official=official,
        provenance={**gradients.provenance, **setup.record(helped.uses, helped.directions.targets)},
    )  # fmt: skip
