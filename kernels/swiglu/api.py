"""The contract of swiglu and its gradient, and the table of implementations."""

from typing import cast

import torch

from fastsel.kernels._runtime.checks import check_tensor
from fastsel.kernels._runtime.dispatch import run

IMPLEMENTATIONS = {  # tried in this order
    "triton": "fastsel.kernels.swiglu.gpu_triton",
    "native": "fastsel.kernels.swiglu.cpu_native",
    "torch": "fastsel.kernels.swiglu.torch_blocked",
    "reference": "fastsel.kernels.swiglu.reference",
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

Pair = tuple[torch.Tensor, torch.Tensor]


def swiglu(gate: torch.Tensor, up: torch.Tensor, *, implementation: str = "auto") -> torch.Tensor:
    """What a gated MLP hands to its last matrix, in one pass.

        out[i, j] = gate[i, j] sigmoid(gate[i, j]) up[i, j]

    Args:
        gate: [t, f] float32 | bfloat16 | float16 | float64, finite; any stride.
        up: [t, f], same dtype and device, finite; any stride.
        implementation: "auto", "triton", "native", "torch" or "reference".

    Returns:
        [t, f], contiguous. Formed in float32 (float64 for float64) and rounded once; torch's two steps round twice.

    Raises:
        ValueError: shapes, dtypes or devices do not match the above.
        NoImplementationError: the implementation asked for cannot take these inputs; the message says why.

    Determinism: an element's bits depend on its own inputs alone; torch: and on its place in a vector.
    Cost: two reads and one write an element, where silu and the product take five. Extra memory: none.
    Source: Shazeer, "GLU variants improve transformer", 2020 (arXiv 2002.05202).
    """
    _check(gate, up)
    with torch.no_grad():
        return cast(torch.Tensor, run(IMPLEMENTATIONS, implementation, gate, up, None, None))


def swiglu_gradient(
    gate: torch.Tensor, up: torch.Tensor, d_out: torch.Tensor, *, out: Pair | None = None, implementation: str = "auto"
) -> Pair:
    """The gradient of sum(swiglu(gate, up) * d_out), silu(gate) formed again.

        s = sigmoid(gate),  d_gate = d_out up s (1 + gate (1 - s)),  d_up = d_out gate s

    Args:
        gate, up: as of swiglu.
        d_out: [t, f], same dtype and device, finite; any stride.
        out: (d_gate, d_up) to write to: [t, f] each, same dtype and device, contiguous; gate, up and d_out themselves
            may be among them. None: new ones.
        implementation: as of swiglu.

    Returns:
        (d_gate [t, f], d_up [t, f]); `out`, where it was given.

    Raises:
        ValueError, NoImplementationError: as swiglu.

    Determinism: as swiglu.
    Cost: three reads and two writes an element, where autograd's own three steps take nine, and keep silu(gate).
    """
    _check(gate, up)
    check_tensor("d_out", d_out, tuple(gate.shape), dtypes=(gate.dtype,), device=gate.device)
    if out is not None and (len(out) != 2 or (out[0].numel() and out[0].data_ptr() == out[1].data_ptr())):
        raise ValueError("out must be two tensors of memory of their own")
    for name, tensor in zip(("out[0]", "out[1]"), out or (), strict=False):
        check_tensor(name, tensor, tuple(gate.shape), dtypes=(gate.dtype,), device=gate.device)
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
    with torch.no_grad():
        return cast(Pair, run(IMPLEMENTATIONS, implementation, gate, up, d_out, out))


def _check(gate: torch.Tensor, up: torch.Tensor) -> None:
    check_tensor("gate", gate, ("t", "f"), dtypes=DTYPES)
    check_tensor("up", up, tuple(gate.shape), dtypes=(gate.dtype,), device=gate.device)
