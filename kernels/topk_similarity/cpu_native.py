"""topk_similarity by the compiled library: checks what it takes, allocates, hands over pointers."""

from ctypes import POINTER, byref, c_int32, c_int64, c_void_p

import torch

from fastsel.kernels._runtime import native
from fastsel.kernels.topk_similarity.contenders import common_centre, number_kept

ELEMENT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
SELF_ROWS = 1000  # as many points, searched among themselves, are multiplied with each other once, not twice


def unsupported(
    queries: torch.Tensor, points: torch.Tensor, k: int, metric: str, exclude: torch.Tensor | None, minimum: bool
) -> str | None:
    """Why the compiled library cannot take these inputs, or None."""
    if queries.device.type != "cpu":
        return f"runs on the CPU, the tensors are on {queries.device}"
    if queries.dtype not in ELEMENT_TYPES:
        return f"takes float32, bfloat16 and float16, got {str(queries.dtype).removeprefix('torch.')}"
    if points.shape[0] >= 2**31:
        return f"counts points in 32 bits, got {points.shape[0]} points"
    return native.unavailable()


def compute(
    queries: torch.Tensor, points: torch.Tensor, k: int, metric: str, exclude: torch.Tensor | None, minimum: bool
) -> dict[str, torch.Tensor | None]:
    """See api.topk_similarity."""
    (b, d), n, threads = queries.shape, points.shape[0], native.num_threads()
    kept = max(k, min(number_kept(k, exclude), n))
    queries, points = _unit_stride(queries), _unit_stride(points)
    centre = common_centre(points).contiguous() if metric == "sqeuclidean" else None
    exclude = None if exclude is None else exclude.contiguous()
    itself = n >= SELF_ROWS and not minimum and _are_the_same(queries, points)
    needed = c_int64()
    native.function("topk_similarity_workspace", *(c_int64,) * 4, c_int32, c_int32, POINTER(c_int64))(
        b, n, d, kept, itself, threads, byref(needed)
    )
    # dtype and device are spelt out: torch's defaults are the user's to change.
    workspace = torch.empty(needed.value, dtype=torch.float32, device="cpu")
    values = torch.empty(b, k, dtype=torch.float32, device="cpu")
    indices = torch.empty(b, k, dtype=torch.int64, device="cpu")
    lowest = torch.empty(b, dtype=torch.float32, device="cpu") if minimum else None
    native.function(
        "topk_similarity",
        *(c_void_p, c_int64, c_void_p, c_int64, c_int32, c_void_p, c_void_p),
        *(c_int64, c_int64, c_int64, c_int64, c_int64, c_int32, c_int32),
        *(c_void_p, c_void_p, c_void_p, c_void_p),
    )(
        *(queries.data_ptr(), queries.stride(0), points.data_ptr(), points.stride(0), ELEMENT_TYPES[queries.dtype]),
        *(None if x is None else x.data_ptr() for x in (centre, exclude)),
        *(b, n, d, k, kept, itself, threads, workspace.data_ptr(), values.data_ptr(), indices.data_ptr()),
        None if lowest is None else lowest.data_ptr(),
    )
    return {"values": values, "indices": indices, "minimum": lowest}


def _unit_stride(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix itself when its rows are contiguous, else a copy."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _are_the_same(queries: torch.Tensor, points: torch.Tensor) -> bool:
    """Whether both are one matrix in memory."""
    return (
        queries.data_ptr() == points.data_ptr()
        and queries.shape == points.shape
        and queries.stride(0) == points.stride(0)
    )
