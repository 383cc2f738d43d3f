"""k_center by the compiled library: checks what it takes, allocates, hands over pointers."""

from ctypes import POINTER, byref, c_int32, c_int64, c_void_p

import torch

from fastsel.kernels._runtime import native
from fastsel.kernels.k_center.api import FARTHEST_BLOCK

ELEMENT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def unsupported(
    points: torch.Tensor,
    centres: torch.Tensor,
    nearest: torch.Tensor | None,
    rows: torch.Tensor | None,
    point_sqnorms: torch.Tensor,
    centre_sqnorms: torch.Tensor,
) -> str | None:
    """Why the compiled library cannot take these inputs, or None."""
    if points.device.type != "cpu":
        return f"runs on the CPU, the tensors are on {points.device}"
    if points.dtype not in ELEMENT_TYPES:
        return f"takes float32, bfloat16 and float16, got {str(points.dtype).removeprefix('torch.')}"
    return native.unavailable()


def compute(
    points: torch.Tensor,
    centres: torch.Tensor,
    nearest: torch.Tensor | None,
    rows: torch.Tensor | None,
    point_sqnorms: torch.Tensor,
    centre_sqnorms: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See api.k_center."""
    b, d = centres.shape
    m, threads = len(points) if rows is None else len(rows), native.num_threads()
    # A matrix whose rows are not contiguous is copied.
    points = points if points.stride(1) == 1 else points.contiguous()
    centres = centres if centres.stride(1) == 1 else centres.contiguous()
    nearest, rows = (None if x is None else x.contiguous() for x in (nearest, rows))
    point_sqnorms, centre_sqnorms = point_sqnorms.contiguous(), centre_sqnorms.contiguous()
    needed = c_int64()
    native.function("k_center_workspace", c_int64, c_int64, c_int32, POINTER(c_int64))(b, d, threads, byref(needed))
    # dtype and device are spelt out: torch's defaults are the user's to change.
    workspace = torch.empty(needed.value, dtype=torch.float32, device="cpu")
    out = torch.empty(m, dtype=torch.float32, device="cpu")
    farthest = torch.empty(-(-m // FARTHEST_BLOCK), dtype=torch.int64, device="cpu")
    native.function(
        "k_center",
        *(c_void_p, c_int64, c_void_p, c_int64, c_int32, c_void_p, c_void_p, c_void_p, c_void_p),
        *(c_int64, c_int64, c_int64, c_int32, c_void_p, c_void_p, c_void_p),
    )(
        *(points.data_ptr(), points.stride(0), centres.data_ptr(), centres.stride(0), ELEMENT_TYPES[points.dtype]),
        *(None if nearest is None else nearest.data_ptr(), None if rows is None else rows.data_ptr()),
        *(point_sqnorms.data_ptr(), centre_sqnorms.data_ptr()),
        *(m, b, d, threads, workspace.data_ptr(), out.data_ptr(), farthest.data_ptr()),
    )
    return out, farthest
