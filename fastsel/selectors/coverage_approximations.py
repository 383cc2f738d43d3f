"""Facility location for pools where a pass over all pairs is too much: each answer has a guarantee and a name."""

import heapq
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastsel.errors import UsageError
from fastsel.kernels.topk_similarity import topk_similarity
from fastsel.selectors.constraints import Constraints
from fastsel.selectors.coverage_problem import Picks, Problem


def stochastic(
    problem: Problem, constraints: Constraints, epsilon: float, seed: int, stats: dict[str, Any] | None
) -> Picks:
    """Each pick is the best of a random sample of the rows that may be taken; stale gains spare part of the sample."""
    run, random = problem.greedy(constraints, "sampled"), np.random.default_rng(seed)
    n = problem.candidates.n
    size = max(1, math.ceil(n / max(1.0, _most_picks(constraints)) * math.log(1 / epsilon)))
    picks = []
    while constraints.may_take.any():
        possible = np.flatnonzero(constraints.may_take)
        sampled = np.zeros(n, bool)
        sampled[random.choice(possible, min(size, len(possible)), replace=False)] = True
        found = run.pick(sampled)
        assert found is not None  # the sample is not empty
        picks.append(found)
    run.report(stats)
    return _as_arrays(picks)


def _most_picks(constraints: Constraints) -> float:
    """How many rows the room lets one choose at most."""
    return constraints.room if constraints.costs is None else constraints.room / float(constraints.costs.min(initial=1))


def threshold(problem: Problem, constraints: Constraints, epsilon: float, stats: dict[str, Any] | None) -> Picks:
    """Rows in their order, each taken if it still adds the threshold, which falls by epsilon from sweep to sweep."""
    run, picks = problem.greedy(constraints, "lazy"), []
    n, level = problem.candidates.n, 0.0
    if constraints.may_take.any():
        level = float(run.bounds().max())
    last = epsilon * level / max(1.0, min(n, _most_picks(constraints)))
    while constraints.may_take.any():
        if level <= last:
            level = -math.inf  # what is left adds next to nothing: any rows, in their order
        possible = np.flatnonzero(run.bounds() >= level)
        while len(possible):
            batch = possible[: run.coverage.room]
            possible = possible[len(batch) :]
            run.evaluate(batch)  # their similarities, in one reading of the points
            for row in batch.tolist():
                if constraints.may_take[row] and run.evaluate(np.array([row]))[0] >= level:
                    picks.append((row, run.take(row)))
        level *= 1 - epsilon
    run.report(stats)
    return _as_arrays(picks)


def partitioned(problem: Problem, constraints: Constraints, seed: int, stats: dict[str, Any] | None) -> Picks:
    """Greedy in random parts, then among their winners; the better of that and the best part, over all points."""
    if constraints.costs is not None or constraints.groups is not None or len(problem.initial):
        raise UsageError("optimizer='partitioned' takes neither costs nor groups nor initial rows")
    n, k = problem.candidates.n, int(constraints.room)
    number = max(1, round(math.sqrt(n / max(1, k))))
    order = np.random.default_rng(seed).permutation(n)
    shares_points = problem.points is problem.candidates
    winners: list[NDArray[np.int64]] = []
    passes = evaluations = 0.0
    for part in np.array_split(order, number):
        part = np.sort(part)
        local: dict[str, Any] = {}
        some = problem.part(part, part if shares_points else None)
        winners.append(part[some.solve(Constraints(len(part), min(k, len(part))), "auto", local)[0]])
        passes += local["passes"] * len(part) * some.points.n / (n * problem.points.n)
        evaluations += local["exact_evaluations"]
    union = np.sort(np.concatenate(winners))
    local = {}
    found, gains = problem.part(union, None).solve(Constraints(len(union), k), "auto", local)
    best: Picks = union[found], gains
    for rows in winners:
        run = problem.greedy(Constraints(n, k), "sampled")
        picks = []
        for row in rows.tolist():
            run.evaluate(np.array([row]))
            picks.append((row, run.take(row)))
        if sum(gain for _, gain in picks) > best[1].sum() * (1 + 1e-9):
            best = _as_arrays(picks)
    if stats is not None:
        stats["passes"] = passes + local["passes"] * len(union) / n + number * k / n
        stats["exact_evaluations"] = evaluations + local["exact_evaluations"] + number * k
    return best


def nearest_neighbours(
    problem: Problem, constraints: Constraints, neighbours: int, stats: dict[str, Any] | None
) -> Picks:
    """Each point counts its most similar candidates only: a sparse problem, solved by lazy greedy."""
    if isinstance(neighbours, bool) or not isinstance(neighbours, (int, np.integer)) or neighbours < 1:
        raise UsageError(f"neighbours must be a whole number of at least 1, got {neighbours!r}")
    if problem.similarity not in ("cosine", "dot") or problem.floor is None:
        raise UsageError("neighbours= takes similarity='cosine' or 'dot', and a floor")
    n, m, floor = problem.candidates.n, problem.points.n, problem.floor
    count = min(int(neighbours), n)
    near, similarity = np.zeros((m, count), np.int64), np.full((m, count), -np.inf, np.float32)
    for start, points in problem.points.blocks():
        over = slice(start, start + len(points))
        found = topk_similarity(points, problem.candidates.whole(), count)
        near[over], similarity[over] = found.indices.cpu().numpy(), found.values.cpu().numpy()
    best = np.full(m, floor, np.float64)
    # The same pairs by candidate: pairs of candidate i are those from first[i] to first[i + 1].
    order = np.argsort(near, axis=None, kind="stable")
    first = np.searchsorted(near.ravel()[order], np.arange(n + 1))
    point, value = order // count, similarity.ravel()[order].astype(np.float64)
    weights = np.ones(m) if problem.weights is None else problem.weights

    def adds(row: int) -> float:
        pairs = slice(first[row], first[row + 1])
        return float((np.maximum(value[pairs] - best[point[pairs]], 0) * weights[point[pairs]]).sum())

    def take(row: int) -> None:
        pairs = slice(first[row], first[row + 1])
        best[point[pairs]] = np.maximum(best[point[pairs]], value[pairs])

    for row in problem.initial.tolist():
        take(row)
    quality = np.zeros(n) if problem.quality is None else problem.alpha * problem.quality
    costs = np.ones(n) if constraints.costs is None else constraints.costs

    def worth(row: int) -> float:
        return (1 - problem.alpha) * adds(row) + float(quality[row])

    heap = [(-worth(row) / costs[row], row, -1) for row in np.flatnonzero(constraints.may_take).tolist()]
    heapq.heapify(heap)
    picks: list[tuple[int, float]] = []
    while heap and constraints.may_take.any():
        _, row, evaluated_at = heapq.heappop(heap)
        if not constraints.may_take[row]:
            continue
        if evaluated_at < len(picks):
            heapq.heappush(heap, (-worth(row) / costs[row], row, len(picks)))
            continue
        picks.append((row, worth(row)))
        take(row)
        constraints.take(row)
    if stats is not None:
        stats["passes"], stats["exact_evaluations"] = 1.0, 0
    return _as_arrays(picks)


def _as_arrays(picks: list[tuple[int, float]]) -> Picks:
    return np.array([row for row, _ in picks], np.int64), np.array([gain for _, gain in picks], np.float64)
