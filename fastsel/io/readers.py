"""What the user names as a pool -> the object that reads it."""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from fastsel.errors import InputError
from fastsel.io import files
from fastsel.io.files import InputFile
from fastsel.io.json_array import split_array
from fastsel.io.records import Records
from fastsel.io.tables import (
    HuggingFaceDataset,
    InMemory,
    ParquetFile,
    Tables,
    open_arrow_file,
    saved_dataset_files,
)
from fastsel.io.text_files import TextFiles, split_lines


class Source(Protocol):
    """Rows that can be read from the start once (scan) and then again from anywhere.

    Attributes:
        inputs: the files (or the data in memory), as the manifest lists them; complete after scan.
        digest: changes with any byte of any row; known after scan.
        suffix: of the file that write makes.
        total, unit, done: how far scan has come.
    """

    inputs: list[InputFile]
    digest: str
    suffix: str
    total: int | None
    unit: str
    done: int

    def scan(self, limit: int | None) -> Iterator[tuple[object, str]]:
        """The value (or Unreadable) and place ("line 3") of each row, once, from the start; at most limit rows."""

    def place(self, row: int) -> str:
        """Where a row that scan has given stands: "line 3", as scan named it."""

    def read(self, start: int, stop: int) -> Iterator[tuple[object, int]]:
        """The values of rows start..stop, each with the bytes it takes, so that the caller can bound its memory."""

    def rows(self, row_ids: Sequence[int]) -> list[Any]:
        """The values of any rows, in the order asked."""

    def write(self, row_ids: Sequence[int], path: Path) -> None:
        """Write the user's own rows in the order asked."""


def open_source(source: Any) -> tuple[Source, str]:
    """The reader of a pool and the pool's name.

    Raises:
        InputError: nothing there, or nothing that can be read.
    """
    if isinstance(source, (str, Path)):
        return _open_files(files.find_files(source), Path(source).name)
    if isinstance(source, (list, tuple)):
        if not source:
            raise InputError("the pool is an empty list")
        if all(isinstance(item, (str, Path)) for item in source):
            paths = files.find_files(source)
            return _open_files(paths, paths[0].name + (f" and {len(paths) - 1} more" if len(paths) > 1 else ""))
        return Records(source), "list"
    return _open_in_memory(source)


def _open_files(paths: list[Path], name: str) -> tuple[Source, str]:
    _check_names(paths)
    if len(paths) == 1 and paths[0].is_dir():
        folder = paths[0]
        if not any((folder / marker).is_file() for marker in ("state.json", "dataset_dict.json")):
            raise InputError(
                f"{folder} is a folder, and not one made by datasets' save_to_disk: {_suggest_glob(folder)}"
            )
        return Tables([open_arrow_file(path) for path in saved_dataset_files(folder)]), name
    kinds = {path: _kind(path) for path in paths}
    if len(set(kinds.values())) > 1:
        text = ", ".join(f"{path.name} ({kind})" for path, kind in list(kinds.items())[:4])
        raise InputError(f"one pool cannot mix kinds of files: {text}")
    kind = kinds[paths[0]]
    if kind == "Parquet":
        return Tables([ParquetFile(path) for path in paths]), name
    if kind == "Arrow":
        return Tables([open_arrow_file(path) for path in paths]), name
    return TextFiles(paths, split_array if kind == "JSON array" else split_lines), name


def _check_names(paths: list[Path]) -> None:
    for path in paths:
        if not os.access(path, os.R_OK):
            raise InputError(f"{path}: no permission to read it")
        try:
            str(path).encode()
        except UnicodeEncodeError:
            raise InputError(
                f"{os.fsencode(path)!r}: the name is not UTF-8, and the manifest could not hold it: rename it"
            ) from None
        if path.name == "dataset_info.json":
            raise InputError(f"{path} lists data sets and holds no rows: name one of them, as in {path}#NAME")


def _suggest_glob(folder: Path) -> str:
    suffixes = sorted({path.suffix for path in folder.iterdir() if path.is_file()})
    known = [
        suffix for suffix in suffixes if suffix in (*files.TEXT_SUFFIXES, *files.COMPRESSIONS, ".parquet", ".arrow")
    ]
    if known:
        return f"name its files, such as '{folder}/*{known[0]}'"
    return f"it holds no file that fastsel reads ({files.SUPPORTED})"


def _kind(path: Path) -> str:
    if path.is_dir():
        raise InputError(f"{path} is a folder: a pool of several parts must be files")
    suffix = (path.with_suffix("") if files.compression(path) else path).suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        return "JSON Lines"
    if suffix == ".json":
        return _kind_of_json(path)
    if suffix == ".parquet" and not files.compression(path):
        return "Parquet"
    if suffix == ".arrow" and not files.compression(path):
        return "Arrow"
    raise InputError(f"{path}: not a kind of file that fastsel reads ({files.SUPPORTED})")


def _kind_of_json(path: Path) -> str:
    """Many .json files are JSON Lines."""
    with open(path, "rb") as file:
        blocks = files.blocks(files.decompressed(file, files.compression(path)), path)
        start = next(blocks, b"").removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith(b"["):
        return "JSON array"
    first_line, line_end, _ = start.partition(b"\n")
    if line_end:
        try:
            json.loads(first_line)
        except ValueError:
            raise InputError(
                f"{path} is neither an array of rows nor one row a line; if rows are inside an object, write them out"
            ) from None
    return "JSON Lines"


def _open_in_memory(source: Any) -> tuple[Source, str]:
    import pyarrow as pa

    package = type(source).__module__.partition(".")[0]
    kind = f"{package}.{type(source).__name__}"
    if isinstance(source, (pa.Table, pa.RecordBatch)):
        table = pa.Table.from_batches([source]) if isinstance(source, pa.RecordBatch) else source
        return Tables([InMemory(table, f"<{kind}>")]), "table"
    if package == "datasets":
        if isinstance(source, dict):
            raise InputError(
                f"a DatasetDict is not one pool: take a split, such as dataset[{next(iter(source), 'train')!r}]"
            )
        if not hasattr(source, "__len__"):
            raise InputError("an IterableDataset cannot be read twice: save it as a file, or load it without streaming")
        return Tables([HuggingFaceDataset(source)]), "dataset"
    pandas = sys.modules.get("pandas")
    if pandas is not None and isinstance(source, pandas.DataFrame):
        try:
            return Tables([InMemory(pa.Table.from_pandas(source, preserve_index=False), f"<{kind}>")]), "data frame"
        except (pa.ArrowInvalid, pa.ArrowTypeError):  # a column that mixes types: row by row, then
            return Records(source.astype(object).where(source.notna(), None).to_dict("records")), "data frame"
    if hasattr(source, "to_arrow"):  # polars
        return Tables([InMemory(source.to_arrow(), f"<{kind}>")]), "data frame"
    if hasattr(source, "__arrow_c_stream__"):
        return Tables([InMemory(pa.table(source), f"<{kind}>")]), "table"
    raise InputError(
        "a pool is a path, a glob, a list of paths, a list of dicts, a datasets.Dataset, a pyarrow Table, or a pandas "
        f"or polars data frame; this is a {type(source).__module__}.{type(source).__name__}"
    )
