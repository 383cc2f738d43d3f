"""novelty by the compiled library: checks what it takes, allocates, hands over pointers."""

from ctypes import POINTER, byref, c_int32, c_int64, c_void_p

import torch

from fastsel.kernels._runtime import native

ELEMENT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def unsupported(
    rows: torch.Tensor,
    picks: torch.Tensor,
    weights: torch.Tensor,
    row_density: torch.Tensor | None,
    pick_density: torch.Tensor | None,
    rank_by: str,
) -> str | None:
    """Why the compiled library cannot take these inputs, or None."""
    if rows.device.type != "cpu":
        return f"runs on the CPU, the tensors are on {rows.device}"
    if rows.dtype not in ELEMENT_TYPES:
        return f"takes float32, bfloat16 and float16, got {str(rows.dtype).removeprefix('torch.')}"
    if picks.shape[0] >= 2**31:
        return f"counts picks in 32 bits, got {picks.shape[0]} picks"
    return native.unavailable()


def compute(
    rows: torch.Tensor,
    picks: torch.Tensor,
    weights: torch.Tensor,
    row_density: torch.Tensor | None,
    pick_density: torch.Tensor | None,
    rank_by: str,
) -> torch.Tensor:
    """See api.novelty; weights [t, s], result [n, s]."""
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    picks = picks if picks.stride(1) == 1 else picks.contiguous()
    row_density = None if row_density is None else row_density.to(torch.float32).contiguous()
    # dtype and device are spelt out: torch's defaults are the user's to change.
    out = torch.empty(len(rows), weights.shape[1], dtype=torch.float32, device="cpu")
    if rank_by == "order":
        _in_order(rows, picks, weights.double(), row_density, pick_density, out)
    else:
        _sorted(rows, picks, weights, row_density, pick_density, rank_by, out)
    return out


def _in_order(
    rows: torch.Tensor,
    picks: torch.Tensor,
    weights: torch.Tensor,
    row_density: torch.Tensor | None,
    pick_density: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """The picks are summed first: torch_blocked.py has the formula."""
    (n, d), s = rows.shape, weights.shape[1]
    by_pick = weights if pick_density is None else weights * pick_density.double()[:, None]
    has_both = row_density is not None and pick_density is not None
    parts = torch.cat([weights, by_pick], dim=1) if has_both else by_pick
    sums, vectors = parts.sum(0), (parts.T @ picks.double()).to(torch.float32).contiguous()
    native.function(
        "novelty_order",
        *(c_void_p, c_int64, c_int32, c_void_p, c_void_p, c_void_p),
        *(c_int64, c_int64, c_int64, c_int32, c_int32, c_void_p),
    )(
        *(rows.data_ptr(), rows.stride(0), ELEMENT_TYPES[rows.dtype], _pointer(row_density)),
        *(vectors.data_ptr(), sums.data_ptr(), n, d, s, int(has_both), native.num_threads(), out.data_ptr()),
    )


def _sorted(
    rows: torch.Tensor,
    picks: torch.Tensor,
    weights: torch.Tensor,
    row_density: torch.Tensor | None,
    pick_density: torch.Tensor | None,
    rank_by: str,
    out: torch.Tensor,
) -> None:
    (n, d), (t, s), threads = rows.shape, weights.shape, native.num_threads()
    pick_density = None if pick_density is None else pick_density.to(torch.float32).contiguous()
    weights_st = weights.double().T.contiguous()
    needed = c_int64()
    native.function("novelty_workspace", c_int64, c_int64, c_int64, c_int32, POINTER(c_int64))(
        n, t, d, threads, byref(needed)
    )
    workspace = torch.empty(needed.value, dtype=torch.float32, device="cpu")
    native.function(
        "novelty",
        *(c_void_p, c_int64, c_void_p, c_int64, c_int32, c_void_p, c_void_p, c_void_p),
        *(c_int64, c_int64, c_int64, c_int64, c_int32, c_int32, c_void_p, c_void_p),
    )(
        *(rows.data_ptr(), rows.stride(0), picks.data_ptr(), picks.stride(0), ELEMENT_TYPES[rows.dtype]),
        *(_pointer(row_density), _pointer(pick_density), weights_st.data_ptr(), n, t, d, s),
        *(int(rank_by == "distance"), threads, workspace.data_ptr(), out.data_ptr()),
    )


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def columns(rows: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """See columns.similarity_columns."""
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    vectors = vectors if vectors.stride(1) == 1 else vectors.contiguous()
    (n, d), c = rows.shape, len(vectors)
    out = torch.empty(c, n, dtype=torch.float32, device="cpu")
    native.function("novelty_columns", *(c_void_p, c_int64) * 2, *(c_int64,) * 3, c_int32, c_void_p)(
        *(rows.data_ptr(), rows.stride(0), vectors.data_ptr(), vectors.stride(0)),
        *(n, c, d, native.num_threads(), out.data_ptr()),
    )
    return out
