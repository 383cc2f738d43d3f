"""lora_gradient_sketch by the compiled library: checks what it takes, allocates, hands over pointers."""

from ctypes import POINTER, Structure, byref, c_double, c_int64, c_void_p
from typing import Any

import torch

from fastsel.kernels._runtime import native
from fastsel.kernels.lora_gradient_sketch.options import AdamStep, GradientSketch, SketchSpec

ELEMENT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
RANKS = 8  # ranks are padded to a multiple of this, the most that any instruction set's tile has


class _Problem(Structure):
    """struct Problem of cpu_native.cpp."""

    _fields_ = [
        *((name, c_void_p) for name in ("x", "delta")),
        *((name, c_int64) for name in ("x_stride", "delta_stride", "type")),
        *((name, c_void_p) for name in ("lora_a", "lora_b_turned", "offsets")),
        *((name, c_int64) for name in ("n", "d_in", "d_out", "r")),
        ("scale", c_double),
        ("step", c_int64),
        *((name, c_void_p) for name in ("exp_avg", "exp_avg_sq")),
        *((name, c_double) for name in ("of_m", "of_g", "of_v", "of_gg", "eps")),
        ("eps_inside", c_int64),
        ("targets", c_void_p),
        *((name, c_int64) for name in ("targets_stride", "targets_type", "s")),
        *((name, c_int64) for name in ("k", "sparsity", "seed", "first", "threads")),
        *((name, c_void_p) for name in ("workspace", "dots", "sqnorms", "sketch")),
    ]


def unsupported(
    x: torch.Tensor, delta: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, offsets: torch.Tensor,
    scale: float, adam: AdamStep | None, sign: bool, targets: torch.Tensor | None, sketch: SketchSpec | None,
    out: torch.Tensor | None,
) -> str | None:  # fmt: skip
    """Why the compiled library cannot take these inputs, or None."""
    if x.device.type != "cpu":
        return f"runs on the CPU, the tensors are on {x.device}"
    for name, tensor in (("x", x), ("targets", targets)):
        if tensor is not None and tensor.dtype not in ELEMENT_TYPES:
            return f"takes float32, bfloat16 and float16; {name} is {str(tensor.dtype).removeprefix('torch.')}"
    if sketch is not None and sketch.kind != "sjlt":
        return f"sketches by SJLT, got {sketch.kind}: torch does that"
    return native.unavailable()


def compute(
    x: torch.Tensor, delta: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, offsets: torch.Tensor,
    scale: float, adam: AdamStep | None, sign: bool, targets: torch.Tensor | None, sketch: SketchSpec | None,
    out: torch.Tensor | None,
) -> GradientSketch:  # fmt: skip
    """See api.lora_gradient_sketch."""
    n, (r, d_in), d_out = len(offsets) - 1, lora_a.shape, delta.shape[1]
    # dtype and device are spelt out: torch's defaults are the user's to change.
    dots = None if targets is None else torch.zeros(n, len(targets), dtype=torch.float64, device="cpu")
    sqnorms = torch.zeros(n, dtype=torch.float64, device="cpu")
    projected = out
    if sketch is not None and (out is None or not out.is_contiguous()):
        projected = torch.zeros(n, sketch.k, dtype=torch.float32, device="cpu")
    result = GradientSketch(dots, sqnorms, projected)
    if n == 0:
        return result
    kept = [_rows(x), _rows(delta), _padded(lora_a, r), _padded(lora_b.T, r), offsets.contiguous()]
    problem = _Problem(
        x=kept[0].data_ptr(), delta=kept[1].data_ptr(), x_stride=kept[0].stride(0), delta_stride=kept[1].stride(0),
        type=ELEMENT_TYPES[x.dtype], lora_a=kept[2].data_ptr(), lora_b_turned=kept[3].data_ptr(),
        offsets=kept[4].data_ptr(), n=n, d_in=d_in, d_out=d_out, r=r, scale=scale, step=2 if sign else 0,
        threads=native.num_threads(), sqnorms=sqnorms.data_ptr(),
    )  # fmt: skip
    if adam is not None:
        kept += _adam(problem, adam)
    if targets is not None and dots is not None:
        targets = _rows(targets)
        problem.targets, problem.targets_stride, problem.s = targets.data_ptr(), targets.stride(0), len(targets)
        problem.targets_type, problem.dots = ELEMENT_TYPES[targets.dtype], dots.data_ptr()
    if sketch is not None and projected is not None:
        problem.k, problem.sparsity, problem.first = sketch.k, sketch.sparsity, sketch.first
        problem.seed, problem.sketch = (sketch.seed + 2**63) % 2**64 - 2**63, projected.data_ptr()
    needed = c_int64()
    native.function("lora_gradient_sketch_workspace", POINTER(_Problem), POINTER(c_int64))(problem, byref(needed))
    workspace = torch.empty(needed.value, dtype=torch.float32, device="cpu")
    problem.workspace = workspace.data_ptr()
    native.function("lora_gradient_sketch", POINTER(_Problem))(problem)
    if out is not None and projected is not None and projected is not out:
        return result._replace(sketch=out.add_(projected))
    return result


def _adam(problem: Any, adam: AdamStep) -> list[torch.Tensor]:
    """Fills in the step; what it points to must live as long as the problem."""
    problem.step, problem.eps, problem.eps_inside = 1, adam.eps, int(adam.eps_inside)
    problem.of_m, problem.of_g, problem.of_v, problem.of_gg = adam.factors()
    kept = [adam.exp_avg_sq.to(torch.float32).contiguous()]
    problem.exp_avg_sq = kept[0].data_ptr()
    if adam.momentum and adam.exp_avg is not None:
        kept.append(adam.exp_avg.to(torch.float32).contiguous())
        problem.exp_avg = kept[1].data_ptr()
    return kept


def _rows(matrix: torch.Tensor) -> torch.Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _padded(weight: torch.Tensor, r: int) -> torch.Tensor:
    """[r rounded up to RANKS, d] float32, zeros below."""
    padded = torch.zeros(-(-r // RANKS) * RANKS, weight.shape[1], dtype=torch.float32, device="cpu")
    padded[:r] = weight
    return padded
