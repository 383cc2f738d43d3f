"""A feature of a pool, shard by shard: planned before the first forward, kept, resumed, run here or elsewhere."""

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from fastsel.features.batches import Shard, Sized, plan_shards
from fastsel.io.examples import Example
from fastsel.progress import progress_bar
from fastsel.store import FeatureStore

if TYPE_CHECKING:
    from fastsel.io import Pool

# What makes the records of a shard; given what it tells of each batch's tokens, or None where it runs elsewhere.
Worker = Callable[[Shard], NDArray[Any]]
OnTokens = Callable[[int], None] | None


class Executor(Protocol):
    """Where shards run."""

    def map_shards(self, function: Worker, shards: Sequence[Shard]) -> Iterable[Any]:
        """The function's results, in the order of the shards."""


class ShardRun(NamedTuple):
    """How a run went: the tokens of its shards, and the seconds of cutting the pool up and of the rest."""

    tokens: int
    plan_s: float
    work_s: float


def run_shards(
    pool: "Pool",
    tokenise: Callable[[Sequence[Example]], Sequence[Sized]],
    worker: Callable[[OnTokens], Worker],
    take: Callable[[Shard, NDArray[Any]], None],
    *,
    fingerprint: dict[str, Any],
    store: Any,
    executor: Executor | None,
    progress: str,
    description: str,
) -> ShardRun:
    """Hand the records of every shard to `take`, once each, in no fixed order.

    Args:
        pool: the rows.
        tokenise: examples -> their rows' sizes in tokens, from which shards are cut.
        worker: makes the function of a shard; what it is given is to be told of tokens as they are done.
        take: given a shard and its records [stop - start], mapped from the store where there is one.
        fingerprint: what the records depend on, beside the pool; a store of anything else is refused.
        store: a folder that keeps finished shards, so that the same call goes on after an interruption; or None.
        executor: where shards run (see fastsel.executors); None runs them here, one after another.
        progress, description: see progress_bar; it counts tokens.

    Raises:
        InputError: the store holds something else.
    """
    started = time.perf_counter()
    whole = {**fingerprint, "pool": pool.fingerprint, "rows": len(pool)}
    with FeatureStore(store, whole) if store is not None else nullcontext() as kept:
        if kept is not None and kept.plan is not None:
            shards = [Shard(*shard) for shard in kept.plan]
        else:
            shards = plan_shards(pool, tokenise)
            if kept is not None:
                kept.set_plan(shards)
        planned = time.perf_counter()
        tokens = sum(shard.tokens for shard in shards)
        with progress_bar(tokens, "tok", mode=progress, description=description) as bar:
            todo = []
            for shard in shards:
                if kept is not None and kept.has(shard.start, shard.stop, _content(pool, shard)):
                    take(shard, kept.read(shard.start, shard.stop))
                    bar.skip(shard.tokens)
                else:
                    todo.append(shard)
            work = worker(bar.update if executor is None else None)
            results = map(work, todo) if executor is None else executor.map_shards(work, todo)
            for shard, records in zip(todo, results, strict=True):
                if kept is not None:
                    kept.write(shard.start, shard.stop, _content(pool, shard), records)
                    records = kept.read(shard.start, shard.stop)
                take(shard, records)
                if executor is not None:
                    bar.update(shard.tokens)
    return ShardRun(tokens, planned - started, time.perf_counter() - planned)


def _content(pool: "Pool", shard: Shard) -> str:
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(pool.content_hash[shard.start : shard.stop]).tobytes())
