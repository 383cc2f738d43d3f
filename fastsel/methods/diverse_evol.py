"""DiverseEvol (Wu et al. 2023, arXiv 2311.08182; authors' code OFA-Sys/DiverseEvol@a22e952, KCenterSampling).

Keeps rows that the model, trained on those kept so far, sees far from them: a few rows drawn at random are the first
training set; then, round by round, the model is trained anew on all rows kept, embeds the pool (mean of the last hidden
states over all tokens of prompt and answer), and the rows farthest from those kept are added, one after another
(k-center greedy, Euclidean). Fails where what is far is garbage; costs a training and a pass over the pool each round.

Differences from the authors' code; `official=True` takes its side where it says so:
- A low-rank adapter is trained (peft) on the model given, where the code trains all weights of LLaMA-7B, from the
  start each round as it does; learning rate 2e-4 instead of 2e-5.
- The square under the root is never below 0. The code's float32 |a|^2 + |b|^2 - 2ab is, for near-copies, its root NaN,
  and NaN is chosen first: near-copies of rows kept come before everything else (official).
- Rows of a round stand in the order of choice; the code sorts them by row number (official). The set is the same.
- The random start is seeded. Whitening, which the code has and leaves off, and its other schedules are not here.
With `encoder`, or train="none", vectors stay what they are and rounds only decide the order of a plain k-center greedy.
"""

import time
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from fastsel.errors import UsageError
from fastsel.features.answer_tokens import CONDITIONED, AnswerTokenizer
from fastsel.features.embeddings import Embeddings, embed_pool
from fastsel.io import open_pool
from fastsel.io.examples import STATUS
from fastsel.io.templates import load_template
from fastsel.models.loading import load_model
from fastsel.models.lora import adapted
from fastsel.selection import Budget, Selection, build_selection, read_budget
from fastsel.selectors import k_center
from fastsel.selectors.unclamped_k_center import unclamped_k_center


def diverse_evol(
    pool: Any, *, model: Any = "bundled", encoder: Any = None, train: str = "adapter",
    budget: Budget | str | float = 0.1, start_rows: int = 100, query_rows: int = 100, epochs: int = 3,
    learning_rate: float = 2e-4, lora_rank: int = 8, max_length: int | None = None, official: bool = False,
    device: str = "auto", dtype: str = "auto", implementation: str = "auto", batch_tokens: int | None = None,
    seed: int = 0, store: Any = None, executor: Any = None, progress: str = "auto",
) -> Selection:  # fmt: skip
    """Keep, round by round, the rows that a model trained on the kept ones sees farthest from them.

    Args:
        pool: see ifd.
        model, device, dtype: see load_model.
        encoder: vectors instead of a model that learns: a .npy file or array, or what load_encoder takes.
        train: "adapter", or "none": the model embeds the pool once, as it is.
        budget: a share of all pool rows, or a number of rows.
        start_rows, query_rows: rows drawn at random first, and rows added in a round (the paper's 100 and 100).
        epochs, learning_rate, lora_rank: of each training, see fastsel.models.lora.
        max_length: of a row in tokens; None takes 512.
        official: the authors' rule of choice, see above.
        implementation, batch_tokens, store, executor, progress: see embed_pool; only untrained vectors are stored.
        seed: of the rows drawn first, of the adapter, and of the random draw that the selection is compared with.

    Returns:
        Selection in order of choice; gains are distances to the nearest row kept before, infinite for those drawn;
        metric round is 0 for these and then counts up. scores are the gains.

    Raises:
        UsageError, InputError: an option has no such value; a budget in tokens; the pool or model cannot be used.
    """
    if train not in ("adapter", "none"):
        raise UsageError(f"train must be adapter or none, got {train!r}")
    if min(start_rows, query_rows) < 1:
        raise UsageError("start_rows and query_rows must be at least 1")
    pool, started = open_pool(pool), time.perf_counter()
    budget = read_budget(budget, pool, None)
    loaded = None if encoder is not None else load_model(model, device=device, dtype=dtype)
    learns, wanted = loaded is not None and train == "adapter", budget.rows(len(pool))
    usable = np.flatnonzero(pool.status <= STATUS.index("truncated"))
    drawn = torch.randperm(len(usable), generator=torch.Generator().manual_seed(seed))[
        : min(start_rows, wanted)
    ].numpy()
    labelled, gains, rounds = usable[np.sort(drawn)], np.full(len(drawn), np.inf), np.zeros(len(drawn))
    embeddings: Embeddings | None = None
    while embeddings is None or (len(labelled) < wanted and len(labelled) < len(embeddings.rows)):
        if learns or embeddings is None:
            # One round's model: the base model with an adapter trained from the start on all rows kept so far.
            training = adapted(
                loaded, _sequences(pool, loaded, labelled, max_length), rank=lora_rank, epochs=epochs,
                learning_rate=learning_rate, seed=seed,
            ) if loaded and learns and len(labelled) < wanted else nullcontext(loaded or encoder)  # fmt: skip
            with training as trained:
                embeddings = embed_pool(
                    pool, trained, text="template:alpaca", max_length=max_length, device=device, dtype=dtype,
                    batch_tokens=batch_tokens, implementation=implementation, store=None if learns else store,
                    executor=executor, progress=progress,
                )  # fmt: skip
            is_kept = np.isin(labelled, embeddings.rows)  # a row drawn may turn out to have no vector
            labelled, gains, rounds = labelled[is_kept], gains[is_kept], rounds[is_kept]
        places = np.searchsorted(embeddings.rows, labelled)
        number = min(query_rows, wanted - len(labelled))
        pick = unclamped_k_center if official else k_center
        rows, distances = pick(embeddings.matrix, number, initial=places)
        labelled, gains = np.append(labelled, embeddings.rows[rows]), np.append(gains, distances)
        rounds = np.append(rounds, np.full(len(rows), rounds.max(initial=0) + 1))
    gains_n, rounds_n = np.full((2, len(pool)), np.nan)
    gains_n[labelled], rounds_n[labelled] = gains, rounds
    return build_selection(
        pool=pool, method="diverse_evol", indices=labelled, scores=gains_n, gains=gains_n, metrics={"round": rounds_n},
        status=embeddings.status, reasons=embeddings.reasons, n_tokens=embeddings.n_tokens, budget=budget, seed=seed,
        eligible=embeddings.has_vector, official=official, notes=embeddings.notes, provenance=embeddings.provenance,
        config={"budget": str(budget), "train": train, "start_rows": start_rows, "query_rows": query_rows},
        timings={"train, embed and choose": time.perf_counter() - started},
    )  # fmt: skip


def _sequences(pool: Any, loaded: Any, rows: Any, max_length: int | None) -> list[tuple[list[int], int]]:
    """Token ids of prompt, answer and end of text, and how many stand before the answer."""
    template = load_template("alpaca")
    tokenise = AnswerTokenizer(
        loaded.tokenizer, template, passes=(CONDITIONED,), max_length=max_length or 512, turns="last"
    )
    end = [] if loaded.tokenizer.eos_token_id is None else [loaded.tokenizer.eos_token_id]
    return [(s.ids + end, s.first) for row in tokenise(pool.examples(rows.tolist())) for s in row.sequences]
