"""IFD: From Quantity to Quality (Li et al., NAACL 2024, arXiv 2308.12032; authors' code tianyi-lab/Cherry_LLM@01fac8d).

Keeps examples whose instruction makes the answer little easier: there is something left to learn. Fails when the model
does not know the template (ratios near or above 1, see `template`), favours long answers, and takes few rows of code,
whose answers follow from the question (`per="source"` gives each source its share). Only the scoring stage is here: no
brief training on 1,000 examples comes first (the authors' later version leaves it out too).

Differences from the authors' code; `official=True` takes its side in each:
- The direct pass is cut so that both passes score the same answer tokens; the code allows for a header of 4 tokens,
  which is LLaMA's count, and so scores another number of tokens under other tokenizers.
- Where a token reaches across the prompt's end the answer is encoded alone; the code goes by the prompt's token count.
- A share is of all pool rows; the code's is of the rows that passed its filter, rounded down.
- Equal ratios: the lowest row first; the code prefers the highest.
- Special-token strings inside a row stay text; in the code they become tokens.
- dtype "auto" is float32 on a CPU and the checkpoint's on a GPU; the code loads float32 everywhere.
Not reproduced: a share that rounds down to no row (the code's slice then takes all, we take none), and a loss that is
not a number (it upsets the code's sort; here the row has no score).
Conversations are our extension: earlier turns stand before the last instruction, s is over all answer tokens.
"""

from typing import Any

import numpy as np

from fastsel.features.answer_tokens import CONDITIONED, DIRECT
from fastsel.features.token_stats import answer_losses, window_of
from fastsel.io import open_pool
from fastsel.io.templates import load_template
from fastsel.models.loading import load_model
from fastsel.selection import Budget, Selection, build_selection, rank_rows, read_budget, spread


def ifd(
    pool: Any,
    *,
    model: Any = "bundled",
    budget: Budget | str | float = 0.1,
    template: Any = "alpaca",
    max_length: int | None = None,
    official: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    implementation: str = "auto",
    batch_tokens: int | None = None,
    seed: int = 0,
    store: Any = None,
    executor: Any = None,
    progress: str = "auto",
    per: Any = None,
    overflow: str = "truncate",
    turns: str = "all",
) -> Selection:
    """Keep the examples with the highest instruction-following difficulty, up to 1.

        s(A|Q) = mean over answer tokens of -log p(w_t | prompt, w_<t)          s(A) = the same after the header only
        IFD = s(A|Q) / s(A);   above 1 the instruction misleads: not eligible

    Args:
        pool: path, glob, list of paths, Dataset, Table, DataFrame, list of dicts, or a Pool from open_pool.
        model, device, dtype, template: see load_model and load_template.
        budget: 0.1 or "10%" of all pool rows, 1000 rows, or "2Mtok".
        max_length: window in tokens; None takes the paper's 512, or the model's positions if it has fewer.
        official: compute and choose as the authors' code does; see above.
        implementation, batch_tokens, store, executor, progress, overflow, turns: see answer_losses.
        seed, per: of the random draw that the selection is compared with; quotas, such as "source".

    Returns:
        Selection with metrics ifd, loss_cond and loss_direct (nats a token).

    Raises:
        UsageError, InputError: an option has no such value; the pool, the model or the store cannot be used.
    """
    pool = open_pool(pool)
    budget = read_budget(budget, pool, per)
    loaded = load_model(model, device=device, dtype="float32" if official and dtype == "auto" else dtype)
    losses = answer_losses(
        pool,
        loaded,
        template=load_template(template, loaded.tokenizer),
        max_length=(max_length := window_of(loaded, max_length, papers=512)),
        overflow=overflow,
        turns=turns,
        rule="cherry" if official else "shared",
        batch_tokens=batch_tokens,
        implementation=implementation,
        store=store,
        executor=executor,
        progress=progress,
    )
    conditioned, direct = losses.mean(CONDITIONED), losses.mean(DIRECT)  # s(A|Q), s(A)
    losses.drop(direct == 0, "the answer is certain without the instruction, so there is no ratio")
    ratio = np.divide(conditioned, direct, out=np.full(len(pool), np.nan), where=losses.has_score)
    eligible = ratio <= 1  # False for NaN
    if official:
        kept = np.flatnonzero(eligible)
        ranked = kept[np.lexsort((-kept, -ratio[kept]))]
        if budget.unit == "share":
            budget = Budget("rows", int(budget.amount * len(kept)))
    else:
        ranked = rank_rows(ratio, eligible)
    return build_selection(
        pool=pool,
        method="ifd",
        indices=spread(budget, pool, losses.n_tokens, per).take(ranked),
        scores=ratio,
        status=losses.status,
        reasons=losses.reasons,
        n_tokens=losses.n_tokens,
        metrics={"ifd": ratio, "loss_cond": conditioned, "loss_direct": direct},
        config={"max_length": max_length, "overflow": overflow, "turns": turns, "budget": str(budget), "per": per},
        timings=losses.timings,
        seed=seed,
        notes=losses.notes,
        official=official,
        budget=budget,
        per=per,
        eligible=eligible,
        rule="IFD above 1",
        provenance=losses.provenance,
    )
