"""Pools that are Python lists of dicts."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import xxhash

from fastsel.io.files import InputFile


def as_json(row: object) -> str:
    """The row as a line of JSON. What JSON has no word for (dates, bytes) becomes text, numpy values plain numbers."""
    try:
        text = json.dumps(row, ensure_ascii=False, default=_plain)
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate, which only an escape can carry
        return json.dumps(row, default=_plain)
    return text


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):  # numpy arrays and scalars
        return value.tolist()
    return str(value)


class RowDigest:
    """What a pool without a file of its own is known by: SHA-256 and xxh3_128 of its rows as JSON lines."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()
        self._xxh3 = xxhash.xxh3_128()

    def update(self, row: object) -> None:
        """Add the next row."""
        line = as_json(row).encode() + b"\n"
        self._sha256.update(line)
        self._xxh3.update(line)

    @property
    def sha256(self) -> str:
        """In hexadecimal."""
        return self._sha256.hexdigest()

    @property
    def xxh3(self) -> str:
        """In hexadecimal."""
        return self._xxh3.hexdigest()


class Records:
    """Rows that are already Python objects. They are not copied: do not change them while the pool is in use."""

    suffix = ".jsonl"

    def __init__(self, rows: Sequence[Any]) -> None:
        """Args: the rows, dicts for the most part."""
        self.inputs: list[InputFile] = []
        self.digest = ""
        self.total: int | None = len(rows)
        self.unit = "rows"
        self.done = 0
        self._rows = rows

    def scan(self, limit: int | None) -> Iterator[tuple[object, str]]:
        """The value and place of each row, once; after it `digest` is known."""
        digest = RowDigest()
        entry = InputFile("<list>")
        self.inputs.append(entry)
        for row in self._rows[:limit]:
            digest.update(row)
            yield row, self.place(self.done)
            self.done += 1
        entry.rows, entry.sha256, self.digest = self.done, digest.sha256, digest.xxh3

    def place(self, row: int) -> str:
        """Objects have no lines: the row's number in the pool."""
        return f"row_id {row}"

    def read(self, start: int, stop: int) -> Iterator[tuple[object, int]]:
        """The values of rows start..stop; they cost no reading, so their size counts as 0."""
        for row in self._rows[start:stop]:
            yield row, 0

    def rows(self, row_ids: Sequence[int]) -> list[Any]:
        """The values of any rows, in the order asked."""
        return [self._rows[row_id] for row_id in row_ids]

    def write(self, row_ids: Sequence[int], path: Path) -> None:
        """Write rows as JSON Lines, in the order asked."""
        with open(path, "wb") as out:
            for row_id in row_ids:
                out.write(as_json(self._rows[row_id]).encode() + b"\n")
