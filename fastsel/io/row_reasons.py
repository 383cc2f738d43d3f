"""Why rows are not ok after a later stage has judged them too: one byte a row beside the pool's own reasons."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fastsel.io.examples import OK

if TYPE_CHECKING:
    from fastsel.io.pool import Pool


class RowReasons(Mapping[int, str]):
    """Row number -> why the row is not ok: what reading the pool found, and what a model or a method found after it.

    A later reason replaces an earlier one of the same row. Each names the row's place: "line 12: ...".
    """

    def __init__(self, pool: "Pool", why: npt.NDArray[np.integer], texts: Sequence[str | None]) -> None:
        """Take a stage's verdict.

        Args:
            pool: the rows, with reasons of their own.
            why: [n] positions in texts; 0 adds nothing to what the pool says.
            texts: the reasons; the first is not read.
        """
        self._pool = pool
        self._why = why.astype(np.uint8)
        self._texts = list(texts)

    def add(self, rows: npt.NDArray[np.bool_], text: str) -> None:
        """Give the rows of this mask [n] a reason."""
        if len(self._texts) > np.iinfo(np.uint8).max:
            raise ValueError("a stage has at most 255 reasons")
        self._why[rows] = len(self._texts)
        self._texts.append(text)

    def __getitem__(self, row: int) -> str:
        if not 0 <= row < len(self._why):
            raise KeyError(row)
        if self._why[row]:
            return f"{self._pool.place(row)}: {self._texts[self._why[row]]}"
        return self._pool.reasons[row]

    def __iter__(self) -> Iterator[int]:
        return iter(np.flatnonzero(self._not_ok()).tolist())

    def __len__(self) -> int:
        return int(np.count_nonzero(self._not_ok()))

    def _not_ok(self) -> npt.NDArray[np.bool_]:
        not_ok: npt.NDArray[np.bool_] = (self._why != 0) | (self._pool.status != OK)
        return not_ok
