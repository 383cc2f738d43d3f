"""Rewards of rows that were asked for batch by batch, kept so that an interrupted run asks for none again.

    index.json     what the rewards depend on; another computation is refused with the differences
    rewards.log    one entry a batch, appended and flushed: the number of rows, the hash of their numbers, a float64
                   each, and the hash of all this. What an interruption left half written is cut off.

A batch is found by its rows, all of them in order: the last bits of a reward may depend on the rows that went through
the model with it, and so a run that goes on ends in the bytes of one that was never stopped.
"""

import os
import struct
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from fastsel.store import FeatureStore

if TYPE_CHECKING:
    from typing_extensions import Self

Ask = Callable[[NDArray[np.int64]], NDArray[np.float64]]
_HEAD, _CHECK = struct.Struct("<q16s"), struct.Struct("<Q")
LOG = "rewards.log"


class KeptRewards:
    """rows [b] -> rewards [b], from the folder where this batch was asked for before. A context manager.

    Attributes:
        n_kept: rows whose rewards came from the folder.
    """

    def __init__(
        self, ask: Ask, folder: Any, fingerprint: dict[str, Any], on_rows: Callable[[int, bool], None]
    ) -> None:
        """Open the folder.

        Args:
            ask: computes rewards; NaN for a row that has none.
            folder: of its own; None keeps nothing.
            fingerprint: JSON values, all that rewards depend on.
            on_rows: called with the number of rows of each batch, and whether they were kept.

        Raises:
            InputError: the folder holds rewards of another computation, or is in use.
        """
        self._ask, self._on_rows = ask, on_rows
        self.n_kept = 0
        self._known: dict[bytes, NDArray[np.float64]] = {}
        self._store = None if folder is None else FeatureStore(folder, {"feature": "rewards", **fingerprint})
        self._log = -1
        if self._store is not None:
            path = Path(folder) / LOG
            end = self._read(path.read_bytes() if path.exists() else b"")
            self._log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.ftruncate(self._log, end)

    def __enter__(self) -> "Self":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._store is not None:
            os.close(self._log)
            self._store.close()

    def __call__(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """The rewards, NaN where ask gave NaN."""
        key = _key(rows)
        values = self._known.get(key)
        is_kept = values is not None
        if values is None:
            values = np.ascontiguousarray(self._ask(rows), np.float64)
            self._keep(key, values)
        self.n_kept += len(rows) * is_kept
        self._on_rows(len(rows), is_kept)
        return values

    def _keep(self, key: bytes, values: NDArray[np.float64]) -> None:
        if self._store is None:
            return
        entry = _HEAD.pack(len(values), key) + values.astype("<f8").tobytes()
        os.write(self._log, entry + _CHECK.pack(xxhash.xxh3_64_intdigest(entry)))
        os.fsync(self._log)
        self._known[key] = values

    def _read(self, log: bytes) -> int:
        """Take in whole entries; the position after the last."""
        at = 0
        while at + _HEAD.size <= len(log):
            n, key = _HEAD.unpack_from(log, at)
            stop = at + _HEAD.size + 8 * n
            if n < 0 or stop + _CHECK.size > len(log):
                break
            if _CHECK.unpack_from(log, stop)[0] != xxhash.xxh3_64_intdigest(log[at:stop]):
                break
            self._known[key] = np.frombuffer(log, "<f8", n, at + _HEAD.size)
            at = stop + _CHECK.size
        return at


def _key(rows: NDArray[np.int64]) -> bytes:
    return xxhash.xxh3_128_digest(np.ascontiguousarray(rows, "<i8").tobytes())
