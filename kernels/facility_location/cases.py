"""Named shapes of facility_location: tests, benchmarks and `fastsel doctor --check` read them here."""

from typing import Any, NamedTuple

import torch


class Case(NamedTuple):
    """n candidates, m points, d features, and why this shape is here.

    best: "floor" (0 everywhere, the first pass), "none" (-inf) or "chosen" (as after some picks).
    raised: as after one more pick; weights: one a point; itself: the points are the candidates, m = n.
    """

    name: str
    n: int
    m: int
    d: int
    why: str
    best: str = "chosen"
    raised: bool = False
    weights: bool = False
    similarity: str = "dot"
    gamma: float = 1.0
    itself: bool = False
    slow: bool = False


_LIST = [
    Case("one", 1, 1, 1, "the smallest input"),
    Case("tiny", 3, 7, 5, "smaller than any tile in every dimension"),
    Case("no_candidates", 0, 9, 8, "nobody to score"),
    Case("no_points", 9, 0, 8, "a pick that moved nothing"),
    Case("odd", 101, 203, 129, "a multiple of nothing", weights=True),
    Case("odd_raised", 101, 203, 129, "a multiple of nothing, after a pick", raised=True, weights=True),
    Case("whole_tiles", 96, 192, 64, "a multiple of every tile: no tail code runs", raised=True),
    Case("wide", 33, 70, 2050, "more features than one block of the reduction", raised=True),
    Case("no_floor", 60, 130, 40, "best is -inf: nothing chosen yet", best="none"),
    Case("no_floor_raised", 60, 130, 40, "the first pick without a floor", best="none", raised=True),
    Case("rbf", 65, 131, 48, "Gaussian similarity", raised=True, similarity="rbf", gamma=0.5),
    Case("exp_distance", 65, 131, 48, "submodlib's similarity", weights=True, similarity="exp_distance", gamma=0.7),
    Case("itself", 301, 301, 96, "points are the candidates: half of the products", best="floor", itself=True),
    Case("itself_weighted", 133, 133, 50, "the same with weights and picks made", weights=True, itself=True),
    Case("update", 10_000, 240, 384, "one step of n=10,000 k=200", raised=True),
    Case("first_pass", 10_000, 10_000, 384, "gains before the first pick", best="floor", itself=True, slow=True),
    Case("late_update", 50_000, 100, 384, "one late step of n=50,000", raised=True, slow=True),
    Case("many_points", 3, 800_000, 4, "m * n * 4 is small, m * d exceeds what a tile holds", slow=True),
]
CASES = {case.name: case for case in _LIST}


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> tuple[Any, ...]:
    """(candidates, points, best, raised, weights, similarity, gamma): rows of length 1.

    best is the largest similarity to five more rows, raised to six. Drawn on the CPU, so that every device gets the
    same numbers.
    """
    generator = torch.Generator().manual_seed(seed)

    def rows(number: int) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.randn(number, case.d, generator=generator), dim=1)

    candidates = rows(case.n).to(device, dtype)
    points = candidates if case.itself else rows(case.m).to(device, dtype)
    others = rows(6)
    similarity_6m = others @ points.cpu().float().T
    if case.similarity != "dot":
        similarity_6m = torch.exp(-case.gamma * (2 - 2 * similarity_6m).clamp(min=0))
    best = similarity_6m[:5].amax(0) if case.best == "chosen" else torch.zeros(len(points))
    if case.best == "none":
        best = torch.full((len(points),), -torch.inf)
    raised = torch.maximum(best, similarity_6m[5]).to(device) if case.raised else None
    weights = torch.rand(len(points), generator=generator).to(device) + 0.5 if case.weights else None
    return candidates, points, best.to(device), raised, weights, case.similarity, case.gamma


def cost(case: Case) -> tuple[float, float]:
    """Floating-point operations, and bytes that must move at 4 bytes a number: what the roofline is drawn from."""
    products = case.n * case.m * (0.5 if case.itself else 1.0)
    read = case.n * case.d + (0 if case.itself else case.m * case.d)
    return 2.0 * products * case.d, 4.0 * (read + 3 * case.m + 2 * case.n)
