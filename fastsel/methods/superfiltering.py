"""Superfiltering (Li et al., ACL 2024, arXiv 2402.00530; authors' code tianyi-lab/Superfiltering@f0764af).

Keeps what IFD keeps, as a small model ranks it: no template, and the ratio of perplexities instead of losses. Fails
where the small model cannot read the pool (another language, code); favours a high s(A|Q) - s(A), which short answers
reach more easily. `shortlist` adds the second stage, Superfiltering.D: of so many best rows (the scripts: 20 %, then a
budget of 2 %), greedy facility location over sentence embeddings keeps those that stand best for the others.

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
Not reproduced: the code turns any error into perplexity 0 (here an error is an error), and submodlib, its second stage,
rounds similarities to float32 and takes the last of equal rows (here float64, the better ranked one).
A ratio of 1 is dropped, ties go to the lowest row, as in the code. The paper's model is GPT-2. Conversations are our
extension: earlier turns stand before the last instruction, s is over all answer tokens.
"""

from functools import partial
from typing import Any

import numpy as np

from fastsel.features.answer_tokens import CONDITIONED, DIRECT
from fastsel.features.embeddings import embed_texts
from fastsel.features.row_texts import RowText
from fastsel.features.token_stats import answer_losses, window_of
from fastsel.io import open_pool
from fastsel.io.templates import load_template
from fastsel.models.loading import load_model
from fastsel.selection import Budget, Selection, build_selection, choose, read_budget, spread
from fastsel.selectors import facility_location
from fastsel.selectors.under_budget import pick_under


def superfiltering(
    pool: Any,
    *,
    model: Any = "bundled",
    budget: Budget | str | float = 0.1,
    shortlist: Budget | str | float | None = None,
    encoder: Any = None,
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
        shortlist: None, or a share or number of rows that the second stage chooses among.
        encoder: its encoder, see load_encoder; None takes the paper's, all-MiniLM-L6-v2.
        max_length: window in tokens; None takes the paper's 1,024, or the model's positions if it has fewer.

    Returns:
        Selection with metrics ifd_ppl, ppl_cond and ppl_direct.

    Raises:
        UsageError, InputError: an option has no such value; the pool, the model or the store cannot be used.
    """
    pool = open_pool(pool)
    budget, shortlist = read_budget(budget, pool, per), None if shortlist is None else Budget.parse(shortlist)
    spread(shortlist or "1.0", pool)  # refuses tokens before hours of scoring
    loaded = load_model(model, device=device, dtype="float32" if official and dtype == "auto" else dtype)
    losses = answer_losses(
        pool, loaded, template=load_template(template, loaded.tokenizer),
        max_length=(max_length := window_of(loaded, max_length, papers=1024)), overflow=overflow, turns=turns,
        rule="superfiltering" if official else "shared", batch_tokens=batch_tokens, implementation=implementation,
        store=store, executor=executor, progress=progress,
    )  # fmt: skip
    conditioned, direct = losses.mean(CONDITIONED), losses.mean(DIRECT)  # s(A|Q), s(A)
    with np.errstate(over="ignore"):  # a loss above 709 nats a token: its perplexity is infinite
        ratio, ppl_cond, ppl_direct = np.exp(conditioned - direct), np.exp(conditioned), np.exp(direct)
    eligible, rule, gains = ratio < 1, "perplexity ratio of 1 or more", None  # NaN is not below 1
    if official:
        budget, shortlist = _of_alpaca(budget), None if shortlist is None else _of_alpaca(shortlist)
    if shortlist is None:
        indices = choose(ratio, eligible, budget, pool=pool, n_tokens=losses.n_tokens, per=per)
    else:
        best = choose(ratio, eligible, shortlist, pool=pool)
        eligible, rule = np.isin(np.arange(len(pool)), best), f"not among the {len(best):,} best perplexity ratios"
        texts = [RowText("template:none")(example) for example in pool.examples(best)]
        window = 512 if encoder is None else None  # the authors'; sentence-transformers would cut at 256
        points = embed_texts(texts, encoder or "bundled", max_length=window, device=device, progress=progress)
        cover = partial(facility_location, similarity="exp_distance", implementation=implementation)
        limits = spread(budget, pool, losses.n_tokens, per)
        indices, added = pick_under(limits, best, points, cover, points_as="queries")
        gains = np.full(len(pool), np.nan)
        gains[indices] = added
    return build_selection(
        pool=pool, method="superfiltering", indices=indices, scores=ratio, status=losses.status, reasons=losses.reasons,
        n_tokens=losses.n_tokens, metrics={"ifd_ppl": ratio, "ppl_cond": ppl_cond, "ppl_direct": ppl_direct},
        config={"max_length": max_length, "overflow": overflow, "turns": turns, "budget": str(budget), "per": per}
        | {"shortlist": shortlist and str(shortlist)}, timings=losses.timings, provenance=losses.provenance, seed=seed,
        notes=losses.notes, official=official, budget=budget, per=per, eligible=eligible, rule=rule, gains=gains,
    )  # fmt: skip


def _of_alpaca(budget: Budget) -> Budget:
    return Budget("rows", int(budget.amount * 52_002)) if budget.unit == "share" else budget
