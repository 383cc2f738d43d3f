"""swiglu and its gradient against plain torch: F.silu(gate) * up, and the steps that autograd takes backwards."""

import pytest
import torch
import torch.nn.functional as F

from fastsel.kernels._runtime.testing import assert_as_exact
from fastsel.kernels.swiglu import reference, swiglu, swiglu_gradient
from fastsel.kernels.swiglu.cases import CASES, Case, make_inputs

SHAPES = [
    pytest.param(Case("gate", 600, 1536, True, "a part of a batch of SmolLM2-135M"), marks=pytest.mark.gate),
    CASES["smollm2_gradient"],
    pytest.param(CASES["llama_gradient"], marks=pytest.mark.slow),
]
by_shape = pytest.mark.parametrize("case", SHAPES, ids=lambda case: case.name)
by_implementation = pytest.mark.parametrize("implementation", ["native", "torch"])


def near_float64(gate, up, d_out):
    """Both sides' first rows against the formulas in float64."""

    def check(*sides):
        few = [x[:500] for x in (gate, up, d_out)]
        truth, plain = (reference.compute(*(x.to(dtype) for x in few), None) for dtype in (torch.float64, gate.dtype))
        forward = [
            reference.compute(*(x.to(dtype) for x in few[:2]), None, None) for dtype in (torch.float64, gate.dtype)
        ]
        expected = {1: [forward], 2: list(zip(truth, plain, strict=True))}
        expected[3] = expected[1] + expected[2]
        for side in sides:
            found = side if isinstance(side, tuple) else (side,)
            for got, (exact, same) in zip(found, expected[len(found)], strict=True):
                assert_as_exact(got[:500], exact, same, reduction_length=1)

    return check


@by_implementation
@by_shape
def test_forward(compare, case, implementation):
    gate, up, d_out, _ = make_inputs(case, torch.float32, "cpu")
    compare(
        lambda: swiglu(gate, up, implementation=implementation), lambda: F.silu(gate) * up,
        op="swiglu", case=f"{case.t:,} x {case.f:,}, {implementation}", name="torch, silu and product",
        check=near_float64(gate, up, d_out), rounds=30,
    )  # fmt: skip


@by_implementation
@by_shape
def test_gradient(compare, case, implementation):
    """Autograd has kept silu(gate), which ours forms again: torch's making of it is not timed."""
    gate, up, d_out, _ = make_inputs(case, torch.float32, "cpu")
    silu = F.silu(gate)
    compare(
        lambda: swiglu_gradient(gate, up, d_out, implementation=implementation),
        lambda: (torch.ops.aten.silu_backward(d_out * up, gate), d_out * silu),
        op="swiglu_gradient", case=f"{case.t:,} x {case.f:,}, {implementation}", name="torch, autograd's steps",
        check=near_float64(gate, up, d_out), rounds=30,
    )  # fmt: skip


@by_implementation
@by_shape
def test_forward_and_gradient(compare, peak_memory, case, implementation):
    """A step of training, by autograd itself; silu(gate) waits between its two halves."""
    gate, up, d_out, _ = make_inputs(case, torch.float32, "cpu")
    leaves = gate.clone().requires_grad_(), up.clone().requires_grad_()

    def ours():
        out = swiglu(gate, up, implementation=implementation)
        return out, *swiglu_gradient(gate, up, d_out, implementation=implementation)

    def autograd():
        out = F.silu(leaves[0]) * leaves[1]
        return out.detach(), *torch.autograd.grad(out, leaves, d_out)

    (_, our_peak), (_, peer_peak) = peak_memory(ours), peak_memory(autograd)
    found = compare(
        ours, autograd, op="swiglu and gradient", case=f"{case.t:,} x {case.f:,}, {implementation}",
        name="torch, autograd", check=near_float64(gate, up, d_out), rounds=30,
        info={"our_peak_bytes": our_peak, "peer_peak_bytes": peer_peak},
    )  # fmt: skip
    assert implementation != "native" or found.ratio_cpu > 1.0
