# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""swiglu and its gradient on a GPU: each number is read once, each result written once.

Who owns what: a program owns BLOCK neighbouring elements, of the whole matrix where all inputs are contiguous, else of
    one row. It has read all that it owns before it writes: an output may lie where an input lies.
Reads: two numbers an element, three for the gradient. Writes: one, or two. Nothing comes between but registers.
Accumulator: float32, float64 for float64; one rounding. 1 / (1 + 2^(-x log2 e)): 2^ goes to infinity or 0 at the ends,
    where the sigmoid is 0 or 1.
Limits: rows of any stride; a matrix whose rows are not runs of memory is copied first. Rows whose strides are no
    multiple of 16 elements are read narrowly. Fewer than 2^31 programs, of which a strided row takes one at least.

Predicted from the compiled kernel: docs/measured.md, "swiglu".
"""

from typing import Any

import torch
import triton
import triton.language as tl

from fastsel.kernels._runtime.devices import triton_architecture
from fastsel.kernels._runtime.triton_blocks import LOG2_E
from fastsel.kernels._runtime.triton_launch import Launch, no_device

Pair = tuple[torch.Tensor, torch.Tensor]
# (architecture, bytes of an element): BLOCK, num_warps; two vectors of 16 bytes a thread and input, on AMD one
LAUNCH_TABLE = {
    ("sm_80", 2): (2048, 4),
    ("sm_80", 4): (1024, 4),
    ("sm_80", 8): (512, 4),
    ("sm_90", 2): (2048, 4),
    ("sm_90", 4): (1024, 4),
    ("sm_90", 8): (512, 4),
    ("sm_100", 2): (2048, 4),
    ("sm_100", 4): (1024, 4),
    ("sm_100", 8): (512, 4),
    ("gfx942", 2): (2048, 4),
    ("gfx942", 4): (1024, 4),
    ("gfx942", 8): (512, 4),
}


@triton.jit
def block_of_row(N, TILES, BLOCK: tl.constexpr):
    """This program's row, its places in that row, and which of them are there."""
    program = tl.program_id(0).to(tl.int64)
    at = program % TILES * BLOCK + tl.arange(0, BLOCK)
    return program // TILES, at, at < N


@triton.jit
def loaded(row_ptr, at, live):
    """Numbers of a row, in float32 at least."""
    x = tl.load(row_ptr + at, mask=live, other=0.0)
    return x if x.dtype == tl.float64 else x.to(tl.float32)


@triton.jit
def sigmoid(x):
    """Of any x, in its own precision."""
    return 1.0 / (1.0 + tl.exp2(x * -LOG2_E))


@triton.jit
def swiglu_kernel(gate_ptr, up_ptr, out_ptr, N, TILES, stride_gate, stride_up, stride_out, BLOCK: tl.constexpr):
    """This program forms BLOCK elements of silu(gate) * up."""
    row, at, live = block_of_row(N, TILES, BLOCK)
    z = loaded(gate_ptr + row * stride_gate, at, live)
    u = loaded(up_ptr + row * stride_up, at, live)
    tl.store(out_ptr + row * stride_out + at, z * sigmoid(z) * u, mask=live)


@triton.jit
def gradient_kernel(
    gate_ptr, up_ptr, d_out_ptr, d_gate_ptr, d_up_ptr, N, TILES,
    stride_gate, stride_up, stride_d_out, stride_out, BLOCK: tl.constexpr,
):  # fmt: skip
    """This program forms BLOCK elements of both gradients."""
    row, at, live = block_of_row(N, TILES, BLOCK)
    z = loaded(gate_ptr + row * stride_gate, at, live)
    u = loaded(up_ptr + row * stride_up, at, live)
    d = loaded(d_out_ptr + row * stride_d_out, at, live)
    s = sigmoid(z)
    tl.store(d_gate_ptr + row * stride_out + at, d * u * s * (1.0 + z * (1.0 - s)), mask=live)
    tl.store(d_up_ptr + row * stride_out + at, z * s * d, mask=live)


def unsupported(gate: torch.Tensor, up: torch.Tensor, d_out: torch.Tensor | None, out: Pair | None) -> str | None:
    """Why these inputs cannot run here, or None."""
    return no_device(gate)


def plan(
    gate: torch.Tensor, up: torch.Tensor, d_out: torch.Tensor | None, out: Pair | None, *, architecture: str
) -> tuple[torch.Tensor | Pair, list[Launch]]:
    """The (still unwritten) results and the launch that writes them, for a key of LAUNCH_TABLE."""
    block, num_warps = LAUNCH_TABLE[architecture, gate.element_size()]
    t, f = gate.shape
    inputs = {"gate": gate, "up": up} if d_out is None else {"gate": gate, "up": up, "d_out": d_out}
    inputs = {name: x if x.stride(1) == 1 else x.contiguous() for name, x in inputs.items()}
    is_flat = all(x.is_contiguous() for x in inputs.values())
    rows, n = (1, t * f) if is_flat else (t, f)
    tiles = triton.cdiv(n, block)
    arguments: dict[str, Any] = {f"{name}_ptr": x for name, x in inputs.items()}
    # The only row of a flat matrix is at 0: strides of 0 are multiples of everything.
    arguments |= {f"stride_{name}": 0 if is_flat else x.stride(0) for name, x in inputs.items()}
    arguments |= {"stride_out": 0 if is_flat else f, "N": n, "TILES": tiles}
    results = [gate.new_empty(t, f)] if d_out is None else list(out or (gate.new_empty(t, f) for _ in range(2)))
    arguments |= dict(zip(["out_ptr"] if d_out is None else ["d_gate_ptr", "d_up_ptr"], results, strict=True))
    kernel = swiglu_kernel if d_out is None else gradient_kernel
    launch = Launch(kernel, (rows * tiles,), arguments, {"BLOCK": block}, {"num_warps": num_warps})
    return results[0] if d_out is None else (results[0], results[1]), [launch]


def compute(gate: torch.Tensor, up: torch.Tensor, d_out: torch.Tensor | None, out: Pair | None) -> torch.Tensor | Pair:
    """See api.swiglu, and api.swiglu_gradient where d_out is given."""
    results, launches = plan(gate, up, d_out, out, architecture=triton_architecture(gate))
    for launch in launches:
        launch.run()
    return results
