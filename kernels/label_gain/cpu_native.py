"""label_gain by the compiled library: checks what it takes, allocates, hands over pointers."""

from ctypes import c_double, c_int32, c_int64, c_void_p

import torch

from fastsel.kernels._runtime import native
from fastsel.kernels.label_gain.label_rows import LabelRows

VALUE_TYPES = {torch.float32: 0, torch.float64: 1}


def unsupported(
    label_rows: LabelRows,
    state: torch.Tensor,
    rows: torch.Tensor | None,
    rule: str,
    phi: str,
    a: float,
    b: float,
    alpha: float,
) -> str | None:
    """Why the compiled library cannot take these inputs, or None."""
    if label_rows.device.type != "cpu":
        return f"runs on the CPU, the tensors are on {label_rows.device}"
    if label_rows.values.dtype not in VALUE_TYPES:
        return f"takes float32 and float64 values, got {str(label_rows.values.dtype).removeprefix('torch.')}"
    return native.unavailable()


def compute(
    label_rows: LabelRows,
    state: torch.Tensor,
    rows: torch.Tensor | None,
    rule: str,
    phi: str,
    a: float,
    b: float,
    alpha: float,
) -> torch.Tensor:
    """See api.label_gain."""
    state = state.contiguous()
    rows = None if rows is None else rows.contiguous()
    count = len(label_rows) if rows is None else len(rows)
    # dtype and device are spelt out: torch's defaults are the user's to change.
    table = torch.empty(label_rows.n_labels, dtype=torch.float64, device="cpu")
    gains = torch.empty(count, dtype=torch.float64, device="cpu")
    native.function(
        "label_gain",
        *(c_void_p, c_void_p, c_void_p, c_int32, c_void_p, c_int64, c_void_p, c_int64),
        *(c_int32, c_int32, c_double, c_double, c_double, c_int32, c_void_p, c_void_p),
    )(
        *(label_rows.indptr.data_ptr(), label_rows.indices.data_ptr(), label_rows.values.data_ptr()),
        *(VALUE_TYPES[label_rows.values.dtype], state.data_ptr(), label_rows.n_labels),
        *(None if rows is None else rows.data_ptr(), count),
        *(rule == "exact", phi == "exp", a, b, alpha, native.num_threads(), table.data_ptr(), gains.data_ptr()),
    )
    return gains
