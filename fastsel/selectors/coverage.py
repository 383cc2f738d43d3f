"""How well the rows chosen so far cover the points: the state that every optimizer of facility location works on.

    f(A) = sum_v weights[v] max(floor, max over a in A of s(a, v)) - (the same of the empty set)

Float32 gains of all candidates come from the facility_location kernel; float64 ones of a few rows from similarity_rows.
"""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from fastsel.kernels.facility_location import PackedCandidates, facility_location, pack_candidates, similarity_rows
from fastsel.selectors.rows import BLOCK_ROWS, Rows

CACHE_BYTES = 16 << 20  # of similarity rows kept: a contender of one pick is often one of the next


class Coverage:
    """Points, their best similarity so far, and what candidates would add to it.

    Attributes:
        n, m: numbers of candidates and points.
        best: float64 [m] on the points' device; -inf while is_empty.
        is_empty: whether there is neither a pick nor a floor.
        columns: points passed to all candidates so far, and m / n for each row fetched: `columns / m` is the number of
            passes over all pairs (a pass whose other half follows by symmetry counts half).
        fetched: similarity rows made in float64.
        in_bytes: whether gains come from rows rounded to bytes, three times as fast (where the processor can).
    """

    def __init__(
        self,
        candidates: Rows,
        points: Rows,
        weights: NDArray[np.float64] | None,
        similarity: str,
        gamma: float,
        floor: float | None,
        implementation: str = "auto",
    ) -> None:
        self.candidates, self.points = candidates, points
        self.n, self.m, self.device = candidates.n, points.n, points.device
        self._similarity, self._gamma = ("dot" if similarity == "cosine" else similarity), gamma
        self._implementation = implementation
        self._weights = None if weights is None else torch.from_numpy(weights).to(self.device)
        start = -torch.inf if floor is None else floor
        self.best = torch.full((self.m,), start, dtype=torch.float64, device=self.device)
        self.is_empty = floor is None
        self._lengths = torch.from_numpy(points.lengths).to(self.device) if points.unit else None
        # Squared distances are differences of squared lengths in float32: the nearer to the origin, the more exact.
        self._centre = self._mean() if self._similarity != "dot" else None
        self._centred: dict[Rows, torch.Tensor] = {}
        self._is_streamed = candidates.is_mapped or points.is_mapped
        self._packed: torch.Tensor | PackedCandidates | None = None
        self.in_bytes = self._similarity == "dot" and not self._is_streamed
        slots = min(self.n, max(32, CACHE_BYTES // (8 * max(1, self.m))))
        self._kept = torch.zeros(slots, self.m, dtype=torch.float64, device=self.device)
        self._row_in_slot = np.full(slots, -1)
        self._slot_of: dict[int, int] = {}
        self.columns, self.fetched = 0.0, 0

    @property
    def is_symmetric(self) -> bool:
        """Whether a pass from scratch costs half: points are the candidates, and the compiled code has packed them."""
        return self.candidates is self.points and isinstance(self._packed, PackedCandidates)

    def gains(self) -> NDArray[np.float64]:
        """What each candidate would add, [n], from float32 similarities: one pass, half of it by symmetry."""
        gains = self._sums(None, self.best.float(), None)
        self.columns += self.m / 2 if self.is_symmetric else self.m
        return gains

    def losses(self, moved: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> NDArray[np.float64]:
        """By how much each candidate's gain fell when the best of these points (numbers) rose; float32 [len(moved)]."""
        self.columns += len(moved)
        return self._sums(moved, before, after)

    def leave_bytes(self) -> None:
        """From now on gains come from float32 rows; they have to be made from scratch."""
        self.in_bytes, self._packed = False, None

    def fetch(self, rows: NDArray[np.int64], least_wanted: NDArray[np.int64]) -> None:
        """Make the float64 similarity rows of these candidates and keep them, in place of the least wanted ones.

        Args:
            rows: candidates whose rows are not kept; at most half of what there is room for.
            least_wanted: kept candidates that may go, the first ones first.
        """
        made = similarity_rows(
            self.candidates.exact(rows), self.points.given, lengths=self._lengths, similarity=self._similarity,
            gamma=self._gamma,
        )  # fmt: skip
        free = np.flatnonzero(self._row_in_slot < 0)[: len(rows)].tolist()
        for row in least_wanted[: len(rows) - len(free)].tolist():
            free.append(self._slot_of.pop(row))
        for i, (row, slot) in enumerate(zip(rows.tolist(), free, strict=True)):
            self._kept[slot], self._row_in_slot[slot], self._slot_of[row] = made[i], row, slot
        self.fetched += len(rows)
        self.columns += len(rows) * self.m / max(1, self.n)

    @property
    def kept(self) -> NDArray[np.int64]:
        """The candidates whose similarity rows are kept."""
        return self._row_in_slot[self._row_in_slot >= 0].astype(np.int64)

    @property
    def room(self) -> int:
        """How many similarity rows can be kept."""
        return len(self._row_in_slot)

    def row(self, candidate: int) -> torch.Tensor:
        """Float64 [m]: the kept similarities of a candidate to all points."""
        return self._kept[self._slot_of[candidate]]

    def exact_gains(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """What these candidates, whose rows are kept, would add now: float64, the same bits for any thread count."""
        return np.array([self.gain_of(self.row(row)) for row in rows.tolist()])

    def gain_of(self, similarities: torch.Tensor) -> float:
        """What a row with these similarities [m] would add."""
        terms = similarities.clone() if self.is_empty else (similarities - self.best).clamp_(min=0)
        if self._weights is not None:
            terms *= self._weights
        # numpy adds pairwise on one thread; torch splits a long sum by the number of threads.
        return float(terms.numpy().sum()) if terms.device.type == "cpu" else float(terms.sum())

    def add(self, similarities: torch.Tensor) -> None:
        """Take a row with these similarities [m] among the chosen."""
        self.best, self.is_empty = torch.maximum(self.best, similarities), False

    def _sums(self, moved: torch.Tensor | None, best: torch.Tensor, raised: torch.Tensor | None) -> NDArray[np.float64]:
        """The kernel's sums over all points, or over those given by number; best and raised belong to them."""
        total = torch.zeros(self.n, dtype=torch.float64, device=self.device)
        count = self.m if moved is None else len(moved)
        step = BLOCK_ROWS if self._is_streamed else max(1, count)
        for start in range(0, count, step):
            over = slice(start, min(count, start + step))
            points = self._float32(self.points, over if moved is None else moved[over])
            weights = self._weights
            if weights is not None:
                weights = (weights if moved is None else weights[moved])[over].float()
            for first, block in self._candidate_blocks():
                gains = facility_location(
                    block, points, best[over], raised=None if raised is None else raised[over], weights=weights,
                    similarity=self._similarity, gamma=self._gamma, implementation=self._implementation,
                )  # fmt: skip
                total[first : first + len(gains)] += gains
        return total.cpu().numpy()

    def _candidate_blocks(self) -> Iterator[tuple[int, torch.Tensor | PackedCandidates]]:
        if not self._is_streamed:
            if self._packed is None:
                whole = self._float32(self.candidates, slice(0, self.n))
                can_pack = self._implementation in ("auto", "native")
                self._packed = pack_candidates(whole, in_bytes=self.in_bytes) if can_pack else whole
                self.in_bytes = isinstance(self._packed, PackedCandidates) and self._packed.in_bytes
            yield 0, self._packed
            return
        for start in range(0, self.n, BLOCK_ROWS):
            yield start, self._float32(self.candidates, slice(start, min(self.n, start + BLOCK_ROWS)))

    def _float32(self, rows: Rows, over: slice | torch.Tensor) -> torch.Tensor:
        """Float32 rows as the kernel reads them; all of them at once are kept and come as the same tensor again."""
        if self._is_streamed:
            some: slice | NDArray[np.int64] = over if isinstance(over, slice) else over.cpu().numpy()
            return rows.take(some) if self._centre is None else (rows.exact(some) - self._centre).float()
        if self._centre is None:
            whole = rows.whole()
        elif rows in self._centred:
            whole = self._centred[rows]
        else:
            whole = torch.empty(rows.n, rows.d, dtype=torch.float32, device=self.device)
            for start in range(0, rows.n, BLOCK_ROWS):
                block = slice(start, min(rows.n, start + BLOCK_ROWS))
                whole[block] = (rows.exact(block) - self._centre).float()
            self._centred[rows] = whole
        return whole if isinstance(over, slice) and over == slice(0, rows.n) else whole[over]

    def _mean(self) -> torch.Tensor:
        """The points' mean row, float64 [d]."""
        total = torch.zeros(self.points.d, dtype=torch.float64, device=self.device)
        for start in range(0, self.m, BLOCK_ROWS):
            total += self.points.exact(slice(start, min(self.m, start + BLOCK_ROWS))).sum(0)
        return total / max(1, self.m)
