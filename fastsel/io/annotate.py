"""Scores inside the chosen rows, under one key that no other tool uses."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from fastsel.errors import UsageError
from fastsel.summary import finite

if TYPE_CHECKING:
    from fastsel.selection import Selection

KEY = "fastsel"


def annotate_rows(selection: Selection, rows: NDArray[np.int64], path: Path) -> None:
    """Add {"method", "score", "rank" (from 0) and each metric} to the rows of a written file; everything else stays.

    Args:
        selection: where the scores come from.
        rows: pool row numbers in the order of the file.
        path: selected.jsonl or selected.parquet, replaced.

    Raises:
        UsageError: the rows are in another format.
    """
    order = np.argsort(selection.indices)
    ranks = order[np.searchsorted(selection.indices, rows, sorter=order)]
    notes = (
        {"method": selection.method, "score": finite(selection.scores[row]), "rank": int(rank)}
        | {name: finite(values[row]) for name, values in selection.metrics.items()}
        for row, rank in zip(rows, ranks, strict=True)
    )
    part = path.with_name(path.name + ".part")
    if path.suffix == ".jsonl":
        with open(path, "rb") as lines, open(part, "wb") as stream:
            for line, note in zip(lines, notes, strict=True):
                stream.write(_with_note(line, note))
    elif path.suffix == ".parquet":
        table = pq.read_table(path)
        kept = [name for name in table.column_names if name != KEY]
        pq.write_table(table.select(kept).append_column(KEY, pa.array(list(notes))), part, compression="zstd")
    else:
        raise UsageError(f"--annotate cannot add a key to {path.suffix} rows")
    os.replace(part, path)


def _with_note(line: bytes, note: dict[str, Any]) -> bytes:
    """The line with the key added before its last brace, so that the user's own bytes stay as they are."""
    text = json.dumps(note, ensure_ascii=False).encode()
    body = line.rstrip()
    if (
        f'"{KEY}"'.encode() in body
    ):  # perhaps a row that was annotated before: a second key of the same name would be ambiguous
        row = json.loads(body)
        if KEY in row:
            return json.dumps({**row, KEY: note}, ensure_ascii=True).encode() + b"\n"
    comma = b"" if body[:-1].rstrip().endswith(b"{") else b", "
    return body[:-1] + comma + f'"{KEY}": '.encode() + text + b"}\n"
