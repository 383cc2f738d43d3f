"""The tolerance policy, for tests, for the gate before a benchmark, and for `fastsel doctor --check`.

truth = the reference in float64 on the inputs as rounded to the working dtype; plain = the reference in the working
dtype. An implementation may err by twice as much as plain code does, plus a floor that grows with the reduction.
"""

import math
from typing import Any

import torch

from fastsel.kernels._runtime.triton_launch import INTERPRETED

# Where checks of Triton kernels run: on the CPU in the interpreter's process, else on a GPU.
TRITON_DEVICE = "cpu" if INTERPRETED else "cuda"
EPSILON = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def floor(dtype: torch.dtype, reduction_length: int, magnitude: float = 1.0, *, on_a_gpu: bool = False) -> float:
    """Error that any order of summation of so many terms of this magnitude may make (absolute).

    The reduction is accumulated in float32 at least; the result is rounded to `dtype`. A GPU's matrix units cut what
    they add up, 16 terms at a time, instead of rounding: these errors, half a unit in the last place, have one sign.
    float32 numbers split into two parts each leave out the product of the smaller ones: a unit or two.
    """
    accumulate = EPSILON[torch.float64 if dtype == torch.float64 else torch.float32]
    units = math.sqrt(max(1, reduction_length))
    if on_a_gpu:
        units = max(units + 2, reduction_length / 32)
    return magnitude * (EPSILON[dtype] + accumulate * units)


def assert_as_exact(
    got: torch.Tensor, truth: torch.Tensor, plain: torch.Tensor, *, reduction_length: int, what: str = "result"
) -> float:
    """Fail unless max|got - truth| <= 2 max|plain - truth| + floor; return the error that was found.

    Infinities and NaN must stand in the same places in all three.
    """
    assert got.shape == truth.shape, f"{what}: shape {list(got.shape)}, expected {list(truth.shape)}"
    got64, truth64, plain64 = (x.detach().to("cpu", torch.float64) for x in (got, truth, plain))
    special = ~torch.isfinite(truth64)
    same = (got64 == truth64) | (got64.isnan() & truth64.isnan())
    assert bool(same[special].all()), f"{what}: inf or NaN differ"
    assert torch.isfinite(got64[~special]).all(), f"{what}: not finite where the reference is"
    if bool(special.all()):
        return 0.0
    error = (got64 - truth64)[~special].abs().max().item()
    plain_error = (plain64 - truth64)[~special].abs().max().item()
    magnitude = max(1.0, truth64[~special].abs().max().item())
    allowed = 2 * plain_error + floor(plain.dtype, reduction_length, magnitude, on_a_gpu=got.is_cuda)
    assert error <= allowed, f"{what}: error {error:.3e}, allowed {allowed:.3e} (plain code errs by {plain_error:.3e})"
    return error


def placed(value: Any) -> Any:
    """A tensor, or a NamedTuple's, where Triton's kernels run, with the strides it has; anything else as it is."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(placed, value))
    if not isinstance(value, torch.Tensor) or value.device.type == TRITON_DEVICE:
        return value
    there = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=TRITON_DEVICE)
    return there.copy_(value)
