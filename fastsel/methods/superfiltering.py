"""Superfiltering (Li et al., ACL 2024, arXiv 2402.00530; authors' code tianyi-lab/Superfiltering@f0764af).

Keeps what IFD keeps, as a small model ranks it: no template, and the ratio of perplexities instead of losses. Fails
where the small model cannot read the pool at all (another language, code), and favours rows with a high s(A|Q) - s(A),
which short answers reach more easily than under IFD's ratio of losses.

The second stage of Superfiltering.D (facility location over sentence embeddings of the best rows) is not here: it
waits for the facility-location selector.

Differences from the authors' code; `official=True` takes its side in each:
- A tokenizer that adds no start token (GPT-2) gets one before both passes; in the code the bare answer's first token
  is not scored, and a one-token answer has no score at all.
- Both passes score the same answer tokens, also where an answer is cut; the code cuts the direct text one token longer
  than its count of the prompt leaves, which fits a tokenizer with a start token only.
- A token that reaches across the end of the prompt (GPT-2 joins line breaks) is avoided by encoding the answer alone;
  the code counts the prompt's tokens and scores what lies behind that count.
- A share is of all pool rows; the code's is of 52,002, Alpaca's size, whatever the pool.
- Special-token strings inside a row stay text; in the code they become tokens.
- dtype "auto" is float32 on a CPU and the checkpoint's on a GPU; the code loads float32 everywhere.
One thing is not reproduced: the code turns any error into perplexity 0; here an error is an error.
A ratio of exactly 1 is dropped, ties go to the lowest row (its sort is stable), as in the code. The paper's model is
GPT-2. Conversations are our extension: earlier turns stand before the last instruction, s is over all answer tokens.
"""

from typing import Any

import numpy as np

from fastsel.features.answer_tokens import CONDITIONED, DIRECT
from fastsel.features.token_stats import answer_losses, window_of
from fastsel.io import open_pool
from fastsel.io.templates import load_template
from fastsel.models.loading import load_model
from fastsel.selection import Budget, Selection, build_selection, choose, read_budget

ALPACA_ROWS = 52_002


def superfiltering(
    pool: Any,
    *,
    model: Any = "bundled",
    budget: Budget | str | float = 0.1,
    template: Any = "none",
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
    """Keep the examples with the highest perplexity ratio below 1.

        IFD_ppl = exp(s(A|Q) - s(A)),  s as in ifd, with the bare instruction before the answer and nothing else

    Args:
        pool, model, budget, official, device, dtype, implementation, batch_tokens, seed, store, executor, progress,
            per, overflow, turns: as in ifd.
        template: see load_template; the paper's is "none", the instruction and a line break.
        max_length: window in tokens; None takes the paper's 1,024, or the model's positions if it has fewer.

    Returns:
        Selection with metrics ifd_ppl, ppl_cond and ppl_direct.

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
        max_length=(max_length := window_of(loaded, max_length, papers=1024)),
        overflow=overflow,
        turns=turns,
        rule="superfiltering" if official else "shared",
        batch_tokens=batch_tokens,
        implementation=implementation,
        store=store,
        executor=executor,
        progress=progress,
    )
    conditioned, direct = losses.mean(CONDITIONED), losses.mean(DIRECT)  # s(A|Q), s(A)
    with np.errstate(over="ignore"):  # a loss above 709 nats a token: its perplexity is infinite
        ratio, ppl_cond, ppl_direct = np.exp(conditioned - direct), np.exp(conditioned), np.exp(direct)
    eligible = ratio < 1  # False for NaN
    if official and budget.unit == "share":
        budget = Budget("rows", int(budget.amount * ALPACA_ROWS))
    return build_selection(
        pool=pool,
        method="superfiltering",
        indices=choose(ratio, eligible, budget, pool=pool, n_tokens=losses.n_tokens, per=per),
        scores=ratio,
        status=losses.status,
        reasons=losses.reasons,
        n_tokens=losses.n_tokens,
        metrics={"ifd_ppl": ratio, "ppl_cond": ppl_cond, "ppl_direct": ppl_direct},
        config={"max_length": max_length, "overflow": overflow, "turns": turns, "budget": str(budget), "per": per},
        timings=losses.timings,
        seed=seed,
        notes=losses.notes,
        official=official,
        budget=budget,
        per=per,
        eligible=eligible,
        rule="perplexity ratio of 1 or more",
        provenance=losses.provenance,
    )
