"""Named shapes of topk_similarity: tests, benchmarks and `fastsel doctor --check` read them here."""

from typing import Any, NamedTuple

import torch


class Case(NamedTuple):
    """b queries, n points, d features, k neighbours, and why this shape is here.

    kind: "random" directions, "clustered" ones (100 centres, as embeddings of real text), or "long": vectors far from
        the origin, whose squared lengths are many times their squared distances.
    itself: queries are the first points, and each excludes itself.
    """

    name: str
    b: int
    n: int
    d: int
    k: int
    why: str
    metric: str = "dot"
    kind: str = "random"
    itself: bool = False
    slow: bool = False


_LIST = [
    Case("one", 1, 1, 1, 1, "the smallest input: one query, one point, one feature"),
    Case("tiny", 3, 7, 5, 2, "smaller than any tile in every dimension"),
    Case("no_queries", 0, 8, 10, 3, "no queries at all"),
    Case("no_points", 4, 0, 10, 3, "no points at all: nothing but padding"),
    Case("padded", 5, 6, 9, 11, "more neighbours than points"),
    Case("odd", 63, 1003, 129, 10, "a multiple of nothing"),
    Case("odd_squared", 63, 1003, 129, 10, "the same, distances", "sqeuclidean"),
    Case("whole_tiles", 64, 4096, 64, 8, "a multiple of every tile: no tail code runs", "sqeuclidean", "clustered"),
    Case("itself", 130, 700, 33, 5, "each point's neighbours among the others", "dot", "clustered", True),
    Case("long", 40, 900, 48, 10, "lengths that hide the distances", "sqeuclidean", "long", True),
    Case("wide", 33, 401, 2050, 6, "more features than one block of the reduction", "sqeuclidean"),
    Case("many_kept", 3, 1500, 24, 200, "a long list of neighbours", "sqeuclidean", "clustered"),
    Case("density", 4000, 20_000, 384, 10, "density of embeddings, as NovelSum", "sqeuclidean", "clustered", slow=True),
    Case("search", 5000, 50_000, 384, 10, "the case that README quotes", slow=True),
    Case("covering", 20_000, 2000, 384, 1, "how well a subset covers a pool", "dot", "clustered", slow=True),
    Case("llm", 500, 10_000, 4096, 10, "hidden states of a large model", "sqeuclidean", slow=True),
]
CASES = {case.name: case for case in _LIST}


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> tuple[Any, ...]:
    """(queries, points, k, metric, exclude, minimum). Drawn on the CPU, so that every device gets the same numbers."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(case.n, case.d, generator=generator)
    queries = torch.randn(case.b, case.d, generator=generator)
    if case.kind == "clustered":
        centres = torch.randn(100, case.d, generator=generator)
        points = centres[torch.randint(0, 100, (case.n,), generator=generator)] + 0.5 * points
        queries = centres[torch.randint(0, 100, (case.b,), generator=generator)] + 0.5 * queries
    if case.kind == "long":
        points, queries = points + 3, queries + 3
    else:
        points, queries = (x / x.norm(dim=1, keepdim=True) for x in (points, queries))
    if case.itself:
        queries = points[: case.b]
    exclude = torch.arange(case.b, device=device) if case.itself else None
    return queries.to(device, dtype), points.to(device, dtype), case.k, case.metric, exclude, True


def cost(case: Case) -> tuple[float, float]:
    """Floating-point operations, and bytes that must move at 4 bytes a number: what the roofline is drawn from."""
    return 2.0 * case.b * case.n * case.d, 4.0 * ((case.b + case.n) * case.d + 3 * case.b * case.k)
