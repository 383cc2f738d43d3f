"""Pools in JSON Lines and JSON arrays, plain or compressed: read in blocks, kept as one byte offset a row."""

import json
import tempfile
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from fastsel.errors import InputError, RunFailedError
from fastsel.io import files
from fastsel.io.files import HashingFile, InputFile

_BOM = b"\xef\xbb\xbf"


class Piece(NamedTuple):
    """The bytes of one row in a file: where they begin, on which line (from 1), and the bytes, without a line end."""

    offset: int
    line: int
    raw: bytes


class Unreadable(NamedTuple):
    """Stands for a row whose bytes are not JSON."""

    reason: str


def split_lines(blocks: Iterator[bytes], offset: int, first: bool) -> Iterator[Piece]:
    r"""The non-blank lines of a stream. A line ends with \n or \r\n; other line separators are text.

    Args:
        blocks: the content from `offset` on.
        offset: position of the first byte; its line counts as 1.
        first: whether this is the beginning of the file, where a byte order mark may stand.
    """
    line = 0
    rest: list[bytes] = []  # parts of a line that goes on in the next block
    for block in blocks:
        lines = block.split(b"\n")
        if len(lines) == 1:
            rest.append(block)
            continue
        lines[0] = b"".join(rest) + lines[0]
        last = lines.pop()
        rest = [last] if last else []
        if first and lines:
            lines[0], offset, first = _without_mark(lines[0], offset)
        for raw in lines:
            line += 1
            if raw and not raw.isspace():
                yield Piece(offset, line, raw[:-1] if raw.endswith(b"\r") else raw)
            offset += len(raw) + 1
    if rest:
        raw = b"".join(rest)
        if first:
            raw, offset, first = _without_mark(raw, offset)
        if raw and not raw.isspace():
            yield Piece(offset, line + 1, raw[:-1] if raw.endswith(b"\r") else raw)


def _without_mark(raw: bytes, offset: int) -> tuple[bytes, int, bool]:
    if raw.startswith(_BOM):
        return raw[len(_BOM) :], offset + len(_BOM), False
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError("is UTF-16, not UTF-8; convert it first (iconv -f UTF-16 -t UTF-8)")
    return raw, offset, False


def parse(raw: bytes) -> object:
    """The value of one row's JSON, or Unreadable. Duplicate keys: the last one counts; NaN and Infinity are taken."""
    try:
        return json.loads(raw.decode())
    except UnicodeDecodeError as error:
        return Unreadable(f"not UTF-8 (byte 0x{raw[error.start]:02x} at position {error.start + 1} of the line)")
    except json.JSONDecodeError as error:
        return Unreadable(f"not JSON ({error.msg.removesuffix(' at')} at column {error.pos + 1})")
    except RecursionError:
        return Unreadable("not usable JSON (nested too deeply)")
    except ValueError as error:  # Python refuses integers of more than 4,300 digits
        return Unreadable(f"not usable JSON ({error})")


def _as_line(raw: bytes) -> bytes:
    if b"\n" in raw:  # an element of an array, over several lines; a line end cannot stand inside a JSON string
        raw = b"".join(part.strip() for part in raw.split(b"\n"))
    return raw + b"\n"


class TextFiles:
    """Rows of JSON Lines or JSON-array files.

    The first pass (scan) keeps the byte offset of each row; later reads go there, or, in a compressed file, stream up
    to it.
    """

    suffix = ".jsonl"

    def __init__(self, paths: Sequence[Path], split: Callable[[Iterator[bytes], int, bool], Iterator[Piece]]) -> None:
        """Args: the files in order, and how their content falls into rows (split_lines or split_array)."""
        self.inputs: list[InputFile] = []
        self.digest = ""
        self.total: int | None = sum(path.stat().st_size for path in paths)
        self.unit = "B"
        self.done = 0
        self._paths = list(paths)
        self._split = split
        self._offsets = array("q")
        self._first_rows: list[int] = []  # of each file that was begun
        # Rows from which on line number - row number is another one: after blank lines, in a new file.
        self._shifted_rows, self._shifts = array("q"), array("q")
        self._states: list[tuple[int, int]] = []
        self._forward: tuple[int, int, Any] | None = None  # file, position and stream of the last compressed read

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_forward": None}

    def scan(self, limit: int | None) -> Iterator[tuple[object, str]]:
        """The value (or Unreadable) and place ("line 3") of each row, once, from the start; at most limit rows.

        After it, `digest` is known: it changes with any byte of any row.
        """
        digest, offsets = xxhash.xxh3_128(), self._offsets
        for path in self._paths:
            if len(offsets) == limit:
                break
            base = self.done
            self._first_rows.append(len(offsets))
            self._states.append(files.state_of(path))
            entry = InputFile(str(path))
            self.inputs.append(entry)
            with HashingFile(path) as file:
                for offset, line, raw in self._pieces(path, file):
                    row = len(offsets)
                    if not self._shifts or line - row != self._shifts[-1]:
                        self._shifted_rows.append(row)
                        self._shifts.append(line - row)
                    offsets.append(offset)
                    digest.update(raw)
                    digest.update(b"\n")
                    entry.rows += 1
                    self.done = base + file.position
                    yield parse(raw), self.place(row)
                    if len(offsets) == limit:
                        break
                else:
                    entry.sha256 = file.sha256_of_all()
        self.digest = digest.hexdigest()

    def place(self, row: int) -> str:
        """The line on which a row begins, and its file where there are several."""
        line = row + self._shifts[bisect_right(self._shifted_rows, row) - 1]
        if len(self._paths) == 1:
            return f"line {line}"
        return f"{self._paths[bisect_right(self._first_rows, row) - 1]}, line {line}"

    def _pieces(self, path: Path, file: HashingFile) -> Iterator[Piece]:
        content = files.blocks(files.decompressed(file, files.compression(path)), path)
        try:
            yield from self._split(content, 0, True)
        except InputError:  # of the file below, which names itself
            raise
        except ValueError as error:
            raise InputError(f"{path} {error}") from error

    def read(self, start: int, stop: int) -> Iterator[tuple[object, int]]:
        """The values of rows start..stop, each with the number of bytes it was read from."""
        for raw in self._raw_range(start, stop):
            yield parse(raw), len(raw)

    def rows(self, row_ids: Sequence[int]) -> list[Any]:
        """The values of any rows, in the order asked."""
        order = sorted(range(len(row_ids)), key=row_ids.__getitem__)  # a compressed file is streamed once
        values: list[Any] = [None] * len(order)
        for position, raw in zip(order, self._raw_rows([row_ids[position] for position in order]), strict=True):
            values[position] = parse(raw)
        return values

    def write(self, row_ids: Sequence[int], path: Path) -> None:
        """Write rows, a line each, in the order asked: a JSONL row is the line's own bytes without its line end."""
        ascending = all(row_ids[i] <= row_ids[i + 1] for i in range(len(row_ids) - 1))
        if ascending or not any(map(files.compression, self._paths)):
            with open(path, "wb") as out:
                for raw in self._raw_rows(row_ids):
                    out.write(_as_line(raw))
            return
        # Out of order from a compressed file: one streaming pass to a plain file, which can then be read anywhere.
        order = array("q", np.argsort(np.asarray(row_ids), kind="stable").tobytes())
        offsets = array("q", bytes(8 * len(order)))
        with tempfile.TemporaryFile(dir=path.parent) as plain, open(path, "wb") as out:
            for position, raw in zip(order, self._raw_rows([row_ids[position] for position in order]), strict=True):
                offsets[position] = plain.tell()
                plain.write(_as_line(raw))
            for offset in offsets:
                plain.seek(offset)
                out.write(plain.readline())

    def _raw_rows(self, row_ids: Sequence[int]) -> Iterator[bytes]:
        """The bytes of any rows, in the order asked; neighbours are one read."""
        done = 0
        while done < len(row_ids):
            run = done + 1
            while run < len(row_ids) and row_ids[run] - row_ids[done] == run - done:
                run += 1
            yield from self._raw_range(row_ids[done], row_ids[done] + run - done)
            done = run

    def _raw_range(self, start: int, stop: int) -> Iterator[bytes]:
        while start < stop:
            index = bisect_right(self._first_rows, start) - 1
            last = index + 1 == len(self._first_rows)
            end_of_file = len(self._offsets) if last else self._first_rows[index + 1]
            end = min(stop, end_of_file)
            files.check_unchanged(self._paths[index], self._states[index])
            begin = self._offsets[start]
            # The last row read ends where the file does, or, under a limit, somewhere before that.
            content = self._content(index, begin, self._offsets[end] if end < end_of_file else None)
            rows = 0
            for piece in islice(self._split(content, begin, False), end - start):
                yield piece.raw
                rows += 1
            if rows != end - start:
                raise RunFailedError(f"{self._paths[index]} changed while fastsel was using it")
            start = end

    def _content(self, index: int, begin: int, end: int | None) -> Iterator[bytes]:
        """The content of a file from byte begin to byte end (of the decompressed content), in blocks."""
        path = self._paths[index]
        codec = files.compression(path)
        if codec is None:
            with open(path, "rb") as file:
                file.seek(begin)
                yield from _up_to(file, begin, end)
            return
        position, stream = 0, None
        if self._forward is not None and self._forward[0] == index and self._forward[1] <= begin:
            _, position, stream = self._forward
        self._forward = None
        if stream is None:
            import pyarrow

            stream = pyarrow.input_stream(str(path), compression=codec)
        for _ in _up_to(stream, position, begin):
            pass
        if end is None:
            yield from _up_to(stream, begin, None)
            return
        yield from _up_to(stream, begin, end)
        self._forward = (index, end, stream)


def _up_to(stream: Any, position: int, end: int | None) -> Iterator[bytes]:
    size = 1 << 16  # grows: a single row should not cost a large read
    while end is None or position < end:
        block = stream.read(size if end is None else min(files.BLOCK_BYTES, end - position))
        if not block:
            return
        position += len(block)
        size = min(4 * size, files.BLOCK_BYTES)
        yield block
