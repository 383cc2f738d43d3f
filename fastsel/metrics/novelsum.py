"""NovelSum: how new each row of a set is beside the others, near ones weighing most, sparse regions counting more."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastsel.errors import UsageError
from fastsel.kernels.novelty import novelty
from fastsel.selectors.density import REGULARISATION, mean_squared_distances
from fastsel.selectors.rows import Rows

SIDES = ("row", "column", "both")
NORMALISERS = ("mean", "sum")
SIGMAS = ("mean_squared", "sum_cosine")


def novelsum(
    x: Any, reference: Any = None, *, alpha: float = 1.0, beta: float = 0.5, neighbours: int = 10, **options: Any
) -> float:
    """NovelSum of a set, by the authors' code and their recommended powers; see novelsum_grid for the options.

        NovelSum = mean_i sigma_i (sum_r r^-alpha d_i(r)) / (sum_r r^-alpha)
        d_i(1) <= d_i(2) <= ...: cosine distances of row i to all rows, itself included

    Args:
        x: [n, d] the set; numpy or torch.
        reference: [m, d] the pool whose density weighs a row; x itself when None.
        alpha, beta, neighbours: >= 0, >= 0, >= 1; powers of nearness and of density, and rows that density counts.
        options: of novelsum_grid.

    Returns:
        The value; NaN for no rows.
    """
    grid = novelsum_grid(x, reference, alphas=(alpha,), betas=(beta,), neighbours=(neighbours,), **options)
    return grid[(neighbours, beta, alpha)]


def novelsum_grid(
    x: Any,
    reference: Any = None,
    *,
    alphas: Sequence[float] = (0, 1, 2),
    betas: Sequence[float] = (0, 0.25, 0.5),
    neighbours: Sequence[int] = (5, 10),
    include_self: bool = True,
    density_side: str = "row",
    normalise: str = "mean",
    sigma: str = "mean_squared",
    drop_first: bool = True,
    implementation: str = "auto",
) -> dict[tuple[int, float, float], float]:
    """NovelSum for every combination of powers: one neighbour search, and with density_side "row" one sort, for all.

    Args:
        x, reference: as in novelsum.
        alphas, betas, neighbours: the grid; by default the authors' of their command line.
        include_self: whether a row's distance 0 to itself takes the first rank, as in the authors' numbers.
        density_side: whose density weighs a distance: "row" sigma_i (the authors' code), "column" sigma_j (the paper;
            ranks by distance), "both" sigma_i + sigma_j (their greedy selection; ranks by the weighted distance).
        normalise: "mean" of the rows' weighted averages (the code), or "sum" of the rows' weighted sums (the paper).
        sigma: "mean_squared", (mean squared distance of the rows as they are + 1e-9)^-beta (the code), or
            "sum_cosine", (sum of cosine distances + 1e-9)^-beta (the paper).
        drop_first: whether a row's nearest reference row is left out whatever it is (the code), or only where it
            equals the row.
        implementation: of the kernels.

    Returns:
        {(neighbours, beta, alpha): value}.

    Raises:
        UsageError: an option has no such value; a row with NaN or infinity is named.

    Zero rows: at distance 1 from all rows and themselves. Copies: at distance 0 from each other, which lowers a set's
        value; in the reference equal rows count once.
    Cost: 2 n m d flops for the neighbours and 2 n^2 d for the distances, n^2 values sorted; never a matrix [n, n].
        "column" and "both" sort once for each beta and number of neighbours.
    Source: Yang et al., ACL 2025 (arXiv 2502.17184); authors' code UmeanNever/NovelSum@b594962, novelsum.py.
    """
    for name, chosen, known in (
        ("density_side", density_side, SIDES), ("normalise", normalise, NORMALISERS), ("sigma", sigma, SIGMAS)
    ):  # fmt: skip
        if chosen not in known:
            raise UsageError(f"{name} must be one of {', '.join(known)}, got {chosen!r}")
    for name, values in (("alpha", alphas), ("beta", betas)):
        for power in values:
            if not 0 <= power < np.inf:
                raise UsageError(f"{name} must be a number of at least 0, got {power}")
    for number in neighbours:
        if isinstance(number, bool) or not isinstance(number, (int, np.integer)) or number < 1:
            raise UsageError(f"neighbours must be a whole number of at least 1, got {number!r}")
    rows = Rows(x, unit=True)
    weights, sums = _weights(alphas, rows.n, include_self)
    spread = _spread(x, reference, rows, neighbours, sigma, drop_first, implementation)
    found: dict[tuple[int, float, float], float] = {}
    plain = None
    for number in neighbours:
        for beta in betas:
            density = torch.from_numpy((spread[number] + REGULARISATION) ** -beta)
            if density_side == "row":
                plain = _scores(rows, weights, None, density_side, implementation) if plain is None else plain
                scores = plain * density[:, None]
            else:
                scores = _scores(rows, weights, density, density_side, implementation)
            for i, alpha in enumerate(alphas):
                column = scores[:, i]
                value = column.sum() if normalise == "sum" else (column / sums[i]).mean()
                found[(number, beta, alpha)] = float(value)
    return found


def _weights(alphas: Sequence[float], n: int, include_self: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """[n, number of alphas] weights of the ranks, and their sums."""
    ranks = torch.arange(1, n + 1, dtype=torch.float64)
    weights = ranks[:, None] ** -torch.tensor([float(alpha) for alpha in alphas], dtype=torch.float64)
    if not include_self:
        # A row is the nearest to itself: without it every other row's rank is one less.
        weights = torch.cat([torch.zeros(1, len(alphas), dtype=torch.float64), weights[:-1]])[:n]
    return weights, weights.sum(0)


def _spread(
    x: Any, reference: Any, rows: Rows, neighbours: Sequence[int], sigma: str, drop_first: bool, implementation: str
) -> dict[int, NDArray[np.float64]]:
    """For each number of neighbours what sigma is a power of: how far each row's neighbours in the reference are."""
    is_cosine = sigma == "sum_cosine"
    queries = rows if is_cosine else Rows(x)
    pool = queries if reference is None else Rows(reference, unit=is_cosine, name="reference")
    if pool.d != rows.d:
        raise UsageError(f"reference has {pool.d} features a row, x has {rows.d}")
    means = mean_squared_distances(queries, pool, neighbours, drop_first=drop_first, implementation=implementation)
    # At unit length a squared distance is twice the cosine distance.
    return {number: means[number] * number / 2 if is_cosine else means[number] for number in neighbours}


def _scores(
    rows: Rows, weights: torch.Tensor, density: torch.Tensor | None, side: str, implementation: str
) -> torch.Tensor:
    """Float64 [n, number of alphas] on the CPU: sums over ranks of weighted distances within the set."""
    whole = rows.whole()
    on_device = None if density is None else density.to(whole.device)
    scores = novelty(
        whole, whole, weights.to(whole.device), on_device if side == "both" else None, on_device,
        rank_by="distance" if side == "column" else "weighted", implementation=implementation,
    )  # fmt: skip
    return scores.double().cpu()
