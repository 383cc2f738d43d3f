"""Pools in columns: Parquet and Arrow files, folders made by save_to_disk, and tables and data sets in memory."""

import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fastsel.errors import InputError
from fastsel.io.files import InputFile, check_unchanged, state_of
from fastsel.io.records import RowDigest

_ROWS_A_BATCH = 4096
_ROWS_A_PASS = 1 << 16  # when rows are chosen; fewer where they are long
_BYTES_A_PASS = 1 << 27


class Shard(Protocol):
    """Some rows in columns. path is a file, or a word in angle brackets for data in memory."""

    path: str
    schema: pa.Schema
    num_rows: int

    def batches(self, start: int, stop: int) -> Iterator[pa.RecordBatch]:
        """Rows start..stop in order."""

    def take(self, rows: list[int]) -> list[pa.RecordBatch]:
        """These rows, which are ascending."""


class InMemory:
    """A table in memory or mapped from an Arrow file."""

    def __init__(self, table: pa.Table, path: str) -> None:
        self.path = path
        self.schema = table.schema
        self.num_rows = table.num_rows
        self._table = table

    def batches(self, start: int, stop: int) -> Iterator[pa.RecordBatch]:
        """Rows start..stop in order."""
        yield from self._table.slice(start, stop - start).to_batches(max_chunksize=_ROWS_A_BATCH)

    def take(self, rows: list[int]) -> list[pa.RecordBatch]:
        """These rows, which are ascending."""
        return _pick(self.batches(rows[0], rows[-1] + 1), rows[0], rows)


class ParquetFile:
    """A Parquet file, of which one row group at a time is decoded."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self._state = state_of(path)
        file = self._open()
        self.schema = file.schema_arrow
        self._first_rows = [0, *accumulate(file.metadata.row_group(i).num_rows for i in range(file.num_row_groups))]
        self.num_rows = self._first_rows[-1]

    def _open(self) -> pq.ParquetFile:
        check_unchanged(Path(self.path), self._state)
        try:
            return pq.ParquetFile(self.path, memory_map=True, pre_buffer=False)
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{self.path}: cannot be read as Parquet ({error})") from error

    def batches(self, start: int, stop: int) -> Iterator[pa.RecordBatch]:
        """Rows start..stop in order."""
        if start >= stop:
            return
        file = self._open()
        group = bisect_right(self._first_rows, start) - 1
        last_group = bisect_right(self._first_rows, stop - 1) - 1
        position = self._first_rows[group]
        try:
            for batch in file.iter_batches(_ROWS_A_BATCH, row_groups=list(range(group, last_group + 1))):
                begin, end = max(start, position), min(stop, position + batch.num_rows)
                if begin < end:
                    yield batch.slice(begin - position, end - begin)
                position += batch.num_rows
                if position >= stop:
                    return
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{self.path}: damaged after row {position:,} ({error})") from error

    def take(self, rows: list[int]) -> list[pa.RecordBatch]:
        """These rows, which are ascending."""
        found: list[pa.RecordBatch] = []
        done = 0
        while done < len(rows):
            group = bisect_right(self._first_rows, rows[done]) - 1
            end = done
            while end < len(rows) and rows[end] < self._first_rows[group + 1]:
                end += 1
            wanted = rows[done:end]
            found += _pick(self.batches(wanted[0], wanted[-1] + 1), wanted[0], wanted)
            done = end
        return found


class HuggingFaceDataset:
    """A datasets.Dataset, with the rows in the order of its own indices."""

    def __init__(self, dataset: Any) -> None:
        self.path = "<datasets.Dataset>"
        self._dataset = dataset.with_format("arrow")
        self.schema = self._dataset[:0].schema
        self.num_rows = len(dataset)

    def batches(self, start: int, stop: int) -> Iterator[pa.RecordBatch]:
        """Rows start..stop in order."""
        for begin in range(start, stop, _ROWS_A_BATCH):
            yield from self._dataset[begin : min(stop, begin + _ROWS_A_BATCH)].to_batches()

    def take(self, rows: list[int]) -> list[pa.RecordBatch]:
        """These rows, which are ascending."""
        batches: list[pa.RecordBatch] = self._dataset[rows].to_batches()
        return batches


class Tables:
    """Rows of one or more shards in columns."""

    suffix = ".parquet"

    def __init__(self, shards: Sequence[Shard]) -> None:
        """Args: the shards in order; their schemas must agree or be promotable to one.

        Raises:
            InputError: they do not.
        """
        self.inputs: list[InputFile] = []
        self.digest = ""
        self.unit = "rows"
        self.done = 0
        self._shards = list(shards)
        self._row_bytes = 0  # of an average row; known after scan
        self._first_rows = [0, *accumulate(shard.num_rows for shard in shards)]
        self.total: int | None = self._first_rows[-1]
        self.schema = shards[0].schema
        if any(not shard.schema.equals(self.schema) for shard in shards):
            try:
                self.schema = pa.unify_schemas([shard.schema for shard in shards], promote_options="permissive")
            except pa.ArrowException as error:
                raise InputError(
                    f"{shards[0].path} and the other shards have columns of different types: {error}"
                ) from error

    def scan(self, limit: int | None) -> Iterator[tuple[object, str]]:
        """The value and place of each row, once; after it `digest` is known."""
        digest = RowDigest()
        size = 0
        for shard in self._shards:
            rows = shard.num_rows if limit is None else min(shard.num_rows, limit - self.done)
            if rows <= 0 and self.inputs:
                break
            in_memory = shard.path.startswith("<")
            entry = InputFile(shard.path, rows)
            self.inputs.append(entry)
            for batch in shard.batches(0, rows):
                size += batch.nbytes
                for row in _values(batch):
                    digest.update(row)
                    yield row, self.place(self.done)
                    self.done += 1
            if in_memory:
                entry.sha256 = digest.sha256
        self.digest = digest.xxh3
        self._row_bytes = size // max(self.done, 1)

    def place(self, row: int) -> str:
        """Columns have no lines: the row's number in the pool."""
        return f"row_id {row}"

    def read(self, start: int, stop: int) -> Iterator[tuple[object, int]]:
        """The values of rows start..stop, each with its share of the bytes of its batch."""
        while start < stop:
            index = bisect_right(self._first_rows, start) - 1
            first, end = self._first_rows[index], min(stop, self._first_rows[index + 1])
            for batch in self._shards[index].batches(start - first, end - first):
                size = batch.nbytes // max(batch.num_rows, 1)
                for row in _values(batch):
                    yield row, size
            start = end

    def rows(self, row_ids: Sequence[int]) -> list[Any]:
        """The values of any rows, in the order asked."""
        return _values(self.take(row_ids))

    def take(self, row_ids: Sequence[int]) -> pa.Table:
        """Any rows as one table, in the order asked."""
        order = np.argsort(np.asarray(row_ids, dtype=np.int64), kind="stable")
        ascending = [row_ids[position] for position in order]
        tables = [self.schema.empty_table()]
        done = 0
        while done < len(ascending):
            index = bisect_right(self._first_rows, ascending[done]) - 1
            first, next_first = self._first_rows[index], self._first_rows[index + 1]
            local = []
            while done < len(ascending) and ascending[done] < next_first:
                local.append(ascending[done] - first)
                done += 1
            tables.append(pa.Table.from_batches(self._shards[index].take(local), self._shards[index].schema))
        same = all(table.schema.equals(self.schema) for table in tables)
        table = pa.concat_tables(tables, promote_options="none" if same else "permissive")
        back = np.empty(len(order), dtype=np.int64)
        back[order] = np.arange(len(order))
        if (back == np.arange(len(order))).all():
            return table
        return table.take(pa.array(back)).replace_schema_metadata(self.schema.metadata)

    def write(self, row_ids: Sequence[int], path: Path) -> None:
        """Write rows as Parquet in the order asked, with the schema of the pool."""
        # Not "compliant": that would rename the items of lists, and the schema is to stay the user's.
        with pq.ParquetWriter(path, self.schema, use_compliant_nested_type=False) as out:
            rows = max(1, min(_ROWS_A_PASS, _BYTES_A_PASS // max(self._row_bytes, 1)))
            for begin in range(0, len(row_ids), rows):
                out.write_table(self.take(row_ids[begin : begin + rows]).cast(self.schema))


def _pick(batches: Iterator[pa.RecordBatch], position: int, rows: list[int]) -> list[pa.RecordBatch]:
    """The wanted rows (ascending) of batches whose first row is number `position`."""
    wanted = np.asarray(rows, dtype=np.int64)
    found = []
    for batch in batches:
        begin, end = np.searchsorted(wanted, [position, position + batch.num_rows])
        if begin < end:
            found.append(batch.take(pa.array(wanted[begin:end] - position)))
        position += batch.num_rows
    return found


def _values(batch: "pa.RecordBatch | pa.Table") -> list[Any]:
    """Rows as dicts. Nanoseconds become whole numbers: Python's times do not hold them."""
    for index, field in enumerate(batch.schema):
        if getattr(field.type, "unit", None) == "ns":
            batch = batch.set_column(index, field.name, batch.column(index).cast(pa.int64()))
    rows: list[Any] = batch.to_pylist()
    return rows


def open_arrow_file(path: Path) -> InMemory:
    """An Arrow file, in the file or the stream form, mapped and not loaded (unless its buffers are compressed)."""
    try:
        try:
            with pa.ipc.open_file(pa.memory_map(str(path))) as file:
                return InMemory(file.read_all(), str(path))
        except pa.ArrowInvalid:
            with pa.ipc.open_stream(pa.memory_map(str(path))) as stream:
                return InMemory(stream.read_all(), str(path))
    except (pa.ArrowException, OSError, EOFError) as error:
        raise InputError(f"{path}: cannot be read as Arrow ({error})") from error


def saved_dataset_files(folder: Path) -> list[Path]:
    """The Arrow files of a folder made by `Dataset.save_to_disk`.

    Raises:
        InputError: it is no such folder, or holds several splits.
    """
    splits = folder / "dataset_dict.json"
    if splits.is_file():
        names = _listed(splits, "splits")
        if len(names) == 1:
            return saved_dataset_files(folder / names[0])
        raise InputError(f"{folder} holds the splits {', '.join(names)}: name one, such as {folder / names[0]}")
    return [folder / entry["filename"] for entry in _listed(folder / "state.json", "_data_files")]


def _listed(path: Path, key: str) -> list[Any]:
    """What a file of save_to_disk lists under a key."""
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: not as datasets' save_to_disk writes it ({type(error).__name__}: {error}); save it again"
        ) from error
    if not isinstance(listed, list) or not listed:
        raise InputError(f"{path}: lists no {key.strip('_').replace('_', ' ')}; save it again")
    return listed
