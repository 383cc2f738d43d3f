"""Squared distances in float64: what decides between rows that float32 cannot tell apart."""

import numpy as np
import torch
from numpy.typing import NDArray

from fastsel.selectors.rows import Rows

CHOSEN_AT_A_TIME = 4096  # 4,096 x 384 float64 is 13 MB
_PAIRS_AT_A_TIME = 8192


class ExactDistances:
    """Squared Euclidean distances between rows of a matrix, in float64.

    Of unit rows half of a square is the cosine distance; a row of zeros is then as far as an orthogonal one, 2.

    Attributes:
        margin: most that squares() may err, which expands |a|^2 + |b|^2 - 2 ab; direct() errs by rounding only.
        scale: the largest square that the lengths of the rows allow.
    """

    def __init__(self, x: Rows) -> None:
        self._x = x
        longest = 1.0 if x.unit else float(x.lengths.max(initial=0.0))
        self.scale = 4.0 * longest**2
        self.margin = self.scale * 2.0**-53 * (8.0 * x.d**0.5 + 16.0)

    def squares(self, a: NDArray[np.int64], b: NDArray[np.int64]) -> torch.Tensor:
        """Float64 [len(a), len(b)], at least 0, within `margin`."""
        a_ad, b_bd = self._x.exact(a), self._x.exact(b)
        a_norms, b_norms = (self._sqnorms(values) for values in (a_ad, b_bd))
        return torch.addmm(a_norms[:, None] + b_norms[None, :], a_ad, b_bd.T, alpha=-2).clamp_(min=0)

    def distances(self, a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.float64]:
        """Float64 [len(a), len(b)], Euclidean and not squared; small ones from the difference of the rows."""
        squares = self.squares(a, b)
        at, which = (places.cpu().numpy() for places in (squares < 1e-6 * self.scale).nonzero(as_tuple=True))
        found = squares.cpu().numpy()
        found[at, which] = self.direct(a[at], b[which])
        distances: NDArray[np.float64] = np.sqrt(found)
        return distances

    def direct(self, a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.float64]:
        """Float64 [m]: the square for each pair a[i], b[i], from the difference of the rows; 0 for equal rows."""
        found = np.empty(len(a))
        for start in range(0, len(a), _PAIRS_AT_A_TIME):
            pairs = slice(start, start + _PAIRS_AT_A_TIME)
            a_md, b_md = self._x.exact(a[pairs]), self._x.exact(b[pairs])
            square = (a_md - b_md).square_().sum(1)
            if self._x.unit:
                square = torch.where((a_md == 0).all(1) | (b_md == 0).all(1), 2.0, square)
            found[pairs] = square.cpu().numpy()
        return found

    def nearest(self, rows: NDArray[np.int64], chosen: NDArray[np.int64]) -> NDArray[np.float64]:
        """Float64 [len(rows)]: the least square to any chosen row, within `margin`."""
        least = np.full(len(rows), np.inf)
        for start in range(0, len(chosen), CHOSEN_AT_A_TIME):
            squares = self.squares(rows, chosen[start : start + CHOSEN_AT_A_TIME])
            np.minimum(least, squares.amin(1).cpu().numpy(), out=least)
        return least

    def nearest_direct(self, rows: NDArray[np.int64], chosen: NDArray[np.int64]) -> NDArray[np.float64]:
        """Float64 [len(rows)]: the same by direct(), for every chosen row that could be the nearest."""
        squares = torch.cat(
            [
                self.squares(rows, chosen[start : start + CHOSEN_AT_A_TIME])
                for start in range(0, len(chosen), CHOSEN_AT_A_TIME)
            ],
            dim=1,
        )
        could_be = squares <= squares.amin(1, keepdim=True) + 2 * self.margin
        at, which = (places.cpu().numpy() for places in could_be.nonzero(as_tuple=True))
        least = np.full(len(rows), np.inf)
        np.minimum.at(least, at, self.direct(rows[at], chosen[which]))
        return least

    def _sqnorms(self, values: torch.Tensor) -> torch.Tensor:
        norms = values.square().sum(1)
        return torch.where(norms == 0, 1.0, norms) if self._x.unit else norms
