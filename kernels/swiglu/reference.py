"""swiglu and its gradient as their formulas read."""

import torch


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
    dtype = gate.dtype
    gate, up = (x.to(torch.promote_types(dtype, torch.float32)) for x in (gate, up))
    s = torch.sigmoid(gate)
    if d_out is None:
        return (gate * s * up).to(dtype).contiguous()
    d_gate = (d_out * up * s * (1 + gate * (1 - s))).to(dtype).contiguous()
    d_up = (gate * s * d_out).to(dtype).contiguous()
    return (d_gate, d_up) if out is None else (out[0].copy_(d_gate), out[1].copy_(d_up))
