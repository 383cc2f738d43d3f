"""The rows that together are most similar to all points."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastsel.errors import UsageError
from fastsel.selectors.constraints import Constraints
from fastsel.selectors.coverage_approximations import nearest_neighbours, partitioned, stochastic, threshold
from fastsel.selectors.coverage_problem import Problem
from fastsel.selectors.rows import Rows, check_rows, check_values

EXACT = ("auto", "incremental", "lazy", "naive")
APPROXIMATE = ("stochastic", "threshold", "partitioned")
LARGEST_PRODUCT = 1e30  # of two rows' lengths: sums over a hundred million points still fit float32
SIMILARITIES = ("cosine", "dot", "rbf", "exp_distance")


def facility_location(
    x: Any,
    k: float,
    *,
    similarity: str = "cosine",
    gamma: float | None = None,
    floor: float | None = 0.0,
    queries: Any = None,
    weights: ArrayLike | None = None,
    quality: ArrayLike | None = None,
    alpha: float = 0.0,
    initial: ArrayLike | None = None,
    optimizer: str = "auto",
    neighbours: int | None = None,
    costs: ArrayLike | None = None,
    groups: tuple[ArrayLike, Mapping[Any, int]] | None = None,
    epsilon: float = 0.1,
    seed: int = 0,
    implementation: str = "auto",
    stats: dict[str, Any] | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Greedy facility location: each pick adds the most to

        F(A) = (1 - alpha) sum_v weights[v] max(floor, max over a in A of s(a, v)) + alpha sum over a in A of quality[a]

    which is QDIT's objective; without quality it is plain facility location. No matrix [n, m] ever exists.

    Args:
        x: [n, d] candidates; numpy, mapped files, torch on any device. Mapped files are read in blocks, often.
        k: how many rows; with `costs` the total cost of the rows.
        similarity: "cosine" (0 for a row of zeros), "dot", "rbf" exp(-gamma distance^2) or "exp_distance"
            exp(-gamma distance), which is submodlib's with Euclidean distances.
        gamma: > 0; None is 1 / d.
        floor: smaller similarities count as this: by default negative ones count as 0. None keeps them; the first pick
            then adds the sum of its similarities, as the maximum over nothing is 0.
        queries: [m, d] points to be covered; the candidates themselves when None.
        weights: [m] of the points, at least 0; 1 when None.
        quality, alpha: [n] and its share, 0 to 1. Quality is used as it is: coverage sums over all points, so scale
            quality by what one pick is to be worth (`methods.qdit` names the scales).
        initial: rows already chosen; they are not returned, and use up nothing of k or of the quotas.
        optimizer: exact and identical: "auto", "incremental", "lazy", "naive". Approximate, for larger pools:
            "stochastic": each pick is the best of (n / k) ln(1 / epsilon) random rows; at least 1 - 1/e - epsilon of
                the optimum in expectation (Mirzasoleiman et al., 2015).
            "threshold": rows in their order, whatever adds at least a falling threshold; at least 1 - 1/e - epsilon
                (Badanidiyuru & Vondrak, 2014).
            "partitioned": greedy in each of about sqrt(n / k) random parts, then among their winners against all
                points, or the best part where that is better; at least (1 - 1/e) / 2 in expectation (Barbosa et al.,
                2015).
            The guarantees hold for a count without groups, non-negative quality and a floor.
        neighbours: None, or how many candidates a point counts, the most similar ones; the others count as floor.
            Approximate: a sparse problem, solved exactly from float32 similarities ("cosine" or "dot", with a floor).
        costs: [n] above 0: each pick adds the most per cost among those that still fit. The single best row is
            returned instead where it is worth more, which makes it at least (1 - 1/e) / 2 of the optimum. With costs
            the first picks need not be the selection for less.
        groups: (labels [n], label -> most rows of it): a partition matroid, at least 1/2 of the optimum.
        epsilon, seed: of the approximate optimizers.
        implementation: of the kernel, see kernels.facility_location.
        stats: a dict that receives counts: "passes" (over all pairs; a symmetric first pass is half of one),
            "exact_evaluations" (similarity rows made in float64), "syncs" (updates of all gains).

    Returns:
        indices int64 [k] in the order of choice, and what each added to F, float64 [k], computed in float64 from the
        rows as given. All rows that may be chosen when k exceeds them. Rows within 1e-9 (relative) of the best tie, and
        the lowest goes first. The first j picks of the exact optimizers are the selection for j.

    Raises:
        UsageError: an argument is not as above; a row with NaN or infinity is named.

    Determinism: the same rows and bits for any number of threads (on a CPU with the compiled library).
    Exactness: contenders are decided in float64. Who is one is decided by sums in float32 or bytes and an allowance for
        their error: measured in the run, on rows evaluated so far, not proven; with "dot" per length of the row, and
        the worst case for rows over twice as long as any of those.
    Cost: where the compiled code runs about 3 passes of 2 n m d flops: half a one, some for the first picks, and one in
        which each point gets its shortlist of who may still improve it; elsewhere 1 + ln k on random vectors. Memory
        beyond x about 8 n d bytes (5 n d in bytes) and 40 MB, queries count like rows; with mapped matrices
        24 (n + m) bytes and some blocks.
    Source: Cornuejols, Fisher & Nemhauser 1977; lazy evaluation: Minoux 1978; quality: Bukharin et al., "Data Diversity
        Matters for Robust Instruction Tuning" (QDIT), 2023 (arXiv 2311.14736).
    """
    if optimizer not in EXACT + APPROXIMATE:
        raise UsageError(f"optimizer must be one of {', '.join(EXACT + APPROXIMATE)}; got {optimizer!r}")
    if similarity not in SIMILARITIES:
        raise UsageError(f"similarity must be one of {', '.join(SIMILARITIES)}; got {similarity!r}")
    if floor is not None and not math.isfinite(floor):
        raise UsageError(f"floor must be finite, or None, got {floor}")
    if not 0 <= alpha <= 1 or (alpha > 0 and quality is None):
        raise UsageError(f"alpha must be from 0 to 1, and above 0 only with quality; got {alpha}")
    if not 0 < epsilon < 1:
        raise UsageError(f"epsilon must be between 0 and 1, got {epsilon}")
    candidates = Rows(x, unit=similarity == "cosine")
    points = candidates if queries is None else Rows(queries, unit=similarity == "cosine", name="queries")
    if points.d != candidates.d or points.device != candidates.device:
        raise UsageError(
            f"queries must have {candidates.d} columns on {candidates.device}, got {points.d} on {points.device}"
        )
    longest = float(max(points.lengths.max(initial=0.0), candidates.lengths.max(initial=0.0)))
    if similarity != "cosine" and (is_long := candidates.lengths * max(longest, 1.0) > LARGEST_PRODUCT).any():
        raise UsageError(f"x: row {int(is_long.argmax())} is so long that float32 overflows; scale the matrix first")
    gamma = 1.0 / candidates.d if gamma is None else gamma
    if not 0 < gamma < math.inf:
        raise UsageError(f"gamma must be positive and finite, got {gamma}")
    n, m = candidates.n, points.n
    problem = Problem(
        candidates, points, None if weights is None else check_values(weights, m, "weights", least=0.0), similarity,
        gamma, floor, check_rows(initial, n, "initial"),
        None if quality is None else check_values(quality, n, "quality"), float(alpha), implementation,
    )  # fmt: skip
    constraints = Constraints(n, k, costs, groups, problem.initial)
    if neighbours is not None:
        return nearest_neighbours(problem, constraints, neighbours, stats)
    if optimizer == "stochastic":
        return stochastic(problem, constraints, epsilon, seed, stats)
    if optimizer == "threshold":
        return threshold(problem, constraints, epsilon, stats)
    if optimizer == "partitioned":
        return partitioned(problem, constraints, seed, stats)
    return problem.solve(constraints, optimizer, stats)
