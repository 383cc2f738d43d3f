"""Which rows a subset is, and how its texts and vectors are read: by itself, or as rows of the reference.

A subset whose rows all stand in the reference is read there, so that nothing is embedded twice and a matrix of the
user's serves both.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastsel.errors import InputError, UsageError

if TYPE_CHECKING:
    from fastsel.io import Pool

Rows = NDArray[np.int64]
HASH_BYTES = 16


@dataclass(frozen=True)
class Side:
    """Rows and what is read of them: functions of row numbers."""

    rows: Rows
    texts: Callable[[Rows], list[str]]
    vectors: Callable[[Rows], NDArray[np.float32]] | None


def sides(
    subset: str | Path,
    reference: str | Path | None,
    encoder: Any,
    text: str,
    device: str,
    progress: str,
    notes: list[str],
) -> tuple[Side, Side | None, str | None]:
    """The subset, the reference (None without one) and the encoder's name (None when no vectors are asked for).

    Args:
        subset, reference, encoder, text, device, progress: see fastsel.commands.metrics.measure.
        notes: what was left out is added here.
    """
    from fastsel.io import open_pool

    pool = None if reference is None else open_pool(reference, progress=progress)
    given = _row_numbers(subset, pool)
    if given is not None:
        assert pool is not None
        side, name = _side(pool, encoder, text, device, progress)
        return _with_rows(side, given, str(subset), notes), side, name
    own = open_pool(_rows_file(subset), progress=progress, **({} if pool is None else pool.options))
    if pool is None:
        side, name = _side(own, encoder, text, device, progress)
        return _with_rows(side, _usable(own), str(subset), notes, len(own)), None, name
    matched = _matches(own, pool)
    if (matched >= 0).all():
        side, name = _side(pool, encoder, text, device, progress)
        return _with_rows(side, matched, str(subset), notes, len(own)), side, name
    missing = int((matched < 0).sum())
    if encoder is not None and _is_matrix(encoder):
        raise InputError(
            f"{subset}: {missing:,} of its rows are not in {reference}, so the matrix has no vector for them"
        )
    notes.append(f"{missing:,} rows of the subset are not in the reference; both were read by themselves")
    theirs, name = _side(pool, encoder, text, device, progress)
    ours, _ = _side(own, encoder, text, device, progress)
    return _with_rows(ours, _usable(own), str(subset), notes, len(own)), theirs, name


def _side(pool: "Pool", encoder: Any, text: str, device: str, progress: str) -> tuple[Side, str | None]:
    """All rows of a pool that can be measured, and the encoder's name."""
    from fastsel.features.row_texts import RowText

    row_text = RowText(text)

    def texts(rows: Rows) -> list[str]:
        return [row_text(example) for example in pool.examples(rows)]

    if encoder is None:
        return Side(_usable(pool), texts, None), None
    from fastsel.features.embeddings import embed_pool

    found = embed_pool(pool, encoder, text=text, device=device, progress=progress)

    def vectors(rows: Rows) -> NDArray[np.float32]:
        # All of them: the matrix as it is, which may be mapped from a file.
        return found.matrix if rows is found.rows else found.matrix[np.searchsorted(found.rows, rows)]

    model = found.provenance.get("model", {})
    return Side(found.rows, texts, vectors), str(model.get("name", encoder) if isinstance(model, dict) else model)


def _with_rows(side: Side, rows: Rows, name: str, notes: list[str], of: int | None = None) -> Side:
    """The side with these of its rows; what has no vector or text is left out, and said."""
    kept = rows[np.isin(rows, side.rows)]
    left_out = (len(rows) if of is None else of) - len(kept)
    if left_out:
        notes.append(f"{left_out:,} rows of {name} cannot be used and are left out")
    return Side(kept, side.texts, side.vectors)


def _usable(pool: "Pool") -> Rows:
    return np.flatnonzero(np.asarray(pool.status) == 0)


def _row_numbers(subset: str | Path, pool: "Pool | None") -> Rows | None:
    """Row numbers of the reference that the subset stands for, or None when it is a file of rows."""
    path = Path(subset)
    if path.is_dir() and pool is not None and (path / "indices.npy").exists():
        manifest = path / "manifest.json"
        recorded = json.loads(manifest.read_text())["pool"]["fingerprint"] if manifest.exists() else None
        if recorded != pool.fingerprint:
            return None  # chosen from another pool: its rows speak for themselves
        path = path / "indices.npy"
    if path.suffix != ".npy":
        return None
    if pool is None:
        raise UsageError(f"{subset} holds row numbers: name the pool that they count with --reference POOL")
    try:
        rows = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {error}") from None
    if rows.ndim != 1 or rows.dtype.kind not in "iu" or (rows.size and not 0 <= rows.min() <= rows.max() < len(pool)):
        raise InputError(f"{path} must hold row numbers from 0 to {len(pool) - 1:,}, as indices.npy of a run does")
    return np.asarray(rows, dtype=np.int64)


def _rows_file(subset: str | Path) -> Path:
    path = Path(subset)
    if not path.is_dir():
        return path
    for name in ("selected.jsonl", "selected.parquet"):
        if (path / name).exists():
            return path / name
    raise InputError(f"{path} holds no selected.jsonl or selected.parquet: it is not the folder of a finished run")


def _matches(own: "Pool", pool: "Pool") -> Rows:
    """The reference's row with the same content for each usable row of the subset, -1 where there is none."""
    usable = _usable(pool)
    hashes = np.ascontiguousarray(pool.content_hash[usable]).tobytes()
    # From the last to the first, so that the first of equal rows stays.
    first = {hashes[i * HASH_BYTES : (i + 1) * HASH_BYTES]: usable[i] for i in range(len(usable) - 1, -1, -1)}
    return np.array([first.get(own.content_hash[row].tobytes(), -1) for row in _usable(own)], dtype=np.int64)


def _is_matrix(encoder: Any) -> bool:
    return not isinstance(encoder, (str, Path)) or Path(encoder).suffix == ".npy"
