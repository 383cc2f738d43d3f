"""How well the rows chosen so far cover the points: the state that every optimizer of facility location works on.

    f(A) = sum_v weights[v] max(floor, max over a in A of s(a, v)) - (the same of the empty set)

Float32 gains of all candidates come from the facility_location kernel; float64 ones of a few from similarities_above.
"""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from fastsel.kernels.facility_location import (
    PackedCandidates,
    Shortlists,
    facility_location,
    pack_candidates,
    similarities_above,
)
from fastsel.selectors.kept_rows import KeptRows
from fastsel.selectors.rows import BLOCK_ROWS, Rows

DEVICE_BLOCK_ROWS = 1 << 16  # of rows made on a GPU at a time
CACHE_BYTES = 16 << 20  # of similarities kept: a contender of one pick is often one of the next
PAIR_BYTES = 12
LIST_BYTES = 12 << 20  # of shortlists, at least


class Coverage:
    """Points, their best similarity so far, and what candidates would add to it.

    Attributes:
        n, m: numbers of candidates and points.
        best: float64 [m] on the CPU; -inf while is_empty.
        kept: similarities of contenders in float64.
        is_empty: whether there is neither a pick nor a floor.
        columns: points passed to all candidates so far, and m / n for each row fetched: `columns / m` is the number of
            passes over all pairs (a pass whose other half follows by symmetry counts half).
        fetched: rows whose similarities were made in float64, to the points that they may improve.
        rounded_to: what gains come from rows rounded to, to be faster where the processor can: "bytes" (three times),
            "bfloat16" on a GPU (six times); None where from float32.
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
        self._weights = weights
        start = -torch.inf if floor is None else floor
        self.best = torch.full((self.m,), start, dtype=torch.float64)
        self.is_empty = floor is None
        self._lengths = torch.from_numpy(points.lengths).to(self.device) if points.unit else None
        # Squared distances are differences of squared lengths in float32: the nearer to the origin, the more exact.
        self._centre = self._mean() if self._similarity != "dot" else None
        self._centred: dict[Rows, torch.Tensor] = {}
        self._is_streamed = candidates.is_mapped or points.is_mapped
        self._packed: torch.Tensor | PackedCandidates | None = None
        self._halves: dict[Rows, torch.Tensor] = {}
        self.rounded_to: str | None = None
        if self._similarity == "dot" and not self._is_streamed:
            on_a_gpu = self.device.type == "cuda" and implementation in ("auto", "triton")
            self.rounded_to = "bfloat16" if on_a_gpu else "bytes"
        self._packed_points: PackedCandidates | None = None
        self._shortlists: Shortlists | None = None
        self.kept = KeptRows(self.n, max(32 * self.m, CACHE_BYTES // PAIR_BYTES))
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

    def lose(
        self, gains: NDArray[np.float64], moved: torch.Tensor, before: torch.Tensor, after: torch.Tensor
    ) -> NDArray[np.float64]:
        """Gains after the best of these points (numbers, rising) rose; before and after are float32 [len(moved)].

        Points with shortlists cost next to nothing; the others are passed to all candidates, and get one.
        """
        lists = self._lists()
        if lists is None:
            self.columns += len(moved)
            return gains - self._sums(moved, before, after)
        left = torch.from_numpy(gains.copy())
        is_listed = lists.sizes[moved] >= 0
        if is_listed.any():
            lists.take(left, moved[is_listed], before[is_listed], after[is_listed])
        others = moved[~is_listed]
        self.columns += len(others)
        was, now = before[~is_listed], after[~is_listed]
        for start in range(0, len(others), BLOCK_ROWS):  # a copy of half of all rows would be as large as the rows
            part = slice(start, start + BLOCK_ROWS)
            left -= lists.note(self._float32(self.points, others[part]), others[part], was[part], now[part])
        return left.numpy()

    def passed_by(self, moved: torch.Tensor) -> int:
        """How many of these points have to be passed to all candidates when they move."""
        return len(moved) if self._shortlists is None else int((self._shortlists.sizes[moved] < 0).sum())

    def _lists(self) -> Shortlists | None:
        """Shortlists, where the compiled code has packed the candidates."""
        if self._shortlists is None and isinstance(self._packed, PackedCandidates):
            weights = None if self._weights is None else torch.from_numpy(self._weights).float()
            self._shortlists = Shortlists(
                self._packed, self.m, weights=weights,
                similarity=self._similarity, gamma=self._gamma,
                most_bytes=max(LIST_BYTES, 2 * self.n * self.candidates.d),
            )  # fmt: skip
        return self._shortlists

    def leave_rounding(self) -> None:
        """From now on gains come from float32 rows; they have to be made from scratch."""
        self.rounded_to, self._packed, self._packed_points, self._shortlists = None, None, None, None
        self._halves.clear()

    def fetch(self, rows: NDArray[np.int64], least_wanted: NDArray[np.int64]) -> None:
        """Make float64 similarities of these candidates to the points that they may improve, and keep them.

        Args:
            rows: candidates that are not kept; at most `room`.
            least_wanted: kept candidates that may go where room is short, the first ones first.
        """
        pairs = similarities_above(
            self.candidates.exact(rows), self.points.given, self.best, packed=self._screen(), lengths=self._lengths,
            similarity=self._similarity, gamma=self._gamma,
        )  # fmt: skip
        self.kept.keep(rows, pairs, least_wanted)
        self.fetched += len(rows)
        self.columns += len(rows) * self.m / max(1, self.n)

    @property
    def room(self) -> int:
        """How many rows can be fetched at a time."""
        return max(1, self.kept.capacity // (2 * max(1, self.m)))

    def error_units(self) -> NDArray[np.float64] | float:
        """What errors of gains are proportional to: the candidates' lengths where they differ, else 1."""
        lengths = self.candidates.lengths
        if self._similarity != "dot" or self.candidates.unit or not lengths.any():
            return 1.0
        return np.where(lengths > 0, lengths, lengths.max())

    def worst_error(self) -> float:
        """Most that a gain from the kernel may err, per length of its candidate.

        A float32 product errs by at most (d + 2) 2^-24 |x| |q|. In bytes each number is off by at most half a step of
        1 / 127 of the row's largest: x by at most sqrt(d) / 254 of its length, and q too. In bfloat16 each is off by at
        most 2^-9 of itself, after a rounding to float32.
        """
        d = self.candidates.d
        step = {"bytes": d**0.5 / 254, "bfloat16": 2.0**-9 + 2.0**-23, None: 0.0}[self.rounded_to]
        relative = (d + 2) * 2.0**-24 + ((1 + step) ** 2 - 1)
        lengths = np.ones(self.m) if self.points.unit else self.points.lengths
        return float(relative * (lengths if self._weights is None else lengths * self._weights).sum())

    def exact_gains(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """What these candidates, which are kept, would add now: float64, the same bits for any thread count."""
        return self.kept.gains(rows, self.best.numpy(), self._weights)

    def add(self, row: int) -> None:
        """Take a candidate that is kept among the chosen."""
        points, similarities = self.kept.pairs_of(row)
        best = self.best.numpy()
        best[points] = np.maximum(best[points], similarities)
        self.is_empty = False

    def _sums(self, moved: torch.Tensor | None, best: torch.Tensor, raised: torch.Tensor | None) -> NDArray[np.float64]:
        """The kernel's sums over all points, or over those given by number; best and raised belong to them."""
        total = torch.zeros(self.n, dtype=torch.float64, device=self.device)
        weights = None if self._weights is None else torch.from_numpy(self._weights)
        if weights is not None and moved is not None:
            weights = weights[moved]
        best = best.float().to(self.device)
        raised, weights = (None if x is None else x.float().to(self.device) for x in (raised, weights))
        count = self.m if moved is None else len(moved)
        step = BLOCK_ROWS if self._is_streamed else max(1, count)
        for start in range(0, count, step):
            over = slice(start, min(count, start + step))
            points = self._as_passed(over if moved is None else moved[over])
            for first, block in self._candidate_blocks():
                gains = facility_location(
                    block, points, best[over], raised=None if raised is None else raised[over],
                    weights=None if weights is None else weights[over],
                    similarity=self._similarity, gamma=self._gamma, implementation=self._implementation,
                )  # fmt: skip
                total[first : first + len(gains)] += gains
        return total.cpu().numpy()

    def _candidate_blocks(self) -> Iterator[tuple[int, torch.Tensor | PackedCandidates]]:
        if not self._is_streamed:
            yield 0, self._pack()
            return
        for start in range(0, self.n, BLOCK_ROWS):
            yield start, self._float32(self.candidates, slice(start, min(self.n, start + BLOCK_ROWS)))

    def _pack(self) -> torch.Tensor | PackedCandidates:
        """All candidates as the kernel takes them."""
        if self._packed is None:
            self._packed = self._packing(self.candidates)
            if self.rounded_to == "bytes" and not (
                isinstance(self._packed, PackedCandidates) and self._packed.in_bytes
            ):
                self.rounded_to = None
        return self._packed

    def _packing(self, rows: Rows) -> torch.Tensor | PackedCandidates:
        if self.rounded_to == "bfloat16":
            return self._bfloat16(rows)
        whole = self._float32(rows, slice(0, rows.n))
        can_pack = self._implementation in ("auto", "native")
        return pack_candidates(whole, in_bytes=self.rounded_to == "bytes") if can_pack else whole

    def _as_passed(self, over: slice | torch.Tensor) -> torch.Tensor:
        """Points as the kernel reads them beside candidates: of the same type."""
        if self.rounded_to != "bfloat16":
            return self._float32(self.points, over)
        return self._some(self._bfloat16(self.points), over)

    def _bfloat16(self, rows: Rows) -> torch.Tensor:
        """All rows in bfloat16, made once."""
        if rows not in self._halves:
            whole = torch.empty(rows.n, rows.d, dtype=torch.bfloat16, device=self.device)
            for start, block in rows.blocks(DEVICE_BLOCK_ROWS):
                whole[start : start + len(block)] = block
            self._halves[rows] = whole
        return self._halves[rows]

    def _screen(self) -> PackedCandidates | None:
        """The points, packed: what shows which of them a candidate cannot improve. None where that is not known."""
        if self._is_streamed or self._similarity != "dot":
            return None
        if self._packed_points is None:
            packed = self._pack() if self.points is self.candidates else self._packing(self.points)
            self._packed_points = packed if isinstance(packed, PackedCandidates) else None
        return self._packed_points

    def _float32(self, rows: Rows, over: slice | torch.Tensor) -> torch.Tensor:
        """Float32 rows as the kernel reads them; all of them at once are kept and come as the same tensor again."""
        if self._is_streamed:
            some: slice | NDArray[np.int64] = over if isinstance(over, slice) else over.numpy()
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
        return self._some(whole, over)

    def _some(self, whole: torch.Tensor, over: slice | torch.Tensor) -> torch.Tensor:
        """Rows of a matrix; all of them are the same tensor again."""
        if isinstance(over, slice):
            return whole if over == slice(0, len(whole)) else whole[over]
        return whole[over.to(self.device)]

    def _mean(self) -> torch.Tensor:
        """The points' mean row, float64 [d]."""
        total = torch.zeros(self.points.d, dtype=torch.float64, device=self.device)
        for start in range(0, self.m, BLOCK_ROWS):
            total += self.points.exact(slice(start, min(self.m, start + BLOCK_ROWS))).sum(0)
        return total / max(1, self.m)
