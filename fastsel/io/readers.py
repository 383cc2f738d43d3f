"""What the user names as a pool -> the object that reads it."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from fastsel.errors import InputError
from fastsel.io import files
from fastsel.io.files import InputFile
from fastsel.io.records import Records
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
    if isinstance(source, (list, tuple)) and (not source or isinstance(source[0], dict)):
        if not source:
            raise InputError("the pool is an empty list")
        return Records(source), "list"
    paths = files.find_files(source)
    return TextFiles(paths, split_lines), paths[0].name
