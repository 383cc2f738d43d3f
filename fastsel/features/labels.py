"""Labels that a pool's rows already carry: tags and quality annotations, as sparse rows."""

import json
import time
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastsel.errors import InputError
from fastsel.features.embeddings import Embeddings
from fastsel.io.examples import SKIPPED, TRUNCATED
from fastsel.io.row_values import kind_of, lookup
from fastsel.progress import progress_bar

if TYPE_CHECKING:
    from fastsel.io import Pool

ROWS_AT_ONCE = 4096


@dataclass
class Labels:
    """The labelled rows of a pool.

    Attributes:
        rows: int64 [m], pool rows that may be chosen, ascending.
        indptr, indices, values: row i of m has the labels indices[indptr[i] : indptr[i + 1]], ascending, each once,
            with these weights (1, or its share of the row's tags).
        quality: float64 [m], at least 0.
        names: of the labels, in their order.
        status: uint8 [n], the pool's codes; rows without labels or quality are skipped.
        reasons: why a row is not ok.
        n_tokens: None, as nothing counts tokens here; int32 [n] where an encoder did.
        timings, notes, provenance: for the selection.
    """

    rows: NDArray[np.int64]
    indptr: NDArray[np.int64]
    indices: NDArray[np.int32]
    values: NDArray[np.float64]
    quality: NDArray[np.float64]
    names: list[str]
    status: NDArray[np.uint8]
    reasons: MutableMapping[int, str]
    n_tokens: NDArray[np.int32] | None = None
    timings: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def has_vector(self) -> NDArray[np.bool_]:
        """Bool [n]: rows that may be chosen."""
        mask = np.zeros(len(self.status), np.bool_)
        mask[self.rows] = True
        return mask

    def quality_of_pool(self) -> NDArray[np.float64]:
        """Float64 [n]: the quality by pool row, NaN where there is none."""
        quality = np.full(len(self.status), np.nan)
        quality[self.rows] = self.quality
        return quality

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Put down the seconds of what is done inside."""
        started = time.perf_counter()
        yield
        self.timings[step] = time.perf_counter() - started


def read_labels(
    pool: "Pool",
    label_column: str,
    quality_columns: Sequence[str] | None,
    *,
    valid_tags: Any = None,
    share_among_tags: bool = False,
    keep_unlabelled: bool = False,
    progress: str = "auto",
) -> Labels:
    """Read the tags and the quality of every usable row.

    Args:
        pool: the rows.
        label_column: of a list of tags (or one), dotted for nested ones.
        quality_columns: of numbers, or of one number a turn: multiplied turn by turn, then averaged over turns. None
            takes 1 for every row. A pool with a score column has its quality there, whatever stands here.
        valid_tags: the tags that count, as names or a .json file with a list of them; None takes all.
        share_among_tags: a label weighs 1 / (the row's valid tags, repetitions counted) instead of 1.
        keep_unlabelled: keep rows that have tags, but no valid one, with no label at all; otherwise they are skipped.
        progress: see progress_bar.

    Raises:
        InputError: no row has tags, or none of those has a quality; the file of valid tags cannot be read.
    """
    started = time.perf_counter()
    valid = _valid_tags(valid_tags)
    status, reasons = pool.status.copy(), dict(pool.reasons)
    usable = np.flatnonzero(status <= TRUNCATED)
    rows, tags, quality, n_tagged = [], [], [], 0
    with progress_bar(len(usable), "rows", mode=progress, description="reading labels") as bar:
        for start in range(0, len(usable), ROWS_AT_ONCE):
            block = usable[start : start + ROWS_AT_ONCE]
            for row_id, row in zip(block.tolist(), pool.rows(block), strict=True):
                try:
                    found = _tags(row, label_column)
                    n_tagged += 1
                    counted = found if valid is None else [tag for tag in found if tag in valid]
                    if not counted and not keep_unlabelled:
                        raise _UnlabelledError(f"none of its tags ({label_column}) counts")
                    value = _quality(row, quality_columns) if pool.scores is None else float(pool.scores[row_id])
                    if not 0 <= value < float("inf"):
                        raise _UnlabelledError(f"its quality is {value}, not a finite number of at least 0")
                except _UnlabelledError as unlabelled:
                    status[row_id], reasons[row_id] = SKIPPED, f"{pool.place(row_id)}: {unlabelled}"
                    continue
                rows.append(row_id)
                tags.append(counted)
                quality.append(value)
            bar.update(len(block))
    if not rows:
        what = "tags" if not n_tagged else "tags that count and a quality"
        raise InputError(f"{pool.name}: no row has {what}; the first reason: {next(iter(reasons.values()), 'no rows')}")
    names = sorted({tag for found in tags for tag in found})
    number = {name: i for i, name in enumerate(names)}
    labels = [sorted({number[tag] for tag in found}) for found in tags]
    lengths = np.array([len(found) for found in labels], np.int64)
    indices = np.fromiter((label for found in labels for label in found), np.int32, int(lengths.sum()))
    shares = 1 / np.array([max(1, len(found)) for found in tags]) if share_among_tags else np.ones(len(tags))
    return Labels(
        np.array(rows, np.int64), np.concatenate([[0], np.cumsum(lengths)]), indices, np.repeat(shares, lengths),
        np.array(quality, np.float64), names, status, reasons, timings={"labels": time.perf_counter() - started},
    )  # fmt: skip


def one_label_a_row(pool: "Pool", embeddings: Embeddings, labels: NDArray[np.int64]) -> Labels:
    """Labels from the cluster of each embedded row.

    Args:
        pool: the rows; its score column, if there is one, is the quality (rows below 0 are skipped), else it is 1.
        embeddings: of the pool.
        labels: int64 [m], the cluster of each embedded row.
    """
    rows, status, reasons = embeddings.rows, embeddings.status.copy(), dict(embeddings.reasons)
    quality = np.ones(len(rows)) if pool.scores is None else pool.scores[rows]
    is_usable = quality >= 0
    for row, value in zip(rows[~is_usable].tolist(), quality[~is_usable].tolist(), strict=True):
        reason = f"its quality is {value}, not a finite number of at least 0"
        status[row], reasons[row] = SKIPPED, f"{pool.place(row)}: {reason}"
    rows, labels, quality = rows[is_usable], labels[is_usable], quality[is_usable]
    names = [f"cluster {number}" for number in range(int(labels.max(initial=-1)) + 1)]
    return Labels(
        rows, np.arange(len(rows) + 1), labels.astype(np.int32), np.ones(len(rows)), quality, names, status, reasons,
        embeddings.n_tokens, dict(embeddings.timings), list(embeddings.notes), dict(embeddings.provenance),
    )  # fmt: skip


def carries(pool: "Pool", column: str) -> bool:
    """Whether any usable row has something in this column."""
    usable = np.flatnonzero(pool.status <= TRUNCATED)
    for start in range(0, len(usable), ROWS_AT_ONCE):
        if any(lookup(row, column) is not None for row in pool.rows(usable[start : start + ROWS_AT_ONCE])):
            return True
    return False


class _UnlabelledError(Exception):
    """Why a row has no place among the labelled ones."""


def _valid_tags(valid_tags: Any) -> frozenset[str] | None:
    if valid_tags is None:
        return None
    names = valid_tags
    if isinstance(valid_tags, (str, Path)):
        try:
            names = json.loads(Path(valid_tags).read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"the valid tags {valid_tags} cannot be read: {error}") from error
    if isinstance(names, (str, Mapping)) or not all(isinstance(name, str) for name in names):
        raise InputError("valid tags must be a list of texts")
    return frozenset(names)


def _tags(row: Any, column: str) -> list[str]:
    value = lookup(row, column)
    if value is None:
        raise _UnlabelledError(f"there are no tags in {column}")
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, (list, tuple)) or not all(isinstance(tag, str) for tag in found):
        raise _UnlabelledError(f"the tags in {column} are {kind_of(value)}, not a list of texts")
    return list(found)


def _quality(row: Any, columns: Sequence[str] | None) -> float:
    """The mean over turns of the product of the columns."""
    turns = np.ones(1)
    for column in columns or ():
        value = lookup(row, column)
        if value is None:
            raise _UnlabelledError(f"there is no quality in {column}")
        numbers = value if isinstance(value, (list, tuple)) else [value]
        if not numbers or not all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in numbers):
            raise _UnlabelledError(f"the quality in {column} is {kind_of(value)}, not a number or one for each turn")
        if len(turns) > 1 and len(numbers) > 1 and len(numbers) != len(turns):
            raise _UnlabelledError(f"the quality in {column} has {len(numbers)} turns, not {len(turns)}")
        turns = turns * np.asarray(numbers, np.float64)
    return float(sum(turns.tolist()) / len(turns))
