"""A pool: every row of the user's data, once hashed and judged, then read again as often as needed."""

import json
import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from importlib import resources
from numbers import Real
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from fastsel.errors import InputError, MissingExtraError, RunFailedError, UsageError
from fastsel.io.dataset_info import names_entry, read_entry
from fastsel.io.examples import ERROR, OK, SKIPPED, STATUS, Example, content_hash
from fastsel.io.files import InputFile
from fastsel.io.formats import RowReader
from fastsel.io.layout_hints import first_keys, unknown_layout
from fastsel.io.layout_options import Words, read_layout_options
from fastsel.io.readers import Source, open_source
from fastsel.io.row_index import RowIndex
from fastsel.io.row_values import AmbiguousRow, UnusableRow, lookup
from fastsel.io.tables import Tables
from fastsel.io.text_files import Unreadable
from fastsel.progress import progress_bar

RowIds = Sequence[int] | npt.NDArray[np.int64]

_ROWS_A_BLOCK = 4096
_CHUNK_BYTES = 1 << 25
_ROWS_BEFORE_GIVING_UP = 10_000  # on a pool in which no row has had a known layout
_HASH_BYTES = 16


def bundled_pool_path() -> Path:
    """The 256 real rows that come with fastsel."""
    return Path(str(resources.files("fastsel") / "data" / "pool_small.jsonl"))


class Pool:
    """The rows of a pool and what is known of them; no text is held. Made by open_pool().

    Attributes:
        name: short name for messages and reports.
        format: the layout: the one that was forced, or the most frequent one found.
        layouts: layout -> number of usable rows read as it.
        inputs: the files read, with rows and SHA-256.
        fingerprint: 32 hexadecimal digits that change with any byte of any row and with the layout options.
        status: uint8 [n], read-only, positions in STATUS.
        reasons: row number -> why it is not ok, for the rows that are not.
        content_hash: uint8 [n, 16], read-only, see examples.content_hash; zeros for rows that are not ok.
        scores: float64 [n], read-only, NaN where there is none; None without a score column.
        options: keyword arguments with which open_pool() reads a file of some of these rows in the same way.
    """

    def __init__(
        self,
        source: Source,
        name: str,
        reader: RowReader,
        *,
        layouts: Mapping[str, int],
        format: str,
        fingerprint: str,
        status: npt.NDArray[np.uint8],
        reasons: Mapping[int, str],
        content_hash: npt.NDArray[np.uint8],
        ids: pa.ChunkedArray | None,
        sources: pa.ChunkedArray | None,
        scores: npt.NDArray[np.float64] | None,
        options: Mapping[str, Any],
    ) -> None:
        """Use open_pool()."""
        self.name = name
        self.format = format
        self.layouts = dict(layouts)
        self.inputs: list[InputFile] = source.inputs
        self.fingerprint = fingerprint
        self.status = status
        self.reasons = reasons
        self.content_hash = content_hash
        self.scores = scores
        self.options = dict(options)
        self._source = source
        self._reader = reader
        self._ids = ids
        self._sources = sources

    def __len__(self) -> int:
        return len(self.status)

    def __repr__(self) -> str:
        return f"Pool({self.name!r}, {len(self):,} rows, {self.format})"

    def ids(self) -> pa.ChunkedArray | None:
        """The rows' own ids, string [n] with nulls; None when no row has one."""
        return self._ids

    def sources(self) -> pa.ChunkedArray | None:
        """The data sets the rows come from, dictionary<string> [n] with nulls; None when no row says."""
        return self._sources

    def place(self, row: int) -> str:
        """Where a row stands in the user's data, as reasons name it: "line 3", with the file where there are several;
        "row_id 3" where there are no lines.
        """
        return self._source.place(row)

    def chunks(self, start: int = 0, stop: int | None = None, rows: int = _ROWS_A_BLOCK) -> Iterator[list[Example]]:
        """The examples start..stop in order, in lists of `rows`; shorter ones where rows are longer than 8 kB each."""
        stop = len(self) if stop is None else min(stop, len(self))
        chunk: list[Example] = []
        size = 0
        for row_id, (value, value_bytes) in enumerate(self._source.read(start, stop), start):
            chunk.append(self._example(value, row_id))
            size += value_bytes
            if len(chunk) == rows or size > _CHUNK_BYTES:
                yield chunk
                chunk, size = [], 0
        if chunk:
            yield chunk

    def examples(self, row_ids: RowIds) -> list[Example]:
        """The examples with these row numbers, in the order asked."""
        wanted = self._checked(row_ids)
        return [self._example(value, row) for value, row in zip(self._source.rows(wanted), wanted, strict=True)]

    def rows(self, row_ids: RowIds) -> list[Any]:
        """The user's own rows as Python values, in the order asked."""
        return self._source.rows(self._checked(row_ids))

    def write_rows(self, row_ids: RowIds, path: str | Path) -> Path:
        """Write the user's own rows, in the order asked.

        Args:
            row_ids: row numbers.
            path: where to; its suffix is set to the pool's kind: .jsonl for text and lists, .parquet for tables.

        Returns:
            The path written. JSONL rows are the lines' own bytes without line ends; others have equal values.
        """
        path = Path(path)
        if path.suffix in (".jsonl", ".json", ".parquet"):
            path = path.with_suffix("")
        path = path.with_name(path.name + self._source.suffix)
        self._source.write(self._checked(row_ids), path)
        return path

    def dataset(self, row_ids: RowIds) -> Any:
        """The user's own rows as a datasets.Dataset.

        Raises:
            MissingExtraError: the package datasets is not installed.
        """
        try:
            import datasets
        except ImportError as error:
            raise MissingExtraError("making a datasets.Dataset", "datasets", "hf") from error
        if isinstance(self._source, Tables):
            return datasets.Dataset(self._source.take(self._checked(row_ids)))
        rows = self.rows(row_ids)
        keys = dict.fromkeys(key for row in rows for key in row)  # Dataset.from_list takes the first row's keys only
        return datasets.Dataset.from_dict({key: [row.get(key) for row in rows] for key in keys})

    def _checked(self, row_ids: RowIds) -> Sequence[int]:
        wanted = np.asarray(row_ids)
        if wanted.ndim != 1 or (wanted.size and wanted.dtype.kind not in "iu"):
            raise TypeError(f"row numbers must be one list of integers, got {wanted.dtype} of shape {wanted.shape}")
        if wanted.size and (wanted.min() < 0 or wanted.max() >= len(self)):
            raise IndexError(f"row numbers must lie in 0..{len(self) - 1}, got {wanted.min()}..{wanted.max()}")
        return array("q", wanted.astype(np.int64).tobytes())  # 8 bytes a row where a list takes 40

    def _example(self, value: object, row_id: int) -> Example:
        code = int(self.status[row_id])
        if code != OK:
            own_id, source = self._reader.id_and_source(value)
            return Example(row_id, STATUS[code], self.reasons[row_id], own_id, source)
        return self._reader.read(value, row_id)


def open_pool(
    source: Any,
    *,
    format: str = "auto",
    columns: Words = None,
    tags: Words = None,
    limit: int | None = None,
    score_column: str | None = None,
    on_error: Literal["skip", "fail"] = "skip",
    max_error_rate: float = 0.01,
    progress: str = "none",
) -> Pool:
    """Read a pool once: judge every row, hash it, and keep where it lies.

    Args:
        source: a path, a glob, a list of paths, `dataset_info.json#NAME`, a table or data set in memory, a list of
            dicts, or a Pool (returned as it is).
        format: force one layout (see layout_options.FORMATS) instead of detecting it per row.
        columns, tags: names of columns and of the words inside messages; a mapping, or WORD=NAME pairs.
        limit: take the first rows only.
        score_column: a column of ready scores, dotted for nested ones (`processed_scores.IFD`); a row without a finite
            number there is skipped.
        on_error: "fail" stops at the first line that cannot be read.
        max_error_rate: the share of such lines above which the run stops, once all are read.
        progress: how to show progress, see fastsel.progress.

    Returns:
        The pool. Every non-blank line is one of its rows, whatever is wrong with it: rows that cannot be used are
        "skipped", lines that cannot be read are "error", both with a reason that names the line.

    Raises:
        InputError: no such file, no rows, or rows of no known layout.
        RunFailedError: too many lines that cannot be read, or one with on_error="fail".
    """
    if isinstance(source, Pool):
        if format != "auto" or columns or tags or limit is not None or score_column is not None:
            raise UsageError(f"{source.name} is an open pool: give the pool options where it is opened")
        return source
    if names_entry(source):
        entry = read_entry(source)
        format = entry.format if format == "auto" else format
        columns, tags = columns or entry.columns, tags or entry.tags
        source = entry.paths()
    if limit is not None and limit < 1:
        raise UsageError(f"limit must be at least 1, got {limit}")
    options = read_layout_options(format, columns, tags)
    reader = RowReader(options)
    rows, name = open_source(source)
    index = RowIndex(score_column)
    first_row: object = None
    recognised = 0
    ambiguous = ""
    with progress_bar(rows.total, rows.unit, mode=progress, description=f"reading {name}") as bar:
        for row_id, (value, place) in enumerate(rows.scan(limit)):
            if row_id % _ROWS_A_BLOCK == 0:
                bar.update(rows.done - bar.done)
            if isinstance(value, Unreadable):
                if on_error == "fail":
                    raise RunFailedError(f"{name}, {place}: {value.reason}")
                index.reasons.add(row_id, place, value.reason)
                index.add(ERROR, bytes(_HASH_BYTES), None, None, np.nan)
                continue
            if first_row is None:
                first_row = value
            try:
                example = reader.read(value, row_id)
                recognised += 1
                score = _score(value, score_column) if score_column is not None else np.nan
            except UnusableRow as unusable:
                recognised += unusable.recognised
                if isinstance(unusable, AmbiguousRow):
                    ambiguous = unusable.reason
                index.reasons.add(row_id, place, unusable.reason)
                index.add(SKIPPED, bytes(_HASH_BYTES), *reader.id_and_source(value), np.nan)
                if not recognised and row_id + 1 >= _ROWS_BEFORE_GIVING_UP:
                    break
                continue
            index.layouts[example.layout] += 1
            index.add(OK, content_hash(example.messages), example.id, example.source, score)
        bar.update(rows.done - bar.done)
    if not index.status:
        raise InputError(f"{name} has no rows")
    _check_errors(name, index, max_error_rate)
    if not recognised:
        problem = f"{ambiguous}; {first_keys(first_row)}" if ambiguous else unknown_layout(first_row, options)
        raise InputError(f"{name}: the layout is not known: {problem}")
    words = {"format": format, "columns": columns, "tags": tags, "score_column": score_column}
    return _pool(rows, name, reader, index, json.dumps([format, repr(options), score_column]), words)


def _pool(
    source: Source, name: str, reader: RowReader, index: RowIndex, options: str, words: Mapping[str, Any]
) -> Pool:
    ids, sources = index.columns()
    status = _read_only(index.status, np.uint8)
    hashes = _read_only(index.hashes, np.uint8).reshape(-1, _HASH_BYTES)
    scores = None if index.scores is None else _read_only(index.scores, np.float64)
    most_frequent = max(index.layouts, key=lambda layout: index.layouts[layout], default="")
    return Pool(
        source,
        name,
        reader,
        layouts=index.layouts,
        format=most_frequent,
        fingerprint=xxhash.xxh3_128_hexdigest(f"{source.digest} {options}".encode()),
        status=status,
        reasons=index.reasons,
        content_hash=hashes,
        ids=ids,
        sources=sources,
        scores=scores,
        options=words,
    )


def _score(row: Any, column: str) -> float:
    value = lookup(row, column)
    if value is None:
        raise UnusableRow(f"there is no score in {column}")
    if isinstance(value, bool) or not isinstance(value, (Real, Decimal)):
        raise UnusableRow(f"the score in {column} is not a number: {str(value)[:40]!r}")
    try:
        score = float(value)
    except OverflowError:
        score = math.inf
    if not math.isfinite(score):
        raise UnusableRow(f"the score in {column} is {score}")
    return score


def _check_errors(name: str, index: RowIndex, max_error_rate: float) -> None:
    errors = index.status.count(ERROR)
    if errors > max_error_rate * len(index.status):
        first = next(row for row, code in enumerate(index.status) if code == ERROR)
        raise RunFailedError(
            f"{name}: {errors:,} of {len(index.status):,} lines cannot be read, more than --max-error-rate "
            f"{max_error_rate:g} allows; the first: {index.reasons[first]}"
        )


def _read_only(buffer: Any, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    values = np.frombuffer(buffer, dtype=dtype)
    values.setflags(write=False)
    return values
