"""random_projection by the compiled library: checks what it takes, allocates, hands over pointers."""

from ctypes import POINTER, byref, c_int32, c_int64, c_uint64, c_void_p

import torch

from fastsel.kernels._runtime import native

ELEMENT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def unsupported(
    x: torch.Tensor,
    k: int,
    kind: str,
    sparsity: int,
    seed: int,
    first: int,
    out: torch.Tensor,
) -> str | None:
    """Why the compiled library cannot take these inputs, or None."""
    if x.device.type != "cpu":
        return f"runs on the CPU, the tensors are on {x.device}"
    if x.dtype not in ELEMENT_TYPES:
        return f"takes float32, bfloat16 and float16, got {str(x.dtype).removeprefix('torch.')}"
    return native.unavailable()


def compute(
    x: torch.Tensor,
    k: int,
    kind: str,
    sparsity: int,
    seed: int,
    first: int,
    out: torch.Tensor,
) -> torch.Tensor:
    """See api.random_projection."""
    (b, p), threads = x.shape, native.num_threads()
    x = x if x.stride(1) == 1 or p == 1 else x.contiguous()  # a matrix whose rows are not contiguous is copied
    sjlt_floats, rademacher_floats = c_int64(), c_int64()
    native.function(
        "random_projection_workspace", c_int64, c_int64, c_int32, POINTER(c_int64), POINTER(c_int64)
    )(b, k, threads, byref(sjlt_floats), byref(rademacher_floats))  # fmt: skip
    needed = sjlt_floats if kind == "sjlt" else rademacher_floats
    # dtype and device are spelt out: torch's defaults are the user's to change.
    workspace = torch.empty(needed.value, dtype=torch.float32, device="cpu")
    matrix = (x.data_ptr(), x.stride(0), ELEMENT_TYPES[x.dtype], b, p, k)
    matrix_types = (c_void_p, c_int64, c_int32, c_int64, c_int64, c_int64)
    results = (threads, workspace.data_ptr(), out.data_ptr(), out.stride(0))
    result_types = (c_int32, c_void_p, c_void_p, c_int64)
    if kind == "sjlt":
        native.function(
            "random_projection_sjlt", *matrix_types, c_int64, c_uint64, c_uint64, *result_types
        )(*matrix, sparsity, seed, first, *results)  # fmt: skip
    else:
        native.function("random_projection_rademacher", *matrix_types, c_uint64, c_uint64, *result_types)(
            *matrix, seed, first, *results
        )
    return out
