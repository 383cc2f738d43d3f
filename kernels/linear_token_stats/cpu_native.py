"""linear_token_stats by the compiled library: checks what it takes, allocates, hands over pointers."""

from ctypes import POINTER, byref, c_float, c_int32, c_int64, c_void_p

import torch

from fastsel.kernels._runtime import native

ELEMENT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def unsupported(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    scale: float,
    outputs: tuple[str, ...],
) -> str | None:
    """Why the compiled library cannot take these inputs, or None."""
    if hidden.device.type != "cpu":
        return f"runs on the CPU, the tensors are on {hidden.device}"
    if hidden.dtype not in ELEMENT_TYPES:
        return f"takes float32, bfloat16 and float16, got {str(hidden.dtype).removeprefix('torch.')}"
    if weight.shape[0] >= 2**31:
        return f"counts words in 32 bits, got {weight.shape[0]} words"
    return native.unavailable()


def compute(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    scale: float,
    outputs: tuple[str, ...],
) -> dict[str, torch.Tensor]:
    """See api.linear_token_stats."""
    (t, d), v, threads = hidden.shape, weight.shape[0], native.num_threads()
    hidden, weight = _unit_stride(hidden), _unit_stride(weight)
    targets = targets.contiguous()
    bias = None if bias is None else bias.to(torch.float32).contiguous()
    needed = c_int64()
    native.function("linear_token_stats_workspace", c_int64, c_int64, c_int64, c_int32, POINTER(c_int64))(
        t, d, v, threads, byref(needed)
    )
    # dtype and device are spelt out: torch's defaults are the user's to change.
    workspace = torch.empty(needed.value, dtype=torch.float32, device="cpu")
    values = {
        name: torch.empty(t, dtype=torch.int64 if name == "argmax" else torch.float32, device="cpu") for name in outputs
    }
    fields = ("nll", "lse", "entropy", "top1_logprob", "top2_logprob", "argmax")
    native.function(
        "linear_token_stats",
        *(c_void_p, c_int64, c_void_p, c_int64, c_int32, c_void_p, c_void_p, c_float, c_float),
        *(c_int64, c_int64, c_int64, c_int32, c_void_p),
        *(c_void_p for _ in fields),
    )(
        *(hidden.data_ptr(), hidden.stride(0), weight.data_ptr(), weight.stride(0), ELEMENT_TYPES[hidden.dtype]),
        *(targets.data_ptr(), None if bias is None else bias.data_ptr(), softcap or 0.0, scale),
        *(t, d, v, threads, workspace.data_ptr()),
        *(values[name].data_ptr() if name in values else None for name in fields),
    )
    return values


def _unit_stride(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix itself when its rows are contiguous, else a copy."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()
