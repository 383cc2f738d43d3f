"""Perplexity: rank by how surprising the answer is to a model. A baseline.

Keeps the examples whose answer the model predicts worst, given the prompt; fails where an answer is surprising because
it is wrong, garbled or in a language that the model does not know. Ranking by s(A|Q) alone is an ablation of Cherry_LLM
(Li et al., NAACL 2024), reported there as worse than training on everything: the ratio with s(A) is what matters.

`official=True` cuts and counts tokens as Cherry_LLM's code does (see ifd); rows that its filter drops for their length
then have no score. A `text` row has no prompt: its perplexity is that of the whole text after a start token.
"""

from typing import Any

import numpy as np

from fastsel.features.answer_tokens import CONDITIONED
from fastsel.features.token_stats import answer_losses, window_of
from fastsel.io import open_pool
from fastsel.io.templates import load_template
from fastsel.models.loading import load_model
from fastsel.selection import Budget, Selection, build_selection, choose, read_budget


def perplexity(
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
    """Keep the examples with the highest exp(s(A|Q)), s(A|Q) = mean over answer tokens of -log p(w_t | prompt, w_<t).

    Args:
        pool, model, budget, template, official, device, dtype, implementation, batch_tokens, seed, store, executor,
            progress, per, overflow, turns: as in ifd.
        max_length: window in tokens; None takes 512, as ifd does, or the model's positions if it has fewer.

    Returns:
        Selection with metrics ppl_cond and loss_cond (nats a token).

    Raises:
        UsageError: an option has no such value.
        InputError: the pool, the model or the store cannot be used.
    """
    pool = open_pool(pool)
    budget = read_budget(budget, pool, per)
    loaded = load_model(model, device=device, dtype="float32" if official and dtype == "auto" else dtype)
    losses = answer_losses(
        pool,
        loaded,
        template=load_template(template, loaded.tokenizer),
        passes=(CONDITIONED,),
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
    loss = losses.mean(CONDITIONED)
    with np.errstate(over="ignore"):  # a loss above 709 nats a token: its perplexity is infinite
        ppl = np.exp(loss)
    return build_selection(
        pool=pool,
        method="perplexity",
        indices=choose(ppl, ~np.isnan(ppl), budget, pool=pool, n_tokens=losses.n_tokens, per=per),
        scores=ppl,
        status=losses.status,
        reasons=losses.reasons,
        n_tokens=losses.n_tokens,
        metrics={"ppl_cond": ppl, "loss_cond": loss},
        config={"max_length": max_length, "overflow": overflow, "turns": turns, "budget": str(budget), "per": per},
        timings=losses.timings,
        seed=seed,
        notes=losses.notes,
        official=official,
        budget=budget,
        per=per,
        provenance=losses.provenance,
    )
