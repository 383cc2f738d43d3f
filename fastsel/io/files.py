"""Files of a pool: finding them, opening them (compressed or not), and their SHA-256."""

import difflib
import glob
import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from fastsel.errors import InputError, RunFailedError

TEXT_SUFFIXES = (".jsonl", ".json", ".ndjson")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
SUPPORTED = ".jsonl, .json (both also .gz or .zst), .parquet, .arrow, or a folder made by datasets' save_to_disk"
BLOCK_BYTES = 1 << 22


class InputFile:
    """One input of a pool, for the manifest: its path, how many rows it gave, and its SHA-256."""

    def __init__(self, path: str, rows: int = 0, sha256: str | None = None) -> None:
        """A path in angle brackets stands for data in memory, whose sha256 is then known from the start."""
        self.path = path
        self.rows = rows
        self._sha256 = sha256

    @property
    def sha256(self) -> str:
        """In hexadecimal; of the file as it lies on disk. Read in passing where the whole file was read, else now."""
        if self._sha256 is None:
            hasher = hashlib.sha256()
            with open(self.path, "rb") as file:
                while block := file.read(BLOCK_BYTES):
                    hasher.update(block)
            self._sha256 = hasher.hexdigest()
        return self._sha256

    @sha256.setter
    def sha256(self, digest: str) -> None:
        self._sha256 = digest

    def __repr__(self) -> str:
        return f"InputFile(path={self.path!r}, rows={self.rows})"


class HashingFile:
    """A binary file that takes the SHA-256 of what is read from it, so that a pool is read once and not twice."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = open(path, "rb")  # noqa: SIM115  (closed on exit)
        self._hasher = hashlib.sha256()
        self.position = 0
        self.closed = False  # pyarrow asks

    def read(self, size: int = -1) -> bytes:
        """The next bytes of the file, as stored."""
        block = self._file.read(size)
        self._hasher.update(block)
        self.position += len(block)
        return block

    def sha256_of_all(self) -> str:
        """Read what is left (a decompressor may stop before the end) and give the SHA-256 of the file."""
        while self.read(BLOCK_BYTES):
            pass
        return self._hasher.hexdigest()

    def close(self) -> None:
        """Left to the `with` block: a decompressor closes what it reads from, and the rest is still to be hashed."""

    def __enter__(self) -> "HashingFile":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def compression(path: Path) -> str | None:
    """Name of the codec by the file's suffix, or None."""
    return COMPRESSIONS.get(path.suffix.lower())


def decompressed(file: Any, codec: str | None) -> Any:
    """A readable stream of the file's content; pyarrow brings both codecs and notices a stream that ends early."""
    if codec is None:
        return file
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), codec)


def blocks(stream: Any, path: Path, done: int = 0) -> Iterator[bytes]:
    """The content of a stream, block by block.

    Raises:
        InputError: the stream is damaged or ends early; says after how many bytes.
    """
    while True:
        try:
            block = stream.read(BLOCK_BYTES)
        except OSError as error:
            raise InputError(
                f"{path}: cannot be decompressed after {done:,} bytes of content ({error}); the file is damaged or was "
                "not copied to its end"
            ) from error
        if not block:
            return
        done += len(block)
        yield block


def state_of(path: Path) -> tuple[int, int]:
    """Size and time of change, by which a file that was replaced during a run is noticed."""
    state = os.stat(path)
    return state.st_size, state.st_mtime_ns


def check_unchanged(path: Path, state: tuple[int, int]) -> None:
    """Refuse to go on with a file that is not the one that was read at the start."""
    if not path.exists() or state_of(path) != state:
        raise RunFailedError(f"{path} changed while fastsel was using it; start again with the file as it is now")


def find_files(source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Paths of a pool: one file, the sorted matches of a glob, or a list of either in the order given.

    Raises:
        InputError: nothing there (with the working directory and near names), or a file named twice.
    """
    if not isinstance(source, (str, os.PathLike)):
        paths = [path for item in source for path in find_files(item)]
        if not paths:
            raise InputError("the list of pool files is empty")
        twice = sorted(path for path, times in Counter(paths).items() if times > 1)
        if twice:
            raise InputError(f"{twice[0]} is named twice in the list of pool files")
        return paths
    path = Path(source).expanduser()
    if path.exists():
        return [path]
    if glob.has_magic(str(path)):
        matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True) if os.path.isfile(match))
        if matches:
            return matches
        raise InputError(f"no file matches {source} (working directory: {Path.cwd()})")
    raise InputError(f"{source}: no such file (working directory: {Path.cwd()}){_near_names(path)}")


def _near_names(path: Path) -> str:
    folder = path.parent
    while not folder.is_dir():
        folder = folder.parent
    if folder != path.parent:
        return f"; the folder {path.parent} does not exist"
    near = difflib.get_close_matches(path.name, sorted(os.listdir(folder)), n=3)
    return f"; near names in {folder}: {', '.join(near)}" if near else ""
