"""Named shapes of k_center: tests, benchmarks and `fastsel doctor --check` read them here."""

from typing import Any, NamedTuple

import torch


class Case(NamedTuple):
    """n points, d features, b new centres, m rows looked at (all when None), and why this shape is here."""

    name: str
    n: int
    d: int
    b: int
    why: str
    m: int | None = None
    begun: bool = True
    slow: bool = False


_LIST = [
    Case("one", 1, 1, 1, "the smallest input: one point, one feature, one centre", begun=False),
    Case("tiny", 7, 5, 3, "smaller than any tile in every dimension"),
    Case("empty", 0, 8, 4, "no points at all"),
    Case("no_rows", 9, 8, 4, "points, but none is looked at", m=0),
    Case("odd", 301, 129, 37, "a multiple of nothing"),
    Case("whole_tiles", 256, 64, 96, "a multiple of every tile: no tail code runs"),
    Case("wide", 150, 1030, 25, "more features than one chain of multiply-adds", begun=False),
    Case("many_centres", 140, 32, 1300, "more centres than points"),
    Case("some_rows", 700, 48, 20, "a subset of the rows, in another order", m=333),
    Case("newest", 20_000, 384, 1, "one new centre: the plain loop of k-center greedy"),
    Case("minilm", 50_000, 384, 64, "a block of pending centres over MiniLM embeddings of 50,000 rows", slow=True),
    Case("minilm_many", 50_000, 384, 512, "more pending centres", slow=True),
    Case("llm_states", 20_000, 4096, 128, "hidden states of a 7B model", slow=True),
]
CASES = {case.name: case for case in _LIST}


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> tuple[Any, ...]:
    """(points, centres, nearest, rows, point_sqnorms, centre_sqnorms), the points unit vectors.

    Every other centre is a point, one of the first quarter of them; nearest is what earlier centres have left. Drawn on
    the CPU, so that every device gets the same numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    points = torch.nn.functional.normalize(torch.randn(case.n, case.d, generator=generator))
    centres = torch.nn.functional.normalize(torch.randn(case.b, case.d, generator=generator))
    if case.n:
        centres[::2] = points[torch.randint(0, -(-case.n // 4), (len(centres[::2]),), generator=generator)]
    rows = None if case.m is None else torch.randperm(case.n, generator=generator)[: case.m]
    m = case.n if case.m is None else case.m
    nearest = 1.2 + torch.rand(m, generator=generator) if case.begun else None
    points, centres = points.to(device, dtype), centres.to(device, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    sqnorms = [torch.linalg.vector_norm(x, dim=1, dtype=wide).square() for x in (points, centres)]
    return (
        points, centres, None if nearest is None else nearest.to(device, wide),
        None if rows is None else rows.to(device), *sqnorms,
    )  # fmt: skip


def cost(case: Case) -> tuple[float, float]:
    """Floating-point operations, and bytes that must move at 4 bytes a number: what the roofline is drawn from."""
    m = case.n if case.m is None else case.m
    return 2.0 * m * case.b * case.d, 4.0 * (m * case.d + case.b * case.d + 3 * m)
