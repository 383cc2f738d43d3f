"""FeatureStore: what a model computed, kept in shards so that an interrupted run goes on where it was.

    index.json                       fingerprint, plan; for each shard its rows, their content, the xxh3 of its file
    00000000-00000256.npy            one structured array a shard, one record a pool row, memory-mapped when read
    lock                             held while a process uses the folder; empty otherwise

A shard is found by its row range and by the content of those rows, never by a batch number. Whatever does not match
is refused with the difference: nothing is silently recomputed, nothing silently reused.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from fastsel.errors import InputError
from fastsel.folder_lock import FolderLock

if TYPE_CHECKING:
    from typing_extensions import Self

SCHEMA_VERSION = 1
INDEX = "index.json"
LOCK = "lock"


class FeatureStore:
    """A folder of shards that belong to one computation, for one process at a time.

    Close it, or use it as a context manager: until then no other process gets in.

    Attributes:
        folder: where it lies.
        fingerprint: what was computed with what; JSON values.
        plan: how the pool is cut up, as JSON; None until set_plan.
    """

    def __init__(self, folder: str | Path, fingerprint: Mapping[str, Any]) -> None:
        """Open the folder, or make it.

        Args:
            folder: made when it is missing.
            fingerprint: model, template, options and pool content: all that decides the numbers.

        Raises:
            InputError: the folder holds another computation (the message lists the differences), is damaged, or is in
                use by another process (the message says which).
        """
        self.folder = Path(folder)
        self.fingerprint = json.loads(json.dumps(fingerprint))
        self.plan: Any = None
        self._shards: dict[str, dict[str, Any]] = {}
        self._lock: FolderLock | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = FolderLock(self.folder / LOCK)
        except OSError as error:
            if not (self.folder / INDEX).exists():  # a finished store may be where nobody can write
                raise InputError(f"cannot write features to {self.folder}: {error.strerror}") from None
        try:
            if (self.folder / INDEX).exists():
                self._load()
            else:
                self._save()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let other processes in; what was read stays mapped."""
        if self._lock is not None:
            self._lock.close()

    def __enter__(self) -> "Self":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def set_plan(self, plan: Any) -> None:
        """Keep the plan; done once, before the first shard."""
        self.plan = json.loads(json.dumps(plan))
        self._save()

    def has(self, start: int, stop: int, content: str) -> bool:
        """Whether rows start..stop are there.

        Args:
            start, stop: pool row numbers.
            content: fingerprint of those rows.

        Raises:
            InputError: they are there, but of other content.
        """
        entry = self._shards.get(_key(start, stop))
        if entry is not None and entry["content"] != content:
            raise InputError(
                f"{self.folder}: rows {start}..{stop} are kept for content {entry['content']}, now it is {content}; "
                "the pool has changed: give another folder"
            )
        return entry is not None

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """The records of rows start..stop, memory-mapped read-only.

        Raises:
            InputError: the file is missing or not what was written.
        """
        key = _key(start, stop)
        path, entry = self.folder / f"{key}.npy", self._shards[key]
        try:
            found = xxhash.xxh3_64_hexdigest(path.read_bytes())
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror}); remove {self.folder} to start anew") from None
        if found != entry["xxh3"]:
            raise InputError(
                f"{path} is damaged: its xxh3 is {found}, {entry['xxh3']} was written; "
                f"remove {self.folder} to start anew"
            )
        records: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        return records

    def write(self, start: int, stop: int, content: str, records: NDArray[Any]) -> None:
        """Keep the records [stop - start] of rows start..stop; after this returns they survive a power cut."""
        key = _key(start, stop)
        path = self.folder / f"{key}.npy"
        part = path.with_suffix(".npy.part")
        with open(part, "wb") as stream:
            np.save(stream, records, allow_pickle=False)
            stream.flush()
            os.fsync(stream.fileno())
        self._shards[key] = {
            "rows": [start, stop],
            "content": content,
            "dtype": [list(field) for field in records.dtype.descr],
            "xxh3": xxhash.xxh3_64_hexdigest(part.read_bytes()),
        }
        os.replace(part, path)
        self._save()

    def _load(self) -> None:
        path = self.folder / INDEX
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            before, self.plan, self._shards = index["fingerprint"], index["plan"], index["shards"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} cannot be read ({error}); remove {self.folder} to start anew") from None
        if index.get("schema_version") != SCHEMA_VERSION:
            raise InputError(f"{path} has schema_version {index.get('schema_version')}, this fastsel {SCHEMA_VERSION}")
        if before != self.fingerprint:
            keys = [k for k in {**before, **self.fingerprint} if before.get(k) != self.fingerprint.get(k)]
            lines = [
                f"  {k}: {json.dumps(before.get(k))} there, {json.dumps(self.fingerprint.get(k))} now" for k in keys
            ]
            raise InputError(
                f"{self.folder} holds features of another computation:\n"
                + "\n".join(lines)
                + "\nGive another folder, or remove this one."
            )

    def _save(self) -> None:
        part = self.folder / f"{INDEX}.part"
        index = {
            "schema_version": SCHEMA_VERSION,
            "fingerprint": self.fingerprint,
            "plan": self.plan,
            "shards": dict(sorted(self._shards.items())),
        }
        with open(part, "w", encoding="utf-8") as stream:
            json.dump(index, stream, indent=1)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, self.folder / INDEX)
        _sync_folder(self.folder)


def _key(start: int, stop: int) -> str:
    return f"{start:08d}-{stop:08d}"


def _sync_folder(folder: Path) -> None:
    """A rename is durable once the folder itself is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
