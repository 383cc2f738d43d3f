"""Answer losses of a pool: for each row the sum of -log p over its answer tokens, in one or two passes.

Batches are cut inside shards of the pool, from token counts alone, before the first forward; so the numbers do not
depend on where a run was interrupted. Only the hidden states that predict answer tokens reach the vocabulary.
"""

import time
from collections import ChainMap
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

import fastsel
from fastsel.errors import UsageError
from fastsel.features.answer_tokens import (
    CONDITIONED,
    DIRECT,
    FITS,
    NOT_FINITE,
    OVERFLOW,
    REASONS,
    TURNS,
    WITH_SCORE,
    AnswerTokenizer,
    RowTokens,
    ScoredSequence,
)
from fastsel.features.batches import ROWS_AT_ONCE, Shard, cut_into_batches, plan_shards, without_twins
from fastsel.io.examples import OK, SKIPPED, TRUNCATED
from fastsel.io.templates import Template
from fastsel.kernels.linear_token_stats import linear_token_stats
from fastsel.models.loading import LoadedModel
from fastsel.models.packed import PackedForward, pack
from fastsel.progress import progress_bar
from fastsel.store import FeatureStore

if TYPE_CHECKING:
    from fastsel.io import Pool

BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}


class Executor(Protocol):
    """Where shards run."""

    def map_shards(self, function: Callable[[Shard], NDArray[Any]], shards: Sequence[Shard]) -> Iterable[Any]:
        """The function's results, in the order of the shards."""


@dataclass
class AnswerLosses:
    """Arrays over all pool rows.

    Attributes:
        nll: for each pass float64 [n], the sum of -log p over scored answer tokens (natural logarithm), NaN if none.
        n_scored: for each pass int32 [n], how many tokens that sum has.
        n_tokens: int32 [n], prompt and answer under the template, not cut; 0 for unusable rows.
        status: uint8 [n], the pool's codes with truncated and skipped rows added.
        reasons: why a row is not ok.
        tokens: what separate forwards would process, over all rows and passes.
        timings: seconds by step.
        provenance: model, template, device and implementations, for the manifest.
        notes: lines for the user.
    """

    nll: dict[str, NDArray[np.float64]]
    n_scored: dict[str, NDArray[np.int32]]
    n_tokens: NDArray[np.int32]
    status: NDArray[np.uint8]
    reasons: MutableMapping[int, str]
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
        self.reasons.update(dict.fromkeys(np.flatnonzero(rows).tolist(), reason))

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
        executor: where shards run; None runs them here, one after another.
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
    options = {
        "model": {"name": loaded.name, "revision": loaded.revision, "fingerprint": loaded.fingerprint},
        "device": loaded.device.type,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "implementation": implementation,
        "template": {"id": template.id, "sha256": template.sha256},
        "passes": list(passes),
        "max_length": max_length,
        "overflow": overflow,
        "turns": turns,
        "rule": rule,
        "batch_tokens": per_batch,
    }
    kept = None
    if store is not None:
        feature = {"feature": "answer losses", "fastsel": fastsel.__version__}
        kept = FeatureStore(store, {**feature, **options, "pool": pool.fingerprint, "rows": len(pool)})
    if kept is not None and kept.plan is not None:
        shards = [Shard(*shard) for shard in kept.plan]
    else:
        shards = plan_shards(pool, tokenise)
        if kept is not None:
            kept.set_plan(shards)
    planned = time.perf_counter()
    model = PackedForward(loaded, implementation)
    records = np.zeros(len(pool), _dtype(passes))
    total = sum(shard.tokens for shard in shards)
    with progress_bar(total, "tok", mode=progress, description="scoring answers") as bar:
        on_tokens = bar.update if executor is None else None
        score = partial(_score_shard, pool, tokenise, model, per_batch, implementation, tuple(passes), on_tokens)
        todo = []
        for shard in shards:
            if kept is not None and kept.has(shard.start, shard.stop, _content(pool, shard)):
                records[shard.start : shard.stop] = kept.read(shard.start, shard.stop)
                bar.skip(shard.tokens)
            else:
                todo.append(shard)
        results = map(score, todo) if executor is None else executor.map_shards(score, todo)
        for shard, result in zip(todo, results, strict=True):
            records[shard.start : shard.stop] = result
            if kept is not None:
                kept.write(shard.start, shard.stop, _content(pool, shard), result)
            if executor is not None:
                bar.update(shard.tokens)
    losses = _collect(pool, records, passes, max_length)
    losses.tokens = total
    losses.timings = {"plan": planned - started, "forward": time.perf_counter() - planned}
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


def _content(pool: "Pool", shard: Shard) -> str:
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(pool.content_hash[shard.start : shard.stop]).tobytes())


def _dtype(passes: Sequence[str]) -> np.dtype[Any]:
    fields: list[tuple[str, str]] = [("n_tokens", "<i4"), ("why", "|u1")]
    for of_pass in passes:
        fields += [(f"nll_{of_pass}", "<f8"), (f"n_{of_pass}", "<i4")]
    return np.dtype(fields)


def _score_shard(
    pool: "Pool",
    tokenise: AnswerTokenizer,
    model: PackedForward,
    batch_tokens: int,
    implementation: str,
    passes: tuple[str, ...],
    on_tokens: Callable[[int], None] | None,
    shard: Shard,
) -> NDArray[Any]:
    """The records of one shard."""
    records = np.zeros(shard.stop - shard.start, _dtype(passes))
    rows: list[RowTokens] = []
    for examples in pool.chunks(shard.start, shard.stop, rows=ROWS_AT_ONCE):
        rows += tokenise(examples)
    for row in rows:
        records["n_tokens"][row.row_id - shard.start] = row.n_tokens
        records["why"][row.row_id - shard.start] = row.why
    rows, twins = without_twins(rows)
    for batch in cut_into_batches(rows, batch_tokens):
        sums = _sums([sequence for _, sequence in batch], model, implementation)
        for (row_id, sequence), nll in zip(batch, sums, strict=True):
            records[f"nll_{sequence.of_pass}"][row_id - shard.start] += nll
            records[f"n_{sequence.of_pass}"][row_id - shard.start] += len(sequence.ids) - sequence.first
        if on_tokens is not None:
            on_tokens(sum(len(sequence.ids) for _, sequence in batch))
    names = [f"{kind}_{of_pass}" for kind in ("nll", "n") for of_pass in passes]
    for row_id, first in twins:
        for name in names:
            records[name][row_id - shard.start] = records[name][first.row_id - shard.start]
        if on_tokens is not None:
            on_tokens(first.size)
    not_finite = ~np.all([np.isfinite(records[f"nll_{of_pass}"]) for of_pass in passes], axis=0)
    records["why"][not_finite] = NOT_FINITE
    return records


def _sums(sequences: Sequence[ScoredSequence], model: PackedForward, implementation: str) -> NDArray[np.float64]:
    """Float64 [s]: sum of -log p over each sequence's scored tokens."""
    batch = pack([sequence.ids for sequence in sequences])
    rows = torch.cat([batch.rows(i, s.first - 1, len(s.ids) - 1) for i, s in enumerate(sequences)])
    hidden = model.hidden_states(batch, rows)
    targets = torch.tensor([token for s in sequences for token in s.ids[s.first :]], device=hidden.device)
    head = model.head
    stats = linear_token_stats(
        hidden, head.weight, targets, head.bias, head.softcap, head.scale, implementation=implementation
    )
    assert stats.nll is not None
    nll = stats.nll.to("cpu", torch.float64).numpy()
    starts = np.cumsum([0] + [len(s.ids) - s.first for s in sequences[:-1]])
    sums: NDArray[np.float64] = np.add.reduceat(nll, starts)
    return sums


def _collect(pool: "Pool", records: NDArray[Any], passes: Sequence[str], max_length: int) -> AnswerLosses:
    usable = pool.status == OK
    scored = usable & np.isin(records["why"], WITH_SCORE)
    status = np.array(pool.status, dtype=np.uint8)
    status[usable & (records["why"] != FITS)] = SKIPPED
    status[scored & (records["why"] != FITS)] = TRUNCATED
    texts = [text and text.format(max_length=max_length) for text in REASONS]
    reasons: MutableMapping[int, str] = ChainMap({}, pool.reasons)  # type: ignore[arg-type]  # only the first is written
    for row_id in np.flatnonzero(usable & (records["why"] != FITS)).tolist():
        reasons[row_id] = str(texts[records["why"][row_id]])
    return AnswerLosses(
        nll={p: np.where(scored, records[f"nll_{p}"], np.nan) for p in passes},
        n_scored={p: records[f"n_{p}"].astype(np.int32) for p in passes},
        n_tokens=records["n_tokens"].astype(np.int32),
        status=status,
        reasons=reasons,
        tokens=0,
        timings={},
    )
