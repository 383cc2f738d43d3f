"""Named shapes of lora_gradient_sketch: tests, benchmarks and `fastsel doctor --check` read them here."""

from typing import Any, NamedTuple

import torch

from fastsel.kernels.lora_gradient_sketch.options import AdamStep, SketchSpec


class Case(NamedTuple):
    """Tokens of each example, the module's sizes, what becomes of the gradients, and why this shape is here.

    step: a name of STEPS. s: targets. k: of the sketch, 0 for none.
    """

    name: str
    lengths: tuple[int, ...]
    d_in: int
    d_out: int
    r: int
    why: str
    step: str = "less"
    s: int = 0
    k: int = 0
    kind: str = "sjlt"
    sparsity: int = 1
    slow: bool = False


STEPS: dict[str, dict[str, Any] | None] = {  # options of AdamStep
    "less": {},
    "published": {"eps_inside": False, "correction1": 1 - 0.9**3, "correction2": 1 - 0.999**3},
    "bergson": {"eps_inside": False, "momentum": False, "frozen": True},
    "frozen": {"frozen": True},
    "no_eps": {"eps": 0.0},
    "sgd": None,
    "sign": None,
}
# 14 rows of the bundled pool, 1,905 tokens: what one packed batch of SmolLM2-135M holds.
PACK = (31, 38, 52, 67, 74, 88, 95, 112, 133, 158, 187, 229, 283, 358)

_LIST = [
    Case("one", (1,), 1, 1, 1, "the smallest input: one token, one entry in A and one in B", s=1, k=1),
    Case("tiny", (2, 1, 3), 5, 3, 2, "smaller than any tile in every dimension", s=2, k=7),
    Case("empty", (), 8, 8, 2, "no examples at all", s=3, k=5),
    Case("no_tokens", (0, 4, 0), 8, 12, 2, "examples without tokens: pure momentum", s=3, k=5),
    Case("sgd", (9, 17, 4), 20, 33, 3, "no step", "sgd", 5, 50),
    Case("sign", (9, 17, 4), 20, 33, 3, "the sign of the gradient", "sign", 5, 50),
    Case("published", (9, 17, 4), 33, 20, 5, "Adam as published, third step", "published", 5, 50),
    Case("bergson", (9, 17, 4), 20, 33, 3, "no momentum, v frozen, eps outside", "bergson", 5, 50),
    Case("frozen", (9, 17, 4), 20, 33, 3, "v frozen", "frozen", 5, 50),
    Case("no_eps", (9, 17, 4), 20, 33, 3, "nothing keeps denominators from 0", "no_eps", 5, 50),
    Case("norms", (30, 5), 48, 32, 8, "norms alone"),
    Case("odd", (70, 1, 300, 13, 29), 203, 131, 9, "a multiple of nothing, a segment of two blocks", s=17, k=1001),
    Case("whole_tiles", (32,) * 8, 256, 256, 16, "a multiple of every tile: no tail code runs", s=16, k=1024),
    Case("sparse", (40, 60), 96, 64, 8, "three nonzeros a coordinate", k=100, sparsity=3),
    Case("many_short", (1, 2) * 70, 64, 48, 8, "more examples than one block, one or two tokens each", s=3, k=64),
    Case("q_proj", PACK, 576, 576, 8, "SmolLM2-135M, 16 targets", s=16),
    Case("k_proj", PACK, 576, 192, 8, "SmolLM2-135M, SJLT", k=8192),
    Case("rank_128", (200, 300), 1024, 1024, 128, "LESS's rank", s=16, k=8192, slow=True),
    Case("llama", (300,) * 4, 4096, 4096, 128, "one module of Llama-2-7B under LESS", s=16, k=8192, slow=True),
]
CASES = {case.name: case for case in _LIST}


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> tuple[Any, ...]:
    """What compute() takes: (x, delta, lora_a, lora_b, offsets, scale, adam, sign, targets, sketch, out).

    The state is as large as the gradients, so that no term of the step vanishes. Drawn on the CPU, so that every device
    gets the same numbers; the state stays float32 whatever the dtype.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    t, p = sum(case.lengths), case.r * (case.d_in + case.d_out)
    x, delta = normal(t, case.d_in), normal(t, case.d_out) / 100
    lora_a, lora_b = normal(case.r, case.d_in) / case.d_in**0.5, normal(case.d_out, case.r) / 10
    offsets = torch.tensor([0, *case.lengths]).cumsum(0)
    options = STEPS[case.step]
    adam = None
    if options is not None:
        state = normal(p).to(device) / 10, (0.01 + normal(p).square() / 25).to(device)
        adam = AdamStep(*state, **options)
    targets = (normal(case.s, p) / p**0.5).to(device, dtype) if case.s else None
    sketch = SketchSpec(case.k, seed=7, first=1000, sparsity=case.sparsity, kind=case.kind) if case.k else None
    tensors = tuple(tensor.to(device, dtype) for tensor in (x, delta, lora_a, lora_b))
    return *tensors, offsets, 2.0, adam, case.step == "sign", targets, sketch, None


def cost(case: Case) -> tuple[float, float]:
    """Floating-point operations, and bytes that must move at 4 bytes a number: what the roofline is drawn from."""
    t, n, p = sum(case.lengths), len(case.lengths), case.r * (case.d_in + case.d_out)
    flops = 4.0 * t * p + n * p * (2.0 * case.s + 12)
    return flops, 4.0 * (t * (case.d_in + case.d_out) + p * (2 + case.s) + n * case.k)
