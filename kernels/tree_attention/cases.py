"""Named forests and heads of tree_attention: tests, benchmarks and `fastsel doctor --check` read them here."""

from typing import Any, NamedTuple

import torch

from fastsel.kernels.tree_attention.segments import Segments


class Case(NamedTuple):
    """Lengths and parents of the segments, h query heads, hk key heads of d (values: dv), and why this is here."""

    name: str
    lengths: tuple[int, ...]
    parents: tuple[int, ...]
    h: int
    hk: int
    d: int
    dv: int
    why: str
    window: int | None = None
    softcap: float | None = None
    scale: float | None = None
    slow: bool = False


_FAMILY = ((40, 7, 100, 3, 13, 29), (-1, 0, 0, 2, -1, 2))
_TEMPLATE = ((38, *[150 + 10 * i for i in range(5)]), (-1, *[0] * 5))
_LIST = [
    Case("one", (1,), (-1,), 1, 1, 1, 1, "the smallest input: one token, one head, one feature"),
    Case("tiny", (3, 2), (-1, 0), 2, 1, 5, 3, "smaller than any tile in every dimension"),
    Case("empty", (), (), 2, 1, 8, 8, "no tokens at all"),
    Case("odd", (63, 31, 1, 100), (-1, 0, 1, -1), 5, 5, 19, 23, "a multiple of nothing"),
    Case("family", *_FAMILY, 9, 3, 64, 64, "three levels, two roots; the heads of SmolLM2-135M"),
    Case("chain", (97, 1, 95, 5), (-1, 0, 1, 2), 4, 2, 16, 32, "a path that is one stretch of rows"),
    Case("window", *_FAMILY, 4, 2, 32, 32, "a window that ends in an ancestor, as in Mistral", window=20),
    Case("window_one", *_FAMILY, 2, 2, 16, 16, "each token sees itself only", window=1),
    Case("softcap", *_FAMILY, 4, 1, 24, 24, "softcap and scale, as in Gemma 2", softcap=3.0, scale=0.4),
    Case("all_options", (130, 120, 7), (-1, 0, 1), 6, 2, 80, 40, "all of them", window=150, softcap=5.0, scale=0.3),
    Case("smollm2_batch", *_TEMPLATE, 9, 3, 64, 64, "a template and five rows under SmolLM2-135M", slow=True),
    Case("short_rows", (60,) * 16, (-1,) * 16, 9, 3, 64, 64, "many short segments", slow=True),
    Case("long_row", (2048,), (-1,), 9, 3, 64, 64, "one long segment", slow=True),
    Case("llama_8b_batch", *_TEMPLATE, 32, 8, 128, 128, "the heads of Llama 3.1 8B", slow=True),
]
CASES = {case.name: case for case in _LIST}


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> tuple[Any, ...]:
    """(query, key, value, segments, window, softcap, scale), normal; the same numbers on every device."""
    generator = torch.Generator().manual_seed(seed)
    starts = [0]
    for length in case.lengths:
        starts.append(starts[-1] + length)
    shapes = ((case.h, case.d), (case.hk, case.d), (case.hk, case.dv))
    query, key, value = (torch.randn(starts[-1], *shape, generator=generator).to(device, dtype) for shape in shapes)
    scale = case.d**-0.5 if case.scale is None else case.scale
    return query, key, value, Segments(starts, case.parents), case.window, case.softcap, scale


def cost(case: Case) -> tuple[float, float]:
    """Floating-point operations over the pairs that are seen, and bytes of inputs and outputs at 4 bytes a number."""
    first_positions: list[int] = []
    pairs = 0
    for length, parent in zip(case.lengths, case.parents, strict=True):
        first = 0 if parent < 0 else first_positions[parent] + case.lengths[parent]
        first_positions.append(first)
        pairs += sum(min(p + 1, case.window or p + 1) for p in range(first, first + length))
    tokens = sum(case.lengths)
    return 2.0 * case.h * (case.d + case.dv) * pairs, 4.0 * tokens * (case.h + case.hk) * (case.d + case.dv)
