"""The record of a run, one line per pool row: the columns of selection.parquet, made piece by piece."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from fastsel.selection import RULE, STATUS, Selection

_ROWS_A_BATCH = 65_536
_HEX = np.frombuffer(b"0123456789abcdef", np.uint8)
_COLUMNS = (
    ("row_id", pa.int64()),
    ("id", pa.string()),
    ("content_hash", pa.string()),
    ("source", pa.string()),
    ("selected", pa.bool_()),
    ("rank", pa.int32()),
    ("score", pa.float64()),
    ("gain", pa.float64()),
    ("cluster", pa.int32()),
    ("n_tokens", pa.int32()),
    ("status", pa.string()),
    ("reason", pa.string()),
)


def table_schema(selection: Selection) -> pa.Schema:
    """The fixed columns, then one float64 column per metric."""
    return pa.schema([*_COLUMNS, *((name, pa.float64()) for name in selection.metrics)])


def record_batches(selection: Selection) -> Iterator[pa.RecordBatch]:
    """The table in pieces of 65,536 rows, so that writing it needs the memory of one piece.

    rank counts from 0: indices[rank] == row_id. What is unknown is null: a failed row's score, an unread row's hash.
    """
    schema = table_schema(selection)
    n = len(selection.scores)
    rank = np.full(n, -1, np.int32)
    rank[selection.indices] = np.arange(len(selection), dtype=np.int32)
    ids, sources = selection.pool.ids(), selection.pool.sources()
    hashes = np.ascontiguousarray(selection.pool.content_hash).view(np.uint8).reshape(n, 16)
    noted = np.sort(np.fromiter(selection.reasons, np.int64, len(selection.reasons)))
    for start in range(0, n, _ROWS_A_BATCH):
        piece = slice(start, min(start + _ROWS_A_BATCH, n))
        size = piece.stop - start
        columns = [
            pa.array(np.arange(start, piece.stop)),
            _strings(ids, start, size),
            _hex_strings(hashes[piece]),
            _strings(sources, start, size),
            pa.array(rank[piece] >= 0),
            _counts(rank[piece]),
            _floats(selection.scores[piece]),
            pa.nulls(size, pa.float64()) if selection.gains is None else _floats(selection.gains[piece]),
            pa.nulls(size, pa.int32()) if selection.clusters is None else _counts(selection.clusters[piece]),
            pa.nulls(size, pa.int32()) if selection.n_tokens is None else _counts(selection.n_tokens[piece]),
            pa.DictionaryArray.from_arrays(selection.status[piece].astype(np.int8), list(STATUS)).cast(pa.string()),
            _reasons(selection, piece, noted),
            *(_floats(values[piece]) for values in selection.metrics.values()),
        ]
        yield pa.RecordBatch.from_arrays(columns, schema=schema)


def _reasons(selection: Selection, piece: slice, noted: NDArray[np.int64]) -> pa.Array:
    reasons: list[str | None] = [None] * (piece.stop - piece.start)
    for place in np.flatnonzero(selection.refused[piece]):
        reasons[place] = f"{RULE}{selection.rule}"
    for row in noted[np.searchsorted(noted, piece.start) : np.searchsorted(noted, piece.stop)]:
        rule, reason = reasons[row - piece.start], selection.reasons[int(row)]
        # Reasons may quote a row's text, and Arrow strings cannot hold lone surrogates.
        reason = reason.encode("utf-8", "backslashreplace").decode()
        reasons[row - piece.start] = f"{rule}; {reason}" if rule else reason
    return pa.array(reasons, pa.string())


def _strings(values: Any, start: int, size: int) -> pa.Array:
    if values is None:
        return pa.nulls(size, pa.string())
    piece = values.slice(start, size)
    if isinstance(piece, pa.ChunkedArray):
        return pa.concat_arrays([chunk.cast(pa.string()) for chunk in piece.chunks])
    return piece.cast(pa.string())


def _hex_strings(hashes: NDArray[np.uint8]) -> pa.Array:
    """[m, 16] bytes to 32 letters a row, without a Python object per row; null where nothing was hashed (all zero)."""
    m = len(hashes)
    letters = np.empty((m, 32), np.uint8)
    letters[:, 0::2] = _HEX[hashes >> 4]
    letters[:, 1::2] = _HEX[hashes & 15]
    offsets = pa.py_buffer(np.arange(0, 32 * (m + 1), 32, dtype=np.int32))
    text = pa.StringArray.from_buffers(m, offsets, pa.py_buffer(letters))
    return pc.if_else(pa.array(hashes.any(axis=1)), text, pa.scalar(None, pa.string()))


def _floats(values: NDArray[np.float64]) -> pa.Array:
    return pa.array(values, pa.float64(), mask=np.isnan(values))


def _counts(values: NDArray[np.int32]) -> pa.Array:
    return pa.array(values.astype(np.int32), pa.int32(), mask=values < 0)
