"""swiglu and its gradient in plain torch, a block of rows at a time: what comes between stays in cache."""

import torch
import torch.nn.functional as F

BLOCK_ELEMENTS = 1 << 16


def unsupported(*inputs: object) -> str | None:
    """It takes everything."""
    return None


def compute(
    gate: torch.Tensor,
    up: torch.Tensor,
    d_out: torch.Tensor | None,
    out: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """See api.swiglu, and api.swiglu_gradient where d_out is given."""
    t, f = gate.shape
    wide = torch.promote_types(gate.dtype, torch.float32)
    rows = max(1, BLOCK_ELEMENTS // max(1, f)) if gate.device.type == "cpu" else t
    result = torch.empty_like(gate, memory_format=torch.contiguous_format) if d_out is None else None
    d_gate, d_up = out or (torch.empty_like(gate, memory_format=torch.contiguous_format) for _ in range(2))
    for start in range(0, t, rows):
        block = slice(start, start + rows)
        z, u = gate[block].to(wide), up[block].to(wide)
        if result is not None:
            torch.mul(F.silu(z), u, out=result[block])
        else:
            d = d_out[block].to(wide)
            # All inputs are read before anything is written: out may be gate, up or d_out.
            of_gate, silu = torch.ops.aten.silu_backward(d * u, z), F.silu(z)
            torch.mul(silu, d, out=d_up[block])
            d_gate[block] = of_gate
    return (d_gate, d_up) if result is None else result
