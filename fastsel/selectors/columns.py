"""Similarities of every row with a few vectors, read off the matrix as it lies: nothing of its size is made."""

import numpy as np
import torch

from fastsel.selectors.rows import BLOCK_VALUES, Rows

COLUMNS = (2, 32)  # fewest and most columns fetched in one pass over the matrix
COLUMN_VALUES = 2**25  # similarities kept: 128 MB
# Lengths between which float32 products of rows as they are neither overflow nor lose bits to tiny numbers.
SAFE_LENGTHS = (2.0**-40, 2.0**40)
UNIT = 2.0**-24  # of float32 rounding
# Below this share of the rows, only the rows still of use are read.
FEW = 1 / 3


class Columns:
    """Float32 cosines of all rows with chosen rows; those that will likely be wanted come in the same pass.

    Attributes:
        error: how far a value may be from the exact one.
        n_passes: over the matrix, so far.
    """

    def __init__(self, rows: Rows) -> None:
        """Args: rows, read at unit length."""
        self.rows, self.n_passes = rows, 0
        self.error = UNIT * (8 + rows.d**0.5)
        lengths = rows.lengths[rows.lengths > 0]
        self.is_scaled = bool(((lengths > SAFE_LENGTHS[0]) & (lengths < SAFE_LENGTHS[1])).all())
        inverse = np.divide(1.0, rows.lengths, out=np.zeros(rows.n), where=rows.lengths > 0)
        self.scale = torch.from_numpy(inverse if self.is_scaled else np.ones(rows.n)).float().to(rows.device)
        self.is_whole = self.is_scaled and not rows.is_mapped and rows.given.dtype == torch.float32
        self.kept: dict[int, tuple[torch.Tensor, bool]] = {}
        self.n_hits = 1

    def products(self, vectors: torch.Tensor, among: torch.Tensor | None = None) -> torch.Tensor:
        """Float32 [c, n], cosines of rows with unit vectors [c, d]; only of rows among [m] int64, the others' are 0."""
        rows, n_rows = self.rows, self.rows.n if among is None else len(among)
        vectors = vectors.to(rows.device, torch.float32)
        out = torch.zeros(len(vectors), rows.n, dtype=torch.float32, device=rows.device)
        size = n_rows if self.is_whole and among is None else max(1, BLOCK_VALUES // rows.d)
        for start in range(0, n_rows, max(1, size)):
            part = slice(start, min(n_rows, start + size))
            if self.is_scaled:
                block = rows.given[part if among is None else among[part]].float()
            else:
                block = rows.take(part if among is None else among[part].cpu().numpy())
            # Rows times a few columns, not columns times rows: half the time on a CPU.
            found = (block @ vectors.T).T if len(vectors) > 1 else (block @ vectors[0])[None]
            index = part if among is None else among[part]
            out[:, index] = found * self.scale[index]
        self.n_passes += 1
        return out

    def of(self, row: int, likely: list[int], is_useful: torch.Tensor) -> torch.Tensor:
        """Float32 [n], cosines of the useful rows with one; foreseen, or fetched with those of likely rows.

        Args:
            row: number of the row.
            likely: numbers of rows whose columns may be wanted next, the likeliest first.
            is_useful: bool [n], rows that a value is wanted for, until forget() at least.
        """
        if row in self.kept:
            self.n_hits += 1
            return self.kept.pop(row)[0]
        # Twice as many as were of use the last time: a pass with a few columns costs little more than with one.
        room = max(1, COLUMN_VALUES // self.rows.n)
        n_columns = min(max(2 * self.n_hits, COLUMNS[0]), COLUMNS[1], room)
        wanted = [row, *(other for other in likely if other != row and other not in self.kept)][:n_columns]
        useful = int(is_useful.sum())
        among = is_useful.nonzero()[:, 0] if useful < FEW * self.rows.n else None
        fetched = self.products(self.rows.exact(wanted), among)
        self.n_hits = 1
        for old in list(self.kept)[: max(0, len(self.kept) + len(wanted) - room)]:
            del self.kept[old]
        self.kept |= {number: (column, among is None) for number, column in zip(wanted, fetched, strict=True)}
        return self.kept.pop(row)[0]

    def forget(self) -> None:
        """Drop columns that lack rows: from here on others are of use."""
        self.kept = {row: (column, is_full) for row, (column, is_full) in self.kept.items() if is_full}
