"""Named shapes of swiglu: tests, benchmarks and `fastsel doctor --check` read them here."""

from typing import Any, NamedTuple

import torch


class Case(NamedTuple):
    """t tokens, f features of the MLP, forward or gradient, inputs of this size, and why this shape is here."""

    name: str
    t: int
    f: int
    gradient: bool
    why: str
    size: float = 1.0
    slow: bool = False


_LIST = [
    Case("one", 1, 1, False, "the smallest input"),
    Case("tiny", 3, 5, True, "fewer elements than a vector"),
    Case("empty", 0, 8, True, "no tokens at all"),
    Case("odd", 301, 129, False, "a multiple of nothing"),
    Case("odd_gradient", 301, 129, True, "a multiple of nothing"),
    Case("whole_blocks", 256, 512, True, "a multiple of every block: no tail code runs"),
    Case("saturated", 64, 300, False, "gates where the sigmoid is 0 or 1 to the last bit", 60.0),
    Case("saturated_gradient", 64, 300, True, "gates where the sigmoid is 0 or 1 to the last bit", 60.0),
    Case("smollm2", 900, 1536, False, "a batch of SmolLM2-135M"),
    Case("smollm2_gradient", 900, 1536, True, "a batch of SmolLM2-135M"),
    Case("llama", 4096, 11_008, False, "a batch of a Llama of 7B", slow=True),
    Case("llama_gradient", 4096, 11_008, True, "a batch of a Llama of 7B", slow=True),
]
CASES = {case.name: case for case in _LIST}


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> tuple[Any, ...]:
    """(gate, up, d_out or None, None). Drawn on the CPU, so that every device gets the same numbers."""
    generator = torch.Generator().manual_seed(seed)
    gate, up, d_out = (torch.randn(case.t, case.f, generator=generator) for _ in range(3))
    gate *= case.size
    return (
        gate.to(device, dtype), up.to(device, dtype), d_out.to(device, dtype) if case.gradient else None, None,
    )  # fmt: skip


def cost(case: Case) -> tuple[float, float]:
    """Floating-point operations, and bytes that must move at 4 bytes a number: what the roofline is drawn from."""
    return (14.0 if case.gradient else 8.0) * case.t * case.f, 4.0 * (5 if case.gradient else 3) * case.t * case.f
