"""The forest that packed tokens form, and what each of its segments may see.

Segment s holds the packed rows starts[s] : starts[s + 1] and continues segment parents[s] (-1: it starts a
sequence). Its path is its ancestors from the root down, then itself; positions count along the path from 0.
"""

from collections.abc import Sequence
from functools import cached_property

import torch


class Segments:
    """An immutable forest of packed segments; what is derived from it is computed once and kept.

    Args:
        starts: [s + 1] offsets into the packed rows, from 0, strictly increasing (no segment is empty).
        parents: [s] index of the segment that each one continues, smaller than its own, or -1.

    Raises:
        ValueError: the offsets or parents do not describe a forest.
    """

    def __init__(self, starts: Sequence[int] | torch.Tensor, parents: Sequence[int] | torch.Tensor) -> None:
        self.start_list: list[int] = starts.tolist() if isinstance(starts, torch.Tensor) else list(starts)
        self.parent_list: list[int] = parents.tolist() if isinstance(parents, torch.Tensor) else list(parents)
        if len(self.start_list) != len(self.parent_list) + 1 or self.start_list[0] != 0:
            raise ValueError(
                f"starts must hold one offset more than there are parents, from 0; got {len(self.start_list)} offsets "
                f"for {len(self.parent_list)} parents"
            )
        for s, parent in enumerate(self.parent_list):
            if not -1 <= parent < s:
                raise ValueError(f"parents[{s}] must be -1 or a smaller index than {s}, got {parent}")
            if self.start_list[s] >= self.start_list[s + 1]:
                raise ValueError(
                    f"segment {s} is empty: starts[{s}] = {self.start_list[s]}, next {self.start_list[s + 1]}"
                )

        self._query_blocks: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __len__(self) -> int:
        return len(self.parent_list)

    @property
    def n_tokens(self) -> int:
        """Packed rows in all."""
        return self.start_list[-1]

    @cached_property
    def starts(self) -> torch.Tensor:
        """[s + 1] int64, CPU."""
        return torch.tensor(self.start_list, dtype=torch.int64, device="cpu")

    @cached_property
    def parents(self) -> torch.Tensor:
        """[s] int64, CPU."""
        return torch.tensor(self.parent_list, dtype=torch.int64, device="cpu")

    @cached_property
    def first_positions(self) -> list[int]:
        """Position of each segment's first token in its sequence: the length of its ancestors."""
        first: list[int] = []
        for parent in self.parent_list:
            first.append(0 if parent < 0 else first[parent] + self.start_list[parent + 1] - self.start_list[parent])
        return first

    @cached_property
    def first_positions_tensor(self) -> torch.Tensor:
        """[s] int64, CPU: first_positions."""
        return torch.tensor(self.first_positions, dtype=torch.int64, device="cpu")

    @cached_property
    def positions(self) -> torch.Tensor:
        """[t] int64, CPU: position of each packed row in its sequence."""
        starts = self.starts
        shift = self.first_positions_tensor - starts[:-1]
        return torch.arange(self.n_tokens, device="cpu") + shift.repeat_interleave(starts.diff())

    def path(self, segment: int) -> list[int]:
        """The segment's ancestors from the root down, and itself."""
        path = []
        while segment >= 0:
            path.append(segment)
            segment = self.parent_list[segment]
        return path[::-1]

    @cached_property
    def ancestor_ranges(self) -> list[list[tuple[int, int, int]]]:
        """Per segment: (first row, end row, position of the first row) of its ancestors' rows, root first.

        Ranges that touch are merged, so a first child in depth-first order has one.
        """
        ranges: list[list[tuple[int, int, int]]] = []
        for parent in self.parent_list:
            if parent < 0:
                ranges.append([])
                continue
            first, end = self.start_list[parent], self.start_list[parent + 1]
            mine = list(ranges[parent])
            if mine and mine[-1][1] == first:
                mine[-1] = (mine[-1][0], end, mine[-1][2])
            else:
                mine.append((first, end, self.first_positions[parent]))
            ranges.append(mine)
        return ranges

    def query_blocks(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cuts the queries into blocks of at most `size` rows that never cross a segment.

        Returns:
            (first row [b] int64, segment [b] int64), CPU, in packed order.
        """
        if size not in self._query_blocks:  # every layer of a model asks again
            counts = (self.starts.diff() + size - 1) // size
            segment = torch.arange(len(self), device="cpu").repeat_interleave(counts)
            in_segment = torch.arange(segment.numel(), device="cpu") - (counts.cumsum(0) - counts)[segment]
            self._query_blocks[size] = (self.starts[segment] + in_segment * size, segment)
        return self._query_blocks[size]
