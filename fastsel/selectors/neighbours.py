"""The nearest rows of each row, of matrices that may be mapped from files larger than memory."""

import torch

from fastsel.errors import UsageError
from fastsel.kernels.topk_similarity import TopK, topk_similarity
from fastsel.selectors.rows import BLOCK_ROWS, Rows

MAPPED_POINTS = 8 * BLOCK_ROWS  # rows of a mapped file in memory at a time: 100 MB at 384 float32


def nearest_rows(
    queries: Rows,
    points: Rows,
    k: int,
    *,
    metric: str = "dot",
    excludes_itself: bool = False,
    minimum: bool = False,
    implementation: str = "auto",
) -> TopK:
    """The k nearest points of every query row; see topk_similarity.

    Args:
        queries, points: matrices of equally many columns, each read at unit length or as it is.
        k: how many.
        metric: "dot" or "sqeuclidean".
        excludes_itself: queries are the points, and row i is not its own neighbour.
        minimum: whether the least similarity is wanted too.
        implementation: of the kernel.

    Returns:
        TopK with a line for each query row. Mapped matrices are read in blocks, points once for each block of queries.
    """
    every = torch.arange(queries.n, device=queries.device) if excludes_itself else None
    if not queries.is_mapped and not points.is_mapped:
        return topk_similarity(
            queries.whole(), points.whole(), k, metric=metric, exclude=every, minimum=minimum,
            implementation=implementation,
        )  # fmt: skip
    lines = []
    for start, block in queries.blocks(MAPPED_POINTS):
        exclude = None if every is None else every[start : start + len(block)]
        lines.append(_merged(block, points, k, metric, exclude, minimum, implementation))
    if not lines:
        return topk_similarity(queries.take(slice(0, 0)), points.take(slice(0, 0)), k, metric=metric, minimum=minimum)
    return TopK(*(None if parts[0] is None else torch.cat(parts) for parts in zip(*lines, strict=True)))  # type: ignore[arg-type]


def _merged(
    block: torch.Tensor,
    points: Rows,
    k: int,
    metric: str,
    exclude: torch.Tensor | None,
    minimum: bool,
    implementation: str,
) -> TopK:
    """One block of queries against all points, a part of the points at a time."""
    is_dot = metric == "dot"
    best: TopK | None = None
    for start, part in points.blocks(MAPPED_POINTS):
        here = None
        if exclude is not None:
            is_inside = (exclude >= start) & (exclude < start + len(part))
            here = torch.where(is_inside, exclude - start, -1)
        found = topk_similarity(
            block, part, k, metric=metric, exclude=here, minimum=minimum, implementation=implementation
        )
        indices = torch.where(found.indices < 0, -1, found.indices + start)
        if best is None:
            best = TopK(found.values, indices, found.minimum)
            continue
        # Earlier parts stand first and hold lower rows: a stable sort keeps the lowest row first among equals.
        values, order = torch.cat([best.values, found.values], 1).sort(dim=1, descending=is_dot, stable=True)
        indices = torch.cat([best.indices, indices], 1).gather(1, order)
        least = None
        if best.minimum is not None and found.minimum is not None:
            least = (torch.minimum if is_dot else torch.maximum)(best.minimum, found.minimum)
        best = TopK(values[:, :k], indices[:, :k], least)
    if best is None:
        return topk_similarity(block, points.take(slice(0, 0)), k, metric=metric, minimum=minimum)
    return best


def check_columns(queries: Rows, points: Rows, what: str) -> None:
    """Raise UsageError unless both matrices have the same number of columns."""
    if queries.d != points.d:
        raise UsageError(f"{what} has {points.d} columns, the rows have {queries.d}")
