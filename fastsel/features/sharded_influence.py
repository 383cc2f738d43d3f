"""Influences of a pool's rows on a target, shard by shard: three passes over the pool, whose gradients are never kept.

store/products     |g_il|^2 and <v_l, g_il> of every row and layer
store/sum          what the second pass adds up, when it is whole
store/influences   one number a row

A sum over the pool is one over shards, each from 0, added up in their order: the same bits wherever shards run.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

import fastsel
from fastsel.features.answer_scorer import torch_build
from fastsel.features.answer_tokens import NOT_FINITE
from fastsel.features.batches import ROWS_AT_ONCE, Shard
from fastsel.features.gradient_rows import BatchFeatures, GradientRule, GradientWorker, batches
from fastsel.features.gradients import described_run
from fastsel.features.row_gradients import BATCH_TOKENS, DENSE_BYTES
from fastsel.features.shard_runs import Executor, OnTokens, run_shards
from fastsel.features.training_rows import TrainingTokenizer
from fastsel.features.verdicts import verdicts
from fastsel.io.examples import TRUNCATED
from fastsel.io.row_reasons import RowReasons
from fastsel.io.templates import Template
from fastsel.models.lora_forward import LabelledSequence, LoraForward
from fastsel.progress import progress_bar
from fastsel.store import FeatureStore

if TYPE_CHECKING:
    from fastsel.io import Pool

PASSES = {name: f"influences, pass {i} of 3" for i, name in enumerate(("products", "sum", "influences"), 1)}


class Passes(Protocol):
    """The arithmetic; see selectors.data_influence.InfluencePasses."""

    @property
    def spans(self) -> list[tuple[str, int, int]]: ...

    @property
    def v(self) -> NDArray[np.float64]: ...

    def products(self, block: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]: ...

    def weights(
        self, squares: NDArray[np.float64], dots: NDArray[np.float64], damping: float
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]: ...

    def add(self, sums: NDArray[np.float64], block: NDArray[Any], weights: NDArray[np.float64]) -> None: ...

    def values(
        self, block: NDArray[Any], dots: NDArray[np.float64], sums: NDArray[np.float64], inverse: NDArray[np.float64]
    ) -> NDArray[np.float64]: ...


@dataclass
class Influences:
    """Arrays over all pool rows.

    Attributes:
        values: float64 [n], NaN where a row has no gradient.
        status, reasons, n_tokens, timings, provenance: see LoraGradients.
    """

    values: NDArray[np.float64]
    status: NDArray[np.uint8]
    reasons: RowReasons
    n_tokens: NDArray[np.int32]
    timings: dict[str, float]
    provenance: dict[str, Any]

    @property
    def has_vector(self) -> NDArray[np.bool_]:
        """Bool [n]: rows with a gradient."""
        usable: NDArray[np.bool_] = self.status <= TRUNCATED
        return usable


@dataclass
class _Shards:
    """Whole gradients of a shard's rows, block by block."""

    gradients: GradientWorker

    def blocks(self, shard: Shard, records: NDArray[Any] | None = None) -> Iterator[tuple[NDArray[np.int64], Any]]:
        """(places in the shard [b], gradients [b, p]); rows that are not finite are left out. Records get why and
        n_tokens.
        """
        worker = self.gradients
        forward = worker.model()
        most_rows = max(1, DENSE_BYTES // (8 * forward.n_parameters))
        rows = [r for e in worker.pool.chunks(shard.start, shard.stop, rows=ROWS_AT_ONCE) for r in worker.tokenise(e)]
        if records is not None:
            for row in rows:
                records["why"][row.row_id - shard.start] = row.why
                records["n_tokens"][row.row_id - shard.start] = row.n_tokens
        for whole in batches([row for row in rows if row.sequences], worker.batch_tokens):
            for start in range(0, len(whole), most_rows):
                batch = whole[start : start + most_rows]
                features = BatchFeatures(len(batch), forward, worker.rule, worker.implementation)
                losses = forward.run([[LabelledSequence(*s) for s in row.sequences] for row in batch], features)
                assert features.dense is not None
                is_finite = (torch.isfinite(losses) & torch.isfinite(features.sqnorms.cpu())).numpy()
                places = np.array([row.row_id - shard.start for row in batch], np.int64)
                if records is not None:
                    records["why"][places[~is_finite]] = NOT_FINITE
                if worker.on_tokens is not None:
                    worker.on_tokens(sum(row.size for row in batch))
                if is_finite.any():
                    yield places[is_finite], features.dense.cpu().numpy()[is_finite]


@dataclass
class _Products:
    """The first pass: shard -> why, n_tokens, squares, dots of its rows."""

    shards: _Shards
    passes: Passes

    def __call__(self, shard: Shard) -> NDArray[Any]:
        n_layers, m = len(self.passes.spans), len(self.passes.v)
        fields: list[Any] = [
            ("n_tokens", "<i4"), ("why", "|u1"), ("squares", "<f8", (n_layers,)), ("dots", "<f8", (n_layers, m))
        ]  # fmt: skip
        records = np.zeros(shard.stop - shard.start, np.dtype(fields))
        for places, block in self.shards.blocks(shard, records):
            records["squares"][places], records["dots"][places] = self.passes.products(block)
        return records


@dataclass
class _Sum:
    """The second pass: shard -> its part of r [m, p]."""

    shards: _Shards
    passes: Passes
    weights: NDArray[np.float64]

    def __call__(self, shard: Shard) -> NDArray[np.float64]:
        sums = np.zeros_like(self.passes.v)
        for places, block in self.shards.blocks(shard):
            self.passes.add(sums, block, self.weights[shard.start + places])
        return sums


@dataclass
class _Values:
    """The third pass: shard -> influences of its rows."""

    shards: _Shards
    passes: Passes
    dots: NDArray[np.float64]
    sums: NDArray[np.float64]
    inverse: NDArray[np.float64]

    def __call__(self, shard: Shard) -> NDArray[Any]:
        records = np.zeros(shard.stop - shard.start, np.dtype([("influence", "<f8")]))
        for places, block in self.shards.blocks(shard):
            found = self.passes.values(block, self.dots[shard.start + places], self.sums, self.inverse)
            records["influence"][places] = found[:, 0]
        return records


def sharded_influences(
    pool: "Pool", forward: LoraForward, passes: Passes, *, template: Template, damping: float, max_length: int,
    overflow: str, turns: str, batch_tokens: int | None, implementation: str, store: Any, executor: Executor | None,
    progress: str,
) -> Influences:  # fmt: skip
    """Influences of every usable row on one target vector.

    Args:
        pool: the rows.
        forward: of the model with its adapter.
        passes: with v [1, p].
        damping: see selectors.data_influence.influences.
        template, max_length, overflow, turns, batch_tokens, implementation, executor, progress: see lora_gradients.
        store: a folder for the passes, so that an interrupted run goes on; or None.

    Raises:
        InputError: the store holds something else.
    """
    started = time.perf_counter()
    loaded, rule = forward.loaded, GradientRule("sgd", dense=True)
    tokenise = TrainingTokenizer(loaded.tokenizer, template, max_length=max_length, overflow=overflow, turns=turns)
    per_batch = batch_tokens or BATCH_TOKENS
    gradients = GradientWorker(pool, loaded, tokenise, rule, per_batch, implementation, None, forward)
    described = described_run(
        forward, rule, template, max_length=max_length, overflow=overflow, turns=turns, batch_tokens=per_batch,
        implementation=implementation,
    )  # fmt: skip
    of_target = {"target": xxhash.xxh3_128_hexdigest(passes.v.tobytes()), "layers": [list(s) for s in passes.spans]}
    fingerprint = {"fastsel": fastsel.__version__, "torch": torch_build(), **described, **of_target}
    shards = _Shards(gradients)

    def in_shards(name: str, work: Any, more: dict[str, Any]) -> NDArray[Any]:
        parts: list[tuple[Shard, NDArray[Any]]] = []

        def worker(on_tokens: OnTokens) -> Any:
            gradients.on_tokens = on_tokens
            return work

        run_shards(
            pool, tokenise, worker, lambda shard, records: parts.append((shard, records)),
            fingerprint={"feature": name, **fingerprint, **more}, store=store and Path(store) / name,
            executor=executor, progress=progress, description=PASSES[name],
        )  # fmt: skip
        parts.sort(key=lambda part: part[0].start)
        seen.extend(shard for shard, _ in parts if name == "products")
        return np.concatenate([records for _, records in parts]) if parts else work(Shard(0, 0, 0))

    seen: list[Shard] = []
    first = in_shards("products", _Products(shards, passes), {})
    has, status, reasons = verdicts(pool, first["why"], max_length)
    values = np.full(len(pool), np.nan)
    if has.any():
        weights = np.zeros((len(pool), len(passes.spans), len(passes.v)))
        weights[has], inverse = passes.weights(first["squares"][has], first["dots"][has], damping)
        gradients.on_tokens = None
        total = _Sum(shards, passes, weights)
        sums = _summed(pool, total, seen, {**fingerprint, "damping": damping}, store, executor, progress)
        third = in_shards("influences", _Values(shards, passes, first["dots"], sums, inverse), {"damping": damping})
        values[has] = third["influence"][has]
    return Influences(
        values, status, reasons, first["n_tokens"].astype(np.int32),
        {"influences": time.perf_counter() - started}, {**described, "forward": forward.path},
    )  # fmt: skip


def _summed(
    pool: "Pool", work: _Sum, shards: Sequence[Shard], fingerprint: dict[str, Any], store: Any,
    executor: Executor | None, progress: str,
) -> NDArray[np.float64]:  # fmt: skip
    """R [m, p], from the store when the second pass was finished before."""
    whole = {"feature": "sum", **fingerprint, "pool": pool.fingerprint, "rows": len(pool)}
    with FeatureStore(Path(store) / "sum", whole) if store else nullcontext() as kept:
        if kept is not None and kept.has(0, len(pool), pool.fingerprint):
            return np.array(kept.read(0, len(pool)))
        sums = np.zeros_like(work.passes.v)
        with progress_bar(sum(s.tokens for s in shards), "tok", mode=progress, description=PASSES["sum"]) as bar:
            work.shards.gradients.on_tokens = bar.update if executor is None else None
            results = map(work, shards) if executor is None else executor.map_shards(work, shards)
            for shard, part in zip(shards, results, strict=True):
                sums += part
                if executor is not None:
                    bar.update(shard.tokens)
        if kept is not None:
            kept.write(0, len(pool), pool.fingerprint, sums)
        return sums
