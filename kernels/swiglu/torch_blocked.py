"""swiglu and its gradient in plain torch, each step over the whole matrix where nothing has to be widened.

16-bit inputs, and results that are written where an input lies, go a block of rows at a time on a CPU: that bounds the
float32 copies beside the results. Elsewhere blocks save nothing: small ones stay in cache, but wake the threads for so
little that this costs more (docs/measured.md, "swiglu").
"""

import torch
import torch.nn.functional as F

BLOCK_ELEMENTS = 1 << 19


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
    inputs = [gate, up] if d_out is None else [gate, up, d_out]
    if gate.dtype == wide and out is None:
        results = [x.contiguous() for x in _formed(*inputs)]
    else:
        results = list(out or (gate.new_empty(t, f) for _ in inputs[1:]))
        rows = max(1, BLOCK_ELEMENTS // max(1, f)) if gate.device.type == "cpu" else max(1, t)
        for start in range(0, t, rows):
            block = slice(start, start + rows)
            for to, part in zip(results, _formed(*(x[block].to(wide) for x in inputs)), strict=True):
                to[block] = part
    return results[0] if d_out is None else (results[0], results[1])


def _formed(gate: torch.Tensor, up: torch.Tensor, d_out: torch.Tensor | None = None) -> list[torch.Tensor]:
    """New tensors: the output, or the gradients of gate and up."""
    if d_out is None:
        return [F.silu(gate).mul_(up)]
    return [torch.ops.aten.silu_backward(d_out * up, gate), F.silu(gate).mul_(d_out)]
