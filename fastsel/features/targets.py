"""What a selection should serve: the rows of a target file, in subtasks."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from fastsel.errors import InputError, UsageError
from fastsel.io.examples import OK, Example
from fastsel.io.row_values import label_of, lookup

if TYPE_CHECKING:
    from fastsel.io import Pool


@dataclass(frozen=True)
class Target:
    """The usable rows of one target.

    Attributes:
        name: of its file, for messages.
        pool: the file, opened as a pool is.
        rows: int64 [m], the rows that count, ascending.
        subtask: int64 [m], position in subtasks of each.
        subtasks: their names, in the order of the file; one, named as the target, where no column was given.
        left_out: row -> why it does not count.
        lost: subtasks of the file that have no row that counts.
    """

    name: str
    pool: "Pool"
    rows: NDArray[np.int64]
    subtask: NDArray[np.int64]
    subtasks: tuple[str, ...]
    left_out: dict[int, str] = field(default_factory=dict)
    lost: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def fingerprint(self) -> str:
        """32 hex digits over the rows that count and their subtasks."""
        digest = xxhash.xxh3_128(json.dumps(self.subtasks).encode())
        digest.update(np.ascontiguousarray(self.pool.content_hash[self.rows]).tobytes())
        digest.update(self.subtask.tobytes())
        return digest.hexdigest()

    @property
    def note(self) -> str:
        """One line for the user: how many rows, in which subtasks, and what cannot be used."""
        line = f"target {self.name}: {len(self):,} rows"
        if len(self.subtasks) > 1:
            sizes = np.bincount(self.subtask, minlength=len(self.subtasks))
            line += f" in {len(self.subtasks)} subtasks of {sizes.min():,} to {sizes.max():,}"
        if self.left_out:
            row, reason = next(iter(self.left_out.items()))
            line += f"; {len(self.left_out):,} cannot be used (row {row}: {reason})"
        if self.lost:
            line += f"; no usable row of the subtasks {', '.join(self.lost[:5])}{', ...' if len(self.lost) > 5 else ''}"
        return line

    @property
    def record(self) -> dict[str, Any]:
        """What the manifest keeps: files, rows that count by subtask, how many were left out."""
        sizes = np.bincount(self.subtask, minlength=len(self.subtasks)).tolist()
        return {
            "name": self.name,
            "inputs": [{"path": str(i.path), "rows": i.rows, "sha256": i.sha256} for i in self.pool.inputs],
            "rows": len(self),
            "subtasks": dict(zip(self.subtasks, sizes, strict=True)),
            "left_out": len(self.left_out),
            "lost": list(self.lost),
        }

    def examples(self) -> list[Example]:
        """The rows that count, in order."""
        return self.pool.examples(self.rows)

    def without(self, dropped: Mapping[int, str]) -> "Target":
        """The target less some of its rows, which go to left_out; subtasks that become empty go too.

        Raises:
            InputError: none is left.
        """
        kept = ~np.isin(self.rows, list(dropped))
        if not kept.any():
            raise InputError(f"target {self.name} has no row that can be used: {next(iter(dropped.values()), 'none')}")
        alive, subtask = np.unique(self.subtask[kept], return_inverse=True)
        return replace(
            self,
            rows=self.rows[kept],
            subtask=subtask.astype(np.int64),
            subtasks=tuple(self.subtasks[i] for i in alive),
            left_out={**self.left_out, **dropped},
            lost=(*self.lost, *(name for i, name in enumerate(self.subtasks) if i not in alive)),
        )


def open_targets(target: Any, *, subtask_column: str | None = None) -> list[Target]:
    """Open the target of a selection, or several.

    Args:
        target: whatever open_pool takes, for one target; a list of paths or pools, or a mapping from names to such, for
            several.
        subtask_column: a column, dotted for nested ones, whose values name the subtask of a row; None makes a target
            one subtask. A row without a value there is left out.

    Raises:
        UsageError: none is named.
        InputError: a target cannot be read, has no usable row, or no row has the column; two have one name.
    """
    if target is None:
        raise UsageError("which target? --target (target=) names a file of rows that the model should learn to do")
    targets = [_open(name, source, subtask_column) for name, source in _named(target)]
    names = [one.name for one in targets]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two targets are called {name}: give a mapping from names to files")
    if not targets:
        raise InputError("no target was named: give a file with examples of what the model should learn")
    return targets


def _named(target: Any) -> Iterator[tuple[str | None, Any]]:
    if isinstance(target, Mapping):
        yield from ((str(name), source) for name, source in target.items())
    elif isinstance(target, (list, tuple)) and not any(isinstance(source, Mapping) for source in target):
        yield from ((None, source) for source in target)
    else:
        yield None, target


def _open(name: str | None, source: Any, column: str | None) -> Target:
    from fastsel.io import open_pool

    pool = open_pool(source)
    name = name or (Path(pool.name).stem if isinstance(source, (str, Path)) else pool.name)
    left_out = dict(pool.reasons.items())
    rows = np.flatnonzero(pool.status == OK)
    if column is None:
        subtasks: tuple[str, ...] = (name,)
        subtask = np.zeros(len(rows), np.int64)
    else:
        labels = [label_of(lookup(row, column)) if isinstance(row, Mapping) else None for row in pool.rows(rows)]
        if not any(labels):
            raise InputError(
                f"target {name}: no row has a value in the column {column}; the first has: {_keys(pool, rows)}"
            )
        without = f"there is no subtask in {column}"
        left_out |= {int(row): without for row, label in zip(rows, labels, strict=True) if not label}
        rows = rows[[bool(label) for label in labels]]
        subtasks = tuple(dict.fromkeys(label for label in labels if label))
        subtask = np.array([subtasks.index(label) for label in labels if label], np.int64)
    if not len(rows):
        reason = next(iter(left_out.values()), "it is empty")
        raise InputError(f"target {name} has no row that can be used: {reason}")
    return Target(name, pool, rows, subtask, subtasks, left_out)


def _keys(pool: "Pool", rows: Sequence[int] | NDArray[np.int64]) -> str:
    first = pool.rows(rows[:1])
    return ", ".join(map(str, first[0])) if first and isinstance(first[0], Mapping) else "no columns"
