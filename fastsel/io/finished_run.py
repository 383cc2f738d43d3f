"""Reading a finished run back: its scores, its record and what it was asked, without the texts of its pool."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from fastsel.budget import Budget
from fastsel.errors import InputError
from fastsel.io.examples import STATUS

if TYPE_CHECKING:
    from fastsel.io import Pool
    from fastsel.selection import Selection

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class RecordedInput:
    """One file of the pool, as the manifest names it."""

    path: str
    rows: int
    sha256: str | None


class RecordedPool:
    """What a finished run knows of its pool: all but the texts. It stands in for a Pool where no text is needed."""

    def __init__(self, manifest: dict[str, Any], record: pa.Table, folder: Path):
        """Args: the manifest, the columns id, content_hash, source, status and reason, and where they came from."""
        pool = manifest["pool"]
        self.name: str = pool["name"]
        self.format: str = pool["format"]
        self.fingerprint: str = pool["fingerprint"]
        self.inputs = [RecordedInput(**entry) for entry in manifest["inputs"]]
        self.scores = None
        self._record, self._folder = record, folder
        self.status: NDArray[np.uint8] = _codes(record["status"])
        self.content_hash = _hash_bytes(record["content_hash"])

    def __len__(self) -> int:
        return cast(int, self._record.num_rows)

    def ids(self) -> pa.ChunkedArray | None:
        """The rows' own ids, or None."""
        return _unless_empty(self._record["id"])

    def sources(self) -> pa.ChunkedArray | None:
        """The rows' sources, or None."""
        return _unless_empty(self._record["source"])

    def chunks(self, *_: Any, **__: Any) -> Iterator[Any]:
        """Raises: InputError, as everything that needs texts."""
        self._no_texts()

    def examples(self, *_: Any, **__: Any) -> list[Any]:
        """Raises: InputError, as everything that needs texts."""
        self._no_texts()

    def write_rows(self, *_: Any, **__: Any) -> Path:
        """Raises: InputError, as everything that needs texts."""
        self._no_texts()

    def dataset(self, *_: Any, **__: Any) -> Any:
        """Raises: InputError, as everything that needs texts."""
        self._no_texts()

    def _no_texts(self) -> NoReturn:
        raise InputError(
            f"{self._folder} holds scores, not texts: open the pool it was made from ({self.name}) and hand it over, "
            f"as in Selection.load(folder, pool=fastsel.open_pool(...))"
        )


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """manifest.json of a finished run.

    Raises:
        InputError: there is none, or it cannot be read by this version.
    """
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{folder} holds no finished run: it has no {MANIFEST}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("schema_version") != SCHEMA_VERSION:
        raise InputError(f"{path} was not written by this version of fastsel (schema_version is not {SCHEMA_VERSION})")
    return manifest


def load_selection(folder: str | Path, pool: Pool | None = None) -> Selection:
    """Read a finished run, to look at it or to choose again with another budget (Selection.choose_again).

    Args:
        folder: what Selection.save() wrote.
        pool: the pool the run was made from, needed to write rows or a report; checked by its fingerprint.

    Raises:
        InputError: no finished run, files that do not fit together, or another pool.
    """
    from fastsel.selection import RULE, Selection

    folder = Path(folder)
    manifest = read_manifest(folder)
    if pool is not None and pool.fingerprint != manifest["pool"]["fingerprint"]:
        raise InputError(f"{folder} was made from another pool than {pool.name}, or from other options of reading it")
    try:
        scores = np.load(folder / "scores.npy", allow_pickle=False)
        indices = np.load(folder / "indices.npy", allow_pickle=False)
        record = pq.read_table(folder / "selection.parquet", read_dictionary=["source", "status"])
        if not len(scores) == record.num_rows == manifest["pool"]["rows"]:
            raise InputError(f"{folder}: scores.npy has {len(scores)} rows, selection.parquet {record.num_rows}")
    except (OSError, ValueError, pa.ArrowInvalid) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{folder} is not a complete run: {error}") from None
    status = _codes(record["status"])
    refused = pc.fill_null(pc.starts_with(record["reason"], RULE), False).to_numpy(zero_copy_only=False)
    noted = np.flatnonzero(pc.is_valid(record["reason"]).to_numpy(zero_copy_only=False) & ~refused)
    reasons = dict(zip(noted.tolist(), record["reason"].take(noted).to_pylist(), strict=True))
    # A row that a rule kept out and that has a reason besides carries both, the rule first.
    for row in np.flatnonzero(refused):
        _, both, rest = record["reason"][int(row)].as_py().partition(f"{RULE}{manifest['rule']}; ")
        if both:
            reasons[int(row)] = rest
    names = record.column_names
    amount = Fraction(manifest["budget"]["amount"])
    unit = manifest["budget"]["unit"]
    return Selection(
        method=manifest["method"],
        pool=cast("Pool", RecordedPool(manifest, record, folder)) if pool is None else pool,
        indices=indices,
        scores=scores,
        status=status,
        eligible=(status <= STATUS.index("truncated")) & ~np.isnan(scores) & ~refused,
        n_tokens=_numbers(record["n_tokens"], -1, np.int32),
        metrics={
            name: _numbers(record[name], np.nan, np.float64, always=True) for name in names[names.index("reason") + 1 :]
        },
        reasons=reasons,
        budget=Budget(unit, amount if unit == "share" else int(amount)),
        requested=manifest["requested"],
        short=manifest["short"],
        config=manifest["config"],
        timings=manifest["timings"],
        notes=manifest["notes"],
        seed=manifest["seed"],
        official=manifest["official"],
        per=manifest["per"],
        rule=manifest["rule"],
        largest=manifest["largest"],
        provenance=manifest["provenance"],
        gains=_numbers(record["gain"], np.nan, np.float64),
        clusters=_numbers(record["cluster"], -1, np.int32),
    )


def _unless_empty(values: pa.ChunkedArray) -> pa.ChunkedArray | None:
    return None if values.null_count == len(values) else values


def _codes(values: pa.ChunkedArray) -> NDArray[np.uint8]:
    codes = pc.index_in(values.cast(pa.string()), value_set=pa.array(STATUS))
    return cast("NDArray[np.uint8]", codes.to_numpy().astype(np.uint8))


def _numbers(values: pa.ChunkedArray, missing: float, dtype: Any, *, always: bool = False) -> Any:
    if not always and values.null_count == len(values):
        return None
    return pc.fill_null(values, missing).to_numpy().astype(dtype)


def _hash_bytes(values: pa.ChunkedArray) -> NDArray[np.uint8]:
    pieces = [np.zeros((0, 16), np.uint8)]
    for chunk in pc.fill_null(values, "0" * 32).chunks:
        fixed = chunk.cast(pa.binary()).cast(pa.binary(32))
        letters = np.frombuffer(fixed.buffers()[1], np.uint8)[32 * fixed.offset :][: 32 * len(fixed)]
        nibbles = letters - np.where(letters < ord("a"), ord("0"), ord("a") - 10).astype(np.uint8)
        pieces.append((16 * nibbles[0::2] + nibbles[1::2]).astype(np.uint8).reshape(-1, 16))
    return np.concatenate(pieces)
