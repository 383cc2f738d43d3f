"""tree_attention by the compiled library: checks what it takes, allocates, hands over pointers."""

from ctypes import POINTER, byref, c_float, c_int32, c_int64, c_void_p

import torch

from fastsel.kernels._runtime import native
from fastsel.kernels.tree_attention.segments import Segments

QUERY_BLOCK = 64


def unsupported(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    window: int | None,
    softcap: float | None,
    scale: float,
) -> str | None:
    """Why the compiled library cannot take these inputs, or None."""
    if query.device.type != "cpu":
        return f"runs on the CPU, the tensors are on {query.device}"
    if query.dtype != torch.float32:
        return f"takes float32, got {str(query.dtype).removeprefix('torch.')}"
    if query.shape[0] >= 2**31:
        return f"counts positions in 32 bits, got {query.shape[0]} rows"
    return native.unavailable()


def compute(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    window: int | None,
    softcap: float | None,
    scale: float,
) -> torch.Tensor:
    """See api.tree_attention."""
    (t, h, d), (hk, dv), threads = query.shape, value.shape[1:], native.num_threads()
    out = query.new_empty(t, h, dv)
    if out.numel() == 0:
        return out
    query, key, value = (x if x.stride(2) == 1 else x.contiguous() for x in (query, key, value))
    rows, owners = segments.query_blocks(QUERY_BLOCK)
    needed = c_int64()
    native.function(
        "tree_attention_workspace", c_void_p, c_int64, c_int64, c_int64, c_int64, c_int32, POINTER(c_int64)
    )(segments.starts.data_ptr(), len(segments), hk, d, dv, threads, byref(needed))
    workspace = torch.empty(needed.value, dtype=torch.uint8, device="cpu")
    strided = (c_void_p, c_int64, c_int64)
    native.function(
        "tree_attention",
        *(*strided, *strided, *strided, *[c_int64] * 5),
        *(c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_int64),
        *(c_int64, c_float, c_float, c_int32, c_void_p, c_void_p),
    )(
        *(pointer for x in (query, key, value) for pointer in (x.data_ptr(), x.stride(0), x.stride(1))),
        *(t, h, hk, d, dv),
        *(segments.starts.data_ptr(), segments.parents.data_ptr(), segments.first_positions_tensor.data_ptr()),
        *(len(segments), rows.data_ptr(), owners.data_ptr(), len(rows), QUERY_BLOCK),
        *(0 if window is None else min(window, 2**31 - 1), softcap or 0.0, scale),
        *(threads, workspace.data_ptr(), out.data_ptr()),
    )
    return out


def gradient(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    d_out: torch.Tensor,
    segments: Segments,
    window: int | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See gradient.tree_attention_gradient."""
    (t, h, d), (hk, dv) = query.shape, value.shape[1:]
    threads = min(native.num_threads(), len(segments) * hk)  # a thread's room is as large as the longest segment
    gradients = query.new_empty(t, h, d), query.new_empty(t, hk, d), query.new_empty(t, hk, dv)
    if t == 0 or dv == 0:
        return gradients[0].zero_(), gradients[1].zero_(), gradients[2]
    inputs = [x if x.stride(2) == 1 else x.contiguous() for x in (query, key, value, d_out)]
    needed = c_int64()
    native.function("tree_attention_gradient_workspace", *[c_int64] * 4, c_void_p, c_int64, c_int32, POINTER(c_int64))(
        h, hk, d, dv, segments.starts.data_ptr(), len(segments), threads, byref(needed)
    )
    workspace = torch.empty(needed.value, dtype=torch.float32, device="cpu")
    native.function(
        "tree_attention_gradient",
        *(c_void_p, c_int64, c_int64) * 4,
        *(c_int64, c_int64, c_int64, c_int64, c_void_p, c_int64, c_int64, c_float, c_int32, c_void_p),
        *(c_void_p, c_void_p, c_void_p),
    )(
        *(part for x in inputs for part in (x.data_ptr(), x.stride(0), x.stride(1))),
        *(h, hk, d, dv, segments.starts.data_ptr(), len(segments)),
        *(0 if window is None else min(window, 2**31 - 1), scale, threads, workspace.data_ptr()),
        *(x.data_ptr() for x in gradients),
    )
    return gradients
