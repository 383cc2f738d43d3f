"""Named shapes of novelty: tests, benchmarks and `fastsel doctor --check` read them here."""

from typing import Any, NamedTuple

import torch


class Case(NamedTuple):
    """n rows, t picks, d features, s sets of weights, which densities there are, and why this shape is here."""

    name: str
    n: int
    t: int
    d: int
    why: str
    rank_by: str = "weighted"
    densities: str = "both"  # "row", "pick", "both", "none"
    alpha: float = 1.0
    s: int = 1
    slow: bool = False


_LIST = [
    Case("one", 1, 1, 1, "the smallest input: one row, one pick, one feature"),
    Case("tiny", 3, 5, 7, "smaller than any tile in every dimension"),
    Case("empty", 0, 9, 10, "no rows at all"),
    Case("no_picks", 5, 0, 10, "nothing is chosen yet: every sum is empty"),
    Case("odd", 67, 131, 129, "a multiple of nothing"),
    Case("whole_tiles", 64, 192, 64, "a multiple of every tile: no tail code runs"),
    Case("wide", 33, 70, 2050, "more features than one block of the reduction"),
    Case("paper", 40, 150, 96, "the paper's rule: the picks' density, ranked by distance", "distance", "pick"),
    Case("metric", 50, 50, 48, "NovelSum of a set: no pick's density, three exponents", densities="row", s=3),
    Case("bound", 300, 7, 384, "the append bound of seven new picks", "order"),
    Case("bound_paper", 129, 1, 40, "one new pick, its density alone", "order", "pick", s=2),
    Case("plain", 20, 40, 24, "no density", densities="none", alpha=0.5),
    Case("contenders", 256, 2048, 384, "a block of contenders in the middle of a selection", slow=True),
    Case("runs", 16, 9000, 64, "more picks than one Triton program sorts", slow=True),
    Case("pool", 100_000, 1, 384, "the append bound of a pool", "order", slow=True),
]
CASES = {case.name: case for case in _LIST}


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> tuple[Any, ...]:
    """(rows, picks, weights, row_density, pick_density, rank_by), as compute() takes them.

    Unit rows around a common direction, so that distances spread as those of sentences do. Drawn on the CPU, so that
    every device gets the same numbers; densities and weights are float64 whatever the dtype.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(case.n + case.t, case.d, generator=generator) + 0.5
    x = torch.nn.functional.normalize(x, dim=1)
    density = 1 + torch.rand(case.n + case.t, generator=generator, dtype=torch.float64)
    powers = case.alpha * torch.arange(1, case.s + 1, dtype=torch.float64)
    weights = torch.arange(1, case.t + 1, dtype=torch.float64)[:, None] ** -powers
    rows, picks = x[: case.n].to(device, dtype), x[case.n :].to(device, dtype)
    row_density = density[: case.n].to(device) if case.densities in ("row", "both") else None
    pick_density = density[case.n :].to(device) if case.densities in ("pick", "both") else None
    return rows, picks, weights.to(device), row_density, pick_density, case.rank_by


def cost(case: Case) -> tuple[float, float]:
    """Floating-point operations, and bytes that must move at 4 bytes a number: what the roofline is drawn from."""
    products = case.s * (2 if case.densities in ("row", "both") else 1) if case.rank_by == "order" else case.t
    return 2.0 * case.n * products * case.d, 4.0 * ((case.n + case.t) * case.d + case.n * case.s)
