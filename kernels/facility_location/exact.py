"""Similarities of a few rows in float64, to all points or to those they may improve: what picks are decided by."""

from typing import NamedTuple

import torch

from fastsel.kernels._runtime import native
from fastsel.kernels._runtime.checks import check_tensor
from fastsel.kernels.facility_location import cpu_native
from fastsel.kernels.facility_location.packed import PackedCandidates

BLOCK_NUMBERS, DEVICE_BLOCK_NUMBERS = 2**22, 2**26  # of points, widened to float64 at a time: 34 MB, 540 MB


class Pairs(NamedTuple):
    """Similarities of rows to some of the points, row by row and in the order of the points.

    Attributes:
        starts: int64 [b + 1], the pairs of row i are those from starts[i] to starts[i + 1].
        points: int32 [pairs], numbers of points.
        similarities: float64 [pairs].
    """

    starts: torch.Tensor
    points: torch.Tensor
    similarities: torch.Tensor


def similarities_above(
    rows: torch.Tensor,
    points: torch.Tensor,
    best: torch.Tensor,
    *,
    packed: PackedCandidates | None = None,
    lengths: torch.Tensor | None = None,
    similarity: str = "dot",
    gamma: float = 1.0,
) -> Pairs:
    """Every pair with s[i, v] > best[v], on the CPU; there may be others.

    Args:
        rows, points, lengths, similarity, gamma: as in similarity_rows.
        best: float64 [m] on the CPU, below +inf; -inf lets everything through.
        packed: what pack_candidates made of the points (at unit length where lengths are given), in float32 or in
            bytes, or None. With it, "dot" and rows of any number, products of the packed rows show which pairs cannot
            exceed best: the difference to the exact product is bounded by what was rounded away from both rows, so
            nothing is left out. Only the other pairs are multiplied in float64.

    Returns:
        Pairs on the CPU; s as in similarity_rows, the order of its summation may be another.

    Raises:
        ValueError: shapes, dtypes or devices do not match the above.

    Determinism: on a CPU the same pairs and bits for any number of threads and whatever the other rows are.
    Cost: with `packed` m d multiply-adds in float32 or bytes for each row, d in float64 for each pair that comes back.
    """
    check_tensor("rows", rows, ("b", "d"), dtypes=(torch.float64,))
    check_tensor("points", points, ("m", rows.shape[1]), device=rows.device)
    check_tensor("best", best, (len(points),), dtypes=(torch.float64,), device=torch.device("cpu"))
    if packed is not None and similarity == "dot" and len(rows):
        step = cpu_native.SCREENED
        return _joined(
            [
                Pairs(*cpu_native.similarities_above(rows[i : i + step], points, packed, best, lengths))
                for i in range(0, len(rows), step)
            ]
        )
    s = similarity_rows(rows, points, lengths=lengths, similarity=similarity, gamma=gamma)
    row, point = torch.nonzero(s > best.to(s.device), as_tuple=True)
    starts = torch.searchsorted(row, torch.arange(len(rows) + 1, device=s.device))
    return Pairs(starts.cpu(), point.int().cpu(), s[row, point].cpu())


def _joined(parts: list[Pairs]) -> Pairs:
    if len(parts) == 1:
        return parts[0]
    ends, offset = [torch.zeros(1, dtype=torch.int64)], 0
    for part in parts:
        ends.append(part.starts[1:] + offset)
        offset += len(part.points)
    return Pairs(torch.cat(ends), torch.cat([p.points for p in parts]), torch.cat([p.similarities for p in parts]))


def similarity_rows(
    rows: torch.Tensor,
    points: torch.Tensor,
    *,
    lengths: torch.Tensor | None = None,
    similarity: str = "dot",
    gamma: float = 1.0,
) -> torch.Tensor:
    """s[i, v] of api.facility_location in float64, from points as they were given.

    Args:
        rows: [b, d] float64; b is meant to be small.
        points: [m, d] float32 | bfloat16 | float16 | float64, same device; read once, never copied as a whole.
        lengths: [m] float64 that dot products are divided by (0 gives 0), or None.
        similarity, gamma: as in api.facility_location; distances are sums of squared differences.

    Returns:
        [b, m] float64.

    Raises:
        ValueError: shapes, dtypes or devices do not match the above.

    Determinism: on a CPU the bits of s[i, v] depend on the two rows only, not on the threads or on the other rows.
    """
    check_tensor("rows", rows, ("b", "d"), dtypes=(torch.float64,))
    check_tensor("points", points, ("m", rows.shape[1]), device=rows.device)
    is_cpu = rows.device.type == "cpu"
    if is_cpu and native.unavailable() is None:
        return cpu_native.similarity_rows(rows, points, lengths, similarity, gamma)
    out = torch.empty(len(rows), len(points), dtype=torch.float64, device=rows.device)
    step = max(1, (BLOCK_NUMBERS if is_cpu else DEVICE_BLOCK_NUMBERS) // max(1, rows.shape[1]))
    for start in range(0, len(points), step):
        over = slice(start, start + step)
        block = points[over].double()
        if similarity == "dot" and not is_cpu:  # one reading of the block for all rows
            s = rows @ block.T
            out[:, over] = s if lengths is None else torch.where(lengths[over] > 0, s / lengths[over], 0.0)
            continue
        for i, row in enumerate(rows):
            # Sums along rows of memory: their order does not depend on the number of threads.
            if similarity == "dot":
                s = (block * row).sum(1)
                if lengths is not None:
                    s = torch.where(lengths[over] > 0, s / lengths[over], 0.0)
            else:
                squared = (block - row).square_().sum(1)
                s = torch.exp(-gamma * (squared if similarity == "rbf" else squared.sqrt()))
            out[i, over] = s
    return out
