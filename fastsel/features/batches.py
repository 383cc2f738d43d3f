"""How a pool is cut up for a model: shards of rows, and in each shard batches of sequences, from token counts alone."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from fastsel.features.answer_tokens import RowTokens, ScoredSequence
from fastsel.io.examples import Example

if TYPE_CHECKING:
    from fastsel.io import Pool

SHARD_TOKENS = 65_536  # what an interruption can cost
MAX_SHARDS = 1000  # the index of a store is rewritten after each one
ROWS_AT_ONCE = 1024


class Shard(NamedTuple):
    """Pool rows start..stop and the tokens that separate forwards of them would process."""

    start: int
    stop: int
    tokens: int


class Sized(Protocol):
    """A row whose tokens have been counted."""

    @property
    def row_id(self) -> int:
        """Pool row number."""

    @property
    def size(self) -> int:
        """Tokens that a model processes for it."""


def plan_shards(pool: "Pool", tokenise: Callable[[Sequence[Example]], Sequence[Sized]]) -> list[Shard]:
    """Cut the pool into runs of rows with about equally many tokens."""
    sizes = np.zeros(len(pool), np.int64)
    for examples in pool.chunks(rows=ROWS_AT_ONCE):
        for row in tokenise(examples):
            sizes[row.row_id] = row.size
    tokens_before = np.concatenate([[0], np.cumsum(sizes)])
    shard_tokens = max(SHARD_TOKENS, -(-int(tokens_before[-1]) // MAX_SHARDS))
    shards, start = [], 0
    while start < len(pool):
        stop = int(np.searchsorted(tokens_before, tokens_before[start] + shard_tokens, side="right")) - 1
        stop = max(stop, start + 1)  # a row larger than a shard is one of its own
        shards.append(Shard(start, stop, int(tokens_before[stop] - tokens_before[start])))
        start = stop
    return shards


def without_twins(rows: Iterable[RowTokens]) -> tuple[list[RowTokens], list[tuple[int, RowTokens]]]:
    """Rows that differ, and (row_id, its first equal) of the others: equal rows must have equal bits to tie."""
    firsts: dict[tuple[Any, ...], RowTokens] = {}
    twins = []
    for row in rows:
        if row.sequences:
            key = tuple((sequence.of_pass, sequence.first, tuple(sequence.ids)) for sequence in row.sequences)
            first = firsts.setdefault(key, row)
            if first is not row:
                twins.append((row.row_id, first))
    return list(firsts.values()), twins


def cut_into_batches(rows: Iterable[RowTokens], batch_tokens: int) -> Iterator[list[tuple[int, ScoredSequence]]]:
    """Batches of (row_id, sequence) of at most batch_tokens tokens, short rows first.

    A row's passes and turns stay together, since its turns share their beginning; only a row that is larger than the
    budget is taken apart, and only a single sequence may exceed it.
    """
    batch: list[tuple[int, ScoredSequence]] = []
    filled = 0
    for row in sorted(rows, key=lambda row: (row.size, row.row_id)):
        whole = row.size <= batch_tokens
        for unit in [row.sequences] if whole else [[sequence] for sequence in row.sequences]:
            size = sum(len(sequence.ids) for sequence in unit)
            if batch and filled + size > batch_tokens:
                yield batch
                batch, filled = [], 0
            batch += [(row.row_id, sequence) for sequence in unit]
            filled += size
    if batch:
        yield batch
