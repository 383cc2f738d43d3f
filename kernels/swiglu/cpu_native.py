"""swiglu and its gradient by the compiled library: checks what it takes, allocates, hands over pointers."""

from ctypes import c_int32, c_int64, c_void_p

import torch

from fastsel.kernels._runtime import native

# Below this many elements for each, another thread costs more than it does.
ELEMENTS_OF_THREAD = 1 << 15


def unsupported(
    gate: torch.Tensor,
    up: torch.Tensor,
    d_out: torch.Tensor | None,
    out: tuple[torch.Tensor, torch.Tensor] | None,
) -> str | None:
    """Why the compiled library cannot take these inputs, or None."""
    if gate.device.type != "cpu":
        return f"runs on the CPU, the tensors are on {gate.device}"
    if gate.dtype != torch.float32:
        return f"takes float32, got {str(gate.dtype).removeprefix('torch.')}"
    return native.unavailable()


def compute(
    gate: torch.Tensor,
    up: torch.Tensor,
    d_out: torch.Tensor | None,
    out: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """See api.swiglu, and api.swiglu_gradient where d_out is given."""
    gate, up = gate.contiguous(), up.contiguous()
    threads = max(1, min(native.num_threads(), gate.numel() // ELEMENTS_OF_THREAD))
    size = c_int64(gate.numel()), c_int32(threads)
    if d_out is None:
        result = torch.empty_like(gate)
        native.function("swiglu", *[c_void_p] * 3, c_int64, c_int32)(
            gate.data_ptr(), up.data_ptr(), result.data_ptr(), *size
        )
        return result
    d_out = d_out.contiguous()
    d_gate, d_up = out or (torch.empty_like(gate), torch.empty_like(gate))
    native.function("swiglu_gradient", *[c_void_p] * 5, c_int64, c_int32)(
        *(x.data_ptr() for x in (gate, up, d_out, d_gate, d_up)), *size
    )
    return d_gate, d_up
