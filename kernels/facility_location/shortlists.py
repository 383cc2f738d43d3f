"""The few candidates that may still improve a point, so that the point need never be passed to all of them again."""

import torch

from fastsel.kernels.facility_location import cpu_native
from fastsel.kernels.facility_location.packed import PackedCandidates

NOTE_BYTES = 4 << 20  # for what a call notes, before it is sorted by point
PAIR_BYTES = 8


class Shortlists:
    """What candidates lose as the best similarities of points rise; by the compiled code, for packed candidates.

    A point with best similarity b can be improved by candidates with s > b only. These are noted, with s, when the
    point is passed; its later rises are then taken from its shortlist alone. The same numbers come out, as s is the
    same in every call.

    Attributes:
        sizes: int64 [m], how many candidates a point's shortlist has; -1 where it has none.
    """

    def __init__(
        self,
        packed: PackedCandidates,
        m: int,
        *,
        weights: torch.Tensor | None = None,
        similarity: str = "dot",
        gamma: float = 1.0,
        most_bytes: int = 24 << 20,
    ) -> None:
        """Empty lists.

        Args:
            packed, weights, similarity, gamma: as in facility_location; weights float32, of all m points.
            most_bytes: for all shortlists together; points whose list does not fit stay without.
        """
        self._packed, self._weights, self._similarity, self._gamma = packed, weights, similarity, gamma
        n = len(packed.matrix)
        self._capacity = most_bytes // PAIR_BYTES
        # Lists get half as long while the points move again: twice the average is allowed.
        self._longest = max(32, min(n // 8, 2 * self._capacity // max(1, m)))
        self._step = max(32, NOTE_BYTES // (-(-n // cpu_native.GROUP) * cpu_native.NOTED * 5) // 32 * 32)
        self._noted: cpu_native.Noted | None = None
        self.sizes = torch.full((m,), -1, dtype=torch.int64, device="cpu")
        self._starts, self._used = torch.zeros(m, dtype=torch.int64, device="cpu"), 0
        # Memory that is not written yet takes none.
        self._candidates = torch.empty(self._capacity, dtype=torch.int32, device="cpu")
        self._similarities = torch.empty(self._capacity, dtype=torch.float32, device="cpu")

    def note(
        self, points: torch.Tensor, numbers: torch.Tensor, before: torch.Tensor, after: torch.Tensor
    ) -> torch.Tensor:
        """Pass points to all candidates and make their shortlists.

        Args:
            points: [b, d] as the kernel takes them, and their numbers int64 [b].
            before, after: float32 [b], their best similarities.

        Returns:
            [n] float64, what candidates lose; see facility_location with `raised`.
        """
        n = len(self._packed.matrix)
        total = torch.zeros(n, dtype=torch.float64)
        for start in range(0, len(points), self._step):
            over = slice(start, start + self._step)
            some = numbers[over]
            weights = None if self._weights is None else self._weights[some]
            losses, self._noted = cpu_native.losses_noting(
                self._packed, points[over], before[over], after[over], weights, self._similarity, self._gamma,
                self._noted,
            )  # fmt: skip
            total += losses
            self._keep(some)
        return total

    def _keep(self, numbers: torch.Tensor) -> None:
        assert self._noted is not None
        n, m = len(self._packed.matrix), len(numbers)
        sizes = cpu_native.noted_sizes(self._noted, n, m)
        fits = (sizes >= 0) & (sizes <= self._longest)
        ends = torch.where(fits, sizes, 0).cumsum(0)
        if self._used + int(ends[-1]) > self._capacity:
            self._close_gaps()
        fits &= self._used + ends <= self._capacity
        chosen = fits.nonzero()[:, 0]
        if not len(chosen):
            return
        listed, starts = numbers[chosen], self._used + ends[chosen] - sizes[chosen]
        cpu_native.copy_noted(self._noted, n, m, chosen, starts, self._candidates, self._similarities)
        self._starts[listed], self.sizes[listed] = starts, sizes[chosen]
        self._used = int(starts[-1] + sizes[chosen[-1]])

    def _close_gaps(self) -> None:
        """Lists that became shorter leave gaps."""
        listed = (self.sizes > 0).nonzero()[:, 0]
        listed = listed[self._starts[listed].argsort()]
        cpu_native.close_gaps(listed, self._starts, self.sizes, self._candidates, self._similarities)
        self._used = int(self.sizes[listed].sum())

    def take(self, gains: torch.Tensor, numbers: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> None:
        """Subtract from gains, float64 [n], what candidates lose where the best of listed points rises.

        Args:
            numbers: int64 [b], points that have shortlists.
            before, after: float32 [b]; before is at least what `after` was when the point was noted.
        """
        cpu_native.take_losses(
            numbers, before, after, self._weights, self._starts, self.sizes, self._candidates, self._similarities, gains
        )
