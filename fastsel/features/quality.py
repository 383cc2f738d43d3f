"""One number a row that says how good it is, higher being better: from a column, a language model or a reward model."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastsel.errors import InputError, UsageError
from fastsel.features.answer_tokens import CONDITIONED
from fastsel.features.embeddings import embed_pool
from fastsel.features.row_texts import JudgedText
from fastsel.features.shard_runs import Executor
from fastsel.features.token_stats import answer_losses, window_of
from fastsel.io.examples import OK
from fastsel.io.templates import load_template
from fastsel.models.loading import load_model

if TYPE_CHECKING:
    from fastsel.io import Pool

QUALITY = ("score", "perplexity", "reward")


@dataclass
class Quality:
    """A number for each row.

    Attributes:
        values: float64 [n], NaN where a row has none.
        missing: why a row has none.
        provenance: what it came from.
        notes: lines for the user.
    """

    values: NDArray[np.float64]
    missing: str
    provenance: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def row_quality(
    pool: "Pool",
    source: str,
    *,
    model: Any = None,
    device: str = "auto",
    dtype: str = "auto",
    implementation: str = "auto",
    batch_tokens: int | None = None,
    store: Any = None,
    executor: Executor | None = None,
    progress: str = "auto",
) -> Quality:
    """Quality of every usable row.

    Args:
        pool: the rows.
        source: "score" (the column that the pool was opened with), "perplexity" (minus the answer's mean loss in nats a
            token given the prompt, alpaca's template, 512 tokens: a fluent answer is good), or "reward".
        model: for "perplexity" see load_model, None is the bundled one; for "reward" a folder or hub id of a
            sequence-classification model with one label.
        device, dtype, implementation, batch_tokens, store, executor, progress: see answer_losses.

    Raises:
        UsageError: no such source; a reward without a model; a model for a ready score.
        InputError: the pool has no scores, the model cannot be used.
    """
    if source not in QUALITY:
        raise UsageError(f"quality={source!r} is not known; it is one of: {', '.join(QUALITY)}")
    options: dict[str, Any] = {
        "batch_tokens": batch_tokens,
        "store": None if store is None else Path(store) / "quality",
        "executor": executor,
        "progress": progress,
    }
    if source == "score":
        if model is not None:
            raise UsageError("quality='score' reads the score column and runs no model; leave model out")
        if pool.scores is None:
            raise InputError(
                f"{pool.name} carries no scores: name their column with --score-column (open_pool(..., "
                "score_column=...)), or take quality='perplexity' or 'reward'"
            )
        values = np.where(pool.status == OK, pool.scores, np.nan)
        return Quality(
            values,
            "no finite number in the score column",
            {"source": "score column", "column": pool.options.get("score_column")},
        )
    if source == "perplexity":
        loaded = load_model("bundled" if model is None else model, device=device, dtype=dtype)
        template = load_template("alpaca")
        losses = answer_losses(
            pool, loaded, template=template, passes=(CONDITIONED,), max_length=window_of(loaded, None, papers=512),
            implementation=implementation, **options,
        )  # fmt: skip
        missing = "its answer has no loss under the model"
        return Quality(-losses.mean(CONDITIONED), missing, losses.provenance, losses.notes)
    if model is None:
        raise UsageError("quality='reward' needs a reward model: name its folder or hub id with model (--model)")
    from fastsel.models.reward import RewardModel

    reward = RewardModel(model, device=device, dtype=dtype)
    judged = embed_pool(pool, reward, text=JudgedText(reward.tokenizer), **options)
    values = np.full(len(pool), np.nan)
    values[judged.rows] = judged.matrix[:, 0]
    return Quality(values, "the reward model can make nothing of it", judged.provenance, judged.notes)
