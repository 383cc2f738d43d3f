"""Named shapes of random_projection: tests, benchmarks and `fastsel doctor --check` read them here."""

from typing import Any, NamedTuple

import torch

from fastsel.kernels.random_projection.api import masked


class Case(NamedTuple):
    """b rows of p coordinates from number `first` on, projected to k, and why this shape is here."""

    name: str
    b: int
    p: int
    k: int
    why: str
    kind: str = "sjlt"
    sparsity: int = 1
    first: int = 0
    mask: int | None = None
    slow: bool = False


_LIST = [
    Case("one", 1, 1, 1, "the smallest input"),
    Case("tiny", 2, 20, 7, "smaller than any tile in every dimension", sparsity=2),
    Case("one_dense", 1, 1, 1, "the smallest input", kind="rademacher"),
    Case("no_rows", 0, 100, 8, "nothing to project"),
    Case("no_columns", 3, 0, 8, "the sum of nothing", kind="rademacher"),
    Case("to_one", 3, 1000, 1, "every coordinate falls into one number", first=77),
    Case("odd", 5, 2345, 97, "a multiple of nothing", first=13),
    Case("odd_dense", 5, 1345, 97, "a multiple of nothing, from within a word of signs", kind="rademacher", first=13),
    Case("several", 9, 3001, 1000, "several entries a coordinate, parts of unequal length", sparsity=3, first=5),
    Case("all_rows", 2, 300, 7, "as many entries as numbers: a dense matrix", sparsity=7),
    Case("whole_blocks", 8, 8192, 1024, "a multiple of every tile: no tail code runs"),
    Case("whole_blocks_dense", 8, 4096, 1024, "the same", kind="rademacher"),
    Case("more_than_given", 2, 50, 3000, "more numbers than coordinates"),
    Case("far", 3, 700, 64, "blocks of coordinates on both sides of 2^32", first=64 * 2**32 - 300),
    Case("far_dense", 3, 300, 40, "words of signs on both sides of 2^32", kind="rademacher", first=2**37 - 100),
    Case("near_the_end", 2, 200, 33, "coordinates near 2^63", first=2**63 - 300),
    Case("masked", 4, 5000, 64, "a random coordinate of each stretch (GraSS)", mask=256, first=1000),
    Case("lora_grass", 8, 921_600, 8192, "GraSS: 4 k coordinates of SmolLM2-135M's adapters", mask=32_768, slow=True),
    Case("million", 8, 1_000_000, 8192, "LoRA gradients of a small model, 8 examples, TRAK's k", slow=True),
    Case("million_dense", 8, 1_000_000, 8192, "the same, dense signs", kind="rademacher", slow=True),
]
CASES = {case.name: case for case in _LIST}


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> tuple[Any, ...]:
    """What compute() takes: (x, k, kind, sparsity, seed, first, out); out is added to."""
    x, k, options, out = make_call(case, dtype, device, seed)
    if case.mask is not None:
        x, options["first"] = masked(x, case.kind, options["seed"], case.first, case.mask, options["total"])
    return x, k, case.kind, case.sparsity, options["seed"], options["first"], out


def make_call(
    case: Case, dtype: torch.dtype, device: torch.device | str, seed: int = 0
) -> tuple[torch.Tensor, int, dict[str, Any], torch.Tensor]:
    """(x, k, options of random_projection, out that is added to). Drawn on the CPU: every device gets the same."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(case.b, case.p, generator=generator).to(device, dtype)
    out = torch.randn(case.b, case.k, generator=generator)
    options = {"kind": case.kind, "sparsity": case.sparsity, "seed": 2**63 + seed, "first": case.first}
    if case.mask is not None:
        options |= {"mask": case.mask, "total": case.first + case.p + 1234}
    return x, case.k, options, out.to(device, torch.float64 if dtype == torch.float64 else torch.float32)


def cost(case: Case) -> tuple[float, float]:
    """Floating-point operations, and bytes that must move at 4 bytes a number: what the roofline is drawn from."""
    read = case.p if case.mask is None else case.mask
    flops = 2.0 * case.b * read * (case.k if case.kind == "rademacher" else case.sparsity)
    return flops, 4.0 * (case.b * read + 2 * case.b * case.k)
