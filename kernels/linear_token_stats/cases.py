"""Named shapes of linear_token_stats: tests, benchmarks and `fastsel doctor --check` read them here."""

from typing import Any, NamedTuple

import torch


class Case(NamedTuple):
    """t rows, d features, v words, and why this shape is here."""

    name: str
    t: int
    d: int
    v: int
    why: str
    bias: bool = False
    softcap: float | None = None
    scale: float = 1.0
    slow: bool = False


_LIST = [
    Case("one", 1, 1, 1, "the smallest input: one row, one feature, one word"),
    Case("tiny", 3, 5, 7, "smaller than any tile in every dimension"),
    Case("empty", 0, 8, 10, "no rows at all"),
    Case("odd", 63, 129, 1003, "a multiple of nothing"),
    Case("whole_tiles", 64, 64, 768, "a multiple of every tile: no tail code runs"),
    Case("wide", 33, 2050, 401, "more features than one block of the reduction"),
    Case("all_options", 37, 96, 2111, "bias, softcap and scale together", bias=True, softcap=7.0, scale=0.25),
    Case("bias", 40, 64, 1030, "a bias alone, as in Phi", bias=True),
    Case("smollm2_batch", 400, 576, 49_152, "answer rows of one batch under SmolLM2-135M", slow=True),
    Case("smollm2", 2048, 576, 49_152, "the case that README quotes", slow=True),
    Case("gpt2", 512, 768, 50_257, "GPT-2: an odd vocabulary", slow=True),
    Case("qwen_05b", 512, 896, 151_936, "Qwen2.5-0.5B: a large vocabulary", slow=True),
    Case("many_rows", 70_000, 8, 32_003, "t * v exceeds 2^31", slow=True),
]
CASES = {case.name: case for case in _LIST}
ALL_OUTPUTS = ("nll", "lse", "entropy", "top1_logprob", "top2_logprob", "argmax")


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> tuple[Any, ...]:
    """(hidden, weight, targets, bias, softcap, scale, outputs): logits spread as a language model's (deviation 3).

    About one row in eight has no target. Drawn on the CPU, so that every device gets the same numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(case.t, case.d, generator=generator)
    weight = torch.randn(case.v, case.d, generator=generator) * (3.0 / case.d**0.5 / case.scale)
    bias = torch.randn(case.v, generator=generator) if case.bias else None
    targets = torch.randint(0, case.v, (case.t,), generator=generator)
    targets[torch.rand(case.t, generator=generator) < 0.125] = -1
    hidden, weight = hidden.to(device, dtype), weight.to(device, dtype)
    bias = None if bias is None else bias.to(device, dtype)
    return hidden, weight, targets.to(device), bias, case.softcap, case.scale, ALL_OUTPUTS


def cost(case: Case) -> tuple[float, float]:
    """Floating-point operations, and bytes that must move at 4 bytes a number: what the roofline is drawn from."""
    return 2.0 * case.t * case.v * case.d, 4.0 * (case.t * case.d + case.v * case.d + 6 * case.t)
