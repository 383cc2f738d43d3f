# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Device functions that several Triton kernels share."""

import triton
import triton.language as tl

from fastsel.kernels._runtime.triton_launch import INTERPRETED

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Stands for minus infinity where a difference is taken: exp2(MASKED - x) is 0 and 0 * MASKED is 0, never NaN.
MASKED = tl.constexpr(-1.0e30)
_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def tile_product(a, b, accumulator, PRECISION: tl.constexpr):
    """accumulator + a @ b, accumulated in float32; PRECISION is how float32 inputs are multiplied."""
    if _INTERPRETED:  # the interpreter's dot multiplies the bit patterns of bfloat16
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def soft_capped(x, cap):
    """cap * tanh(x / cap), absolute error of a few float32 roundings of cap; tl has no tanh of its own."""
    return cap - 2.0 * cap / (tl.exp2(x * (2.0 * LOG2_E / cap)) + 1.0)
