"""Answer losses of a pool: for each row the sum of -log p over its answer tokens, in one or two passes.

Batches are cut inside shards of the pool, from token counts alone, before the first forward; so the numbers do not
depend on where a run was interrupted. Only the hidden states that predict answer tokens reach the vocabulary.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

import fastsel
from fastsel.errors import UsageError
from fastsel.features.answer_scorer import AnswerScorer, record_dtype, torch_build
from fastsel.features.answer_tokens import (
    CONDITIONED,
    DIRECT,
    OVERFLOW,
    TURNS,
    AnswerTokenizer,
)
from fastsel.features.batches import Shard
from fastsel.features.shard_runs import Executor, OnTokens, run_shards
from fastsel.features.verdicts import verdicts
from fastsel.io.examples import SKIPPED, TRUNCATED
from fastsel.io.row_reasons import RowReasons
from fastsel.io.templates import Template
from fastsel.models.loading import LoadedModel

if TYPE_CHECKING:
    from fastsel.io import Pool

BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}


@dataclass
class AnswerLosses:
    """Arrays over all pool rows.

    Attributes:
        nll: for each pass float64 [n], the sum of -log p over scored answer tokens (natural logarithm), NaN if none.
        n_scored: for each pass int32 [n], how many tokens that sum has.
        n_tokens: int32 [n], prompt and answer under the template, not cut; 0 for unusable rows.
        status: uint8 [n], the pool's codes with truncated and skipped rows added.
        reasons: why a row is not ok, with its line.
        tokens: what separate forwards would process, over all rows and passes.
        timings: seconds by step.
        provenance: model, template, device, options and what ran each kernel, for the manifest.
        notes: lines for the user.
    """

    nll: dict[str, NDArray[np.float64]]
    n_scored: dict[str, NDArray[np.int32]]
    n_tokens: NDArray[np.int32]
    status: NDArray[np.uint8]
    reasons: RowReasons
    tokens: int
    timings: dict[str, float]
    provenance: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def has_score(self) -> NDArray[np.bool_]:
        """Bool [n]: rows with a loss."""
        usable: NDArray[np.bool_] = self.status <= TRUNCATED
        return usable

    def drop(self, rows: NDArray[np.bool_], reason: str) -> None:
        """Leave the rows of this mask [n] without a score."""
        self.status[rows] = SKIPPED
        self.reasons.add(rows, reason)

    def mean(self, of_pass: str) -> NDArray[np.float64]:
        """Float64 [n]: the mean -log p of an answer token, NaN where the row has none."""
        with np.errstate(invalid="ignore"):
            mean: NDArray[np.float64] = self.nll[of_pass] / self.n_scored[of_pass]
        return mean


def answer_losses(
    pool: "Pool",
    loaded: LoadedModel,
    *,
    template: Template,
    passes: Sequence[str] = (CONDITIONED, DIRECT),
    max_length: int,
    overflow: str = "truncate",
    turns: str = "all",
    rule: str = "shared",
    batch_tokens: int | None = None,
    implementation: str = "auto",
    store: Any = None,
    executor: Executor | None = None,
    progress: str = "auto",
) -> AnswerLosses:
    """Score the answers of every usable row.

    Args:
        pool: the rows.
        loaded: the model.
        template: what text stands before an answer.
        passes: "conditioned" (the answer after its prompt), "direct" (after the template's header only), or both.
        max_length: the window in tokens; see window_of.
        overflow: "truncate" cuts the same answer tokens off every pass, "skip" leaves the row without a score,
            "error" stops before the first forward.
        turns: score "all" assistant turns (sums over all of them), or the "last".
        rule: "shared" (every pass scores the same token ids), or "cherry" or "superfiltering" as released.
        batch_tokens: tokens a forward processes at once; None takes 2,048 on a CPU and 16,384 on a GPU.
        implementation: of both kernels, "auto" or a name.
        store: a folder that keeps finished shards, so that the same call goes on after an interruption; or None.
        executor: where shards run (see fastsel.executors); None runs them here, one after another.
        progress: see progress_bar; counts tokens.

    Raises:
        UsageError: an unknown option value.
        InputError: the store holds something else; a row is too long and overflow is "error".
    """
    for name, value, known in (("overflow", overflow, OVERFLOW), ("turns", turns, TURNS)):
        if value not in known:
            raise UsageError(f"{name}={value!r} is not known; it is one of: {', '.join(known)}")
    if rule != "shared" and overflow != "truncate":
        raise UsageError(f"overflow={overflow!r}: released code cuts long rows in its own way; leave official=True out")
    if batch_tokens is not None and batch_tokens < 1:
        raise UsageError(f"batch_tokens={batch_tokens} must be at least 1")
    started = time.perf_counter()
    tokenise = AnswerTokenizer(
        loaded.tokenizer,
        template,
        passes=passes,
        max_length=max_length,
        overflow=overflow,
        turns=turns,
        rule=rule,
    )
    per_batch = batch_tokens or BATCH_TOKENS["cpu" if loaded.device.type == "cpu" else "cuda"]
    scorer = AnswerScorer(pool, loaded, tokenise, tuple(passes), per_batch, implementation)
    model = scorer.forward()
    prepared_s = time.perf_counter() - started
    options = {
        "model": {"name": loaded.name, "revision": loaded.revision, "fingerprint": loaded.fingerprint},
        "device": loaded.device.type,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "implementation": implementation,
        "implementations": model.implementations,
        "template": {"id": template.id, "sha256": template.sha256},
        "passes": list(passes),
        "max_length": max_length,
        "overflow": overflow,
        "turns": turns,
        "rule": rule,
        "batch_tokens": per_batch,
    }
    feature = {"feature": "answer losses", "fastsel": fastsel.__version__, "torch": torch_build()}
    records = np.zeros(len(pool), record_dtype(passes))

    def worker(on_tokens: OnTokens) -> AnswerScorer:
        scorer.on_tokens = on_tokens
        return scorer

    def take(shard: Shard, of_shard: NDArray[Any]) -> None:
        records[shard.start : shard.stop] = of_shard

    run = run_shards(
        pool, tokenise, worker, take, fingerprint={**feature, **options}, store=store, executor=executor,
        progress=progress, description="scoring answers",
    )  # fmt: skip
    losses = _collect(pool, records, passes, max_length)
    losses.tokens = run.tokens
    losses.timings = {"prepare": prepared_s, "plan": run.plan_s, "forward": run.work_s}
    losses.provenance = {**options, "device": str(loaded.device), "forward": model.path}
    losses.notes = [note for note in (loaded.note, model.reason) if note]
    return losses


def window_of(loaded: LoadedModel, asked: int | None, papers: int) -> int:
    """max_length in tokens: what was asked for, or the paper's, but no more than the model has positions.

    Raises:
        UsageError: more than the model has positions, or less than 2.
    """
    most = loaded.max_positions
    if asked is None:
        return papers if most is None else min(papers, most)
    if asked < 2 or (most is not None and asked > most):
        raise UsageError(f"max_length={asked} must be from 2 to {most or 'any number'}, which {loaded.name} can take")
    return asked


def _collect(pool: "Pool", records: NDArray[Any], passes: Sequence[str], max_length: int) -> AnswerLosses:
    scored, status, reasons = verdicts(pool, records["why"], max_length)
    return AnswerLosses(
        nll={p: np.where(scored, records[f"nll_{p}"], np.nan) for p in passes},
        n_scored={p: records[f"n_{p}"].astype(np.int32) for p in passes},
        n_tokens=records["n_tokens"].astype(np.int32),
        status=status,
        reasons=reasons,
        tokens=0,
        timings={},
    )
