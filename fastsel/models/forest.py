"""Sequences of tokens packed into one row, in which common beginnings are held once."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from fastsel.kernels.tree_attention import Segments

# Each child of a shared parent reads a second stretch of keys. On a CPU one token saved pays for that; the tiles of a
# GPU are coarser. Three are short enough for "### Response:".
MIN_SHARED_TOKENS = 3


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """Sequences packed into one row of tokens.

    Attributes:
        token_ids: [t] int64.
        segments: the forest over the t rows.
        last_segments: per sequence, the segment that it ends with; its path holds the whole sequence.
    """

    token_ids: torch.Tensor
    segments: Segments
    last_segments: list[int]

    @property
    def position_ids(self) -> torch.Tensor:
        """[t] int64: position of each packed token in its sequence."""
        return self.segments.positions

    def rows(self, sequence_index: int, start: int, stop: int) -> torch.Tensor:
        """Packed rows, int64 [stop - start], of the tokens start:stop of a sequence.

        Raises:
            IndexError: the sequence has no such tokens.
        """
        starts, firsts = self.segments.start_list, self.segments.first_positions
        pieces = []
        for s in self.segments.path(self.last_segments[sequence_index]):
            shift, length = starts[s] - firsts[s], starts[s + 1] - starts[s]
            low, high = max(start, firsts[s]), min(stop, firsts[s] + length)
            if low < high:
                pieces.append(np.arange(low + shift, high + shift))
        rows = np.concatenate(pieces) if pieces else np.empty(0, np.int64)
        if start < 0 or len(rows) != max(0, stop - start):
            raise IndexError(f"sequence {sequence_index} has no tokens {start}:{stop}")
        return torch.from_numpy(rows)

    @cached_property
    def sequence_of_segment(self) -> list[int]:
        """Per segment, the first sequence whose path goes through it."""
        owner = [-1] * len(self.segments)
        for sequence, last in reversed(list(enumerate(self.last_segments))):
            for s in self.segments.path(last):
                owner[s] = sequence
        return owner

    def sequence(self, index: int) -> torch.Tensor:
        """The tokens of a sequence, int64."""
        starts = self.segments.start_list
        path = self.segments.path(self.last_segments[index])
        return torch.cat([self.token_ids[starts[s] : starts[s + 1]] for s in path])


def pack(sequences: Sequence[Sequence[int]], *, share_prefixes: bool = True) -> PackedBatch:
    """Pack token sequences into one row, in which common beginnings (a prompt template) are held once.

    Args:
        sequences: token ids of each, at least one.
        share_prefixes: build the forest; otherwise each sequence is a segment of its own.

    Returns:
        PackedBatch; the same sequences give the same one. Sequences keep their order when nothing is shared, else
        they lie in the order of their tokens, prefixes before what continues them.

    Raises:
        ValueError: a sequence is empty.

    Cost: O(tokens + sequences log sequences) comparisons.
    """
    for index, sequence in enumerate(sequences):
        if len(sequence) == 0:
            raise ValueError(f"sequence {index} is empty")
    forest = _Forest([], [0], [], [-1] * len(sequences))
    if not share_prefixes:
        for index, sequence in enumerate(sequences):
            forest.last_segments[index] = forest.add(sequence, -1)
    else:
        _plant(forest, [list(sequence) for sequence in sequences])
    return PackedBatch(
        torch.tensor(forest.token_ids, dtype=torch.int64), Segments(forest.starts, forest.parents), forest.last_segments
    )


def filled_up(batch: PackedBatch, multiple: int) -> PackedBatch:
    """The batch with tokens that nobody reads at its end, so that their number is a multiple; rows stay where they are.

    The fillers are sequences of their own, none longer than the longest of the batch.
    """
    n_tokens = batch.segments.n_tokens
    total = -(-n_tokens // multiple) * multiple
    if total == n_tokens:
        return batch
    longest = int(batch.position_ids.max()) + 1
    starts, parents = list(batch.segments.start_list), list(batch.segments.parent_list)
    while starts[-1] < total:
        starts.append(min(starts[-1] + longest, total))
        parents.append(-1)
    token_ids = torch.cat([batch.token_ids, batch.token_ids[:1].expand(total - n_tokens)])
    return PackedBatch(token_ids, Segments(starts, parents), batch.last_segments)


@dataclass
class _Forest:
    token_ids: list[int]
    starts: list[int]
    parents: list[int]
    last_segments: list[int]

    def add(self, tokens: Sequence[int], parent: int) -> int:
        self.token_ids.extend(tokens)
        self.starts.append(len(self.token_ids))
        self.parents.append(parent)
        return len(self.parents) - 1


def _plant(forest: _Forest, sequences: list[list[int]]) -> None:
    """Depth first over groups of sequences (in token order) that agree up to some token."""
    order = sorted(range(len(sequences)), key=lambda index: sequences[index])
    groups = [(order, -1, 0, 0)] if order else []  # members, parent segment, its end, tokens known to agree
    while groups:
        members, parent, end, agreed = groups.pop()
        first, last = sequences[members[0]], sequences[members[-1]]
        # In token order, what the first and the last member share, all share.
        while agreed < min(len(first), len(last)) and first[agreed] == last[agreed]:
            agreed += 1
        whole = [index for index in members if len(sequences[index]) == agreed]
        worth_it = agreed - end >= MIN_SHARED_TOKENS or len(whole) == len(members)
        if agreed > end and worth_it:
            parent, end = forest.add(first[end:agreed], parent), agreed
        for index in whole:
            forest.last_segments[index] = parent if end == agreed else forest.add(first[end:agreed], parent)
        rest: dict[int, list[int]] = {}
        for index in members[len(whole) :]:  # the shortest come first in token order
            rest.setdefault(sequences[index][agreed], []).append(index)
        groups.extend((group, parent, end, agreed) for group in reversed(rest.values()))
