"""How densely a reference pool lies around a row: what NovelSelect and NovelSum weight distances with."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastsel.errors import UsageError
from fastsel.kernels.topk_similarity import topk_similarity
from fastsel.selectors.rows import BLOCK_ROWS, Rows

# The authors': keeps a row with copies in the reference from an infinite density.
REGULARISATION = 1e-9
# Rows of a mapped reference searched at a time.
REFERENCE_ROWS = 65_536
RULES = ("official", "paper")


def local_density(
    x: Any,
    reference: Any = None,
    *,
    rule: str = "official",
    beta: float = 0.5,
    neighbours: int = 10,
    implementation: str = "auto",
) -> NDArray[np.float64]:
    """Float64 [n]: sigma of each row, (mean squared distance to its nearest reference rows + 1e-9)^-beta.

    Args:
        x: [n, d], and reference: [m, d], x itself when None.
        rule: "official" takes rows as they are and leaves the nearest reference row out; "paper" takes them at unit
            length, where sigma is the paper's but for a constant, and leaves out only a row that equals it.
        beta, neighbours: >= 0 and >= 1.
        implementation: of topk_similarity.

    Raises:
        UsageError: an option has no such value; a row with NaN or infinity is named.
    """
    if not 0 <= beta < np.inf:
        raise UsageError(f"beta must be a number of at least 0, got {beta}")
    if isinstance(neighbours, bool) or not isinstance(neighbours, (int, np.integer)) or neighbours < 1:
        raise UsageError(f"neighbours must be a whole number of at least 1, got {neighbours!r}")
    if rule not in RULES:
        raise UsageError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    rows = Rows(x, unit=rule == "paper")
    pool = rows if reference is None else Rows(reference, unit=rule == "paper", name="reference")
    if pool.d != rows.d:
        raise UsageError(f"reference has {pool.d} features a row, x has {rows.d}")
    number = int(neighbours)
    means = mean_squared_distances(rows, pool, [number], drop_first=rule == "official", implementation=implementation)
    return densities(means[number], beta)


def mean_squared_distances(
    rows: Rows,
    reference: Rows,
    neighbours: Sequence[int],
    *,
    drop_first: bool = True,
    implementation: str = "auto",
) -> dict[int, NDArray[np.float64]]:
    """The mean squared Euclidean distance of each row to its nearest neighbours in a reference pool.

    Args:
        rows: [n, d], and reference: [m, d]; both as they are read (at unit length or not).
        neighbours: numbers of neighbours; one search serves all of them.
        drop_first: leave the nearest reference row out whatever it is, as the authors do who take it for the row
            itself; False leaves out a reference row that equals the row, and no other.
        implementation: of topk_similarity.

    Returns:
        number of neighbours -> float64 [n]. Equal rows of the reference count once. Where the reference has fewer
        rows than neighbours, the mean is over those there are; 0 where there is none.
    """
    largest = max(neighbours)
    n_points, found = 0, torch.full((rows.n, 0), torch.inf)
    for points in _distinct_blocks(reference):
        n_points += len(points)
        # Points among themselves, in one call: the compiled code then makes half of the products.
        is_itself = reference is rows and len(points) == rows.n and points.device.type == "cpu"
        blocks = [points] if is_itself else (block for _, block in rows.blocks())
        parts = [
            topk_similarity(
                block.to(points.device), points, largest + 1, metric="sqeuclidean", implementation=implementation
            ).values.cpu()
            for block in blocks
        ]
        nearest = torch.cat([found, torch.cat(parts) if parts else torch.empty(0, largest + 1)], dim=1)
        found = nearest.sort(dim=1).values[:, : largest + 1]
    squares = np.maximum(found.double().numpy(), 0.0)
    if not drop_first:
        # Without the first hit only where it is the row itself: otherwise the last one goes.
        is_itself = squares[:, :1] == 0
        squares = np.where(is_itself, squares, np.roll(squares, 1, axis=1))
    squares = squares[:, 1:]
    means = {}
    for number in neighbours:
        counted = np.isfinite(squares[:, :number])
        sums = np.where(counted, squares[:, :number], 0.0).sum(axis=1)
        means[number] = sums / np.maximum(counted.sum(axis=1), 1)
    return means


def densities(means: NDArray[np.float64], beta: float) -> NDArray[np.float64]:
    """sigma = 1 / (mean squared distance + 1e-9)^beta."""
    return 1.0 / (means + REGULARISATION) ** beta


def _distinct_blocks(reference: Rows) -> list[torch.Tensor]:
    """The reference without repeated rows: one block, or as many as a mapped file needs."""
    keep = np.zeros(reference.n, bool)
    keep[first_of_equal_rows(reference)] = True
    if not reference.is_mapped:
        whole = reference.whole()
        return [whole if keep.all() else whole[torch.from_numpy(np.flatnonzero(keep)).to(whole.device)]]
    return [
        block[torch.from_numpy(keep[start : start + len(block)])] for start, block in reference.blocks(REFERENCE_ROWS)
    ]


def first_of_equal_rows(rows: Rows) -> NDArray[np.int64]:
    """Row numbers, ascending, of the first of each group of equal rows (as float32); hashed, not sorted by content."""
    hashes = np.zeros(rows.n, np.uint64)
    # Odd 64-bit numbers: the hash is a sum of products modulo 2^64.
    factors = np.random.RandomState(0).randint(0, 2**62, size=rows.d, dtype=np.int64).astype(np.uint64) * 2 + 1
    for start, block in rows.blocks():
        bits = (block.cpu().numpy() + np.float32(0)).view(np.uint32).astype(np.uint64)  # + 0 makes -0 a 0
        bits ^= bits << np.uint64(31)
        hashes[start : start + len(bits)] = (bits * factors).sum(axis=1, dtype=np.uint64)
    _, firsts, groups = np.unique(hashes, return_index=True, return_inverse=True)
    repeats, different = np.flatnonzero(firsts[groups] != np.arange(rows.n)), []
    for start in range(0, len(repeats), BLOCK_ROWS):  # equal hashes of unequal rows are as good as impossible
        part = repeats[start : start + BLOCK_ROWS]
        is_different = (rows.take(part) != rows.take(firsts[groups[part]])).any(dim=1)
        different.append(part[is_different.cpu().numpy()])
    return np.sort(np.concatenate([firsts, *different]))
