# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Information gains of sparse label rows on a GPU.

Who owns what: a program of the first kernel evaluates phi or its slope for BLOCK_L labels, once a call. One of the
    second owns BLOCK_R rows and walks their entries BLOCK_E at a time; a row's terms are added in a fixed tree, without
    atomics, so its bits do not depend on the other rows.
Reads: 4 bytes and a value an entry, once, neighbouring rows side by side; 16 bytes of offsets a row; the table (8 bytes
    a label) from the first-level cache, where 4,531 labels take 36 KB. Writes: 8 bytes a row.
Accumulator: float64 throughout: greedy choices are made on these numbers. Powers are exp2(y log2 x) in float64.
Limits: none but the contract's; a block with one long row walks all its rows that far (rows are not sorted by length).

Ladder, predicted from the compiled kernel and measured: docs/measured.md, "label_gain".
"""

import torch
import triton
import triton.language as tl

from fastsel.kernels._runtime.devices import triton_architecture
from fastsel.kernels._runtime.triton_blocks import LOG2_E
from fastsel.kernels._runtime.triton_launch import Launch, no_device
from fastsel.kernels.label_gain.label_rows import LabelRows

BLOCK_L = 256
# (architecture, rule): BLOCK_R, BLOCK_E, num_warps
LAUNCH_TABLE = {
    ("sm_80", "first_order"): (32, 16, 4),
    ("sm_80", "exact"): (32, 16, 4),
    ("sm_90", "first_order"): (32, 16, 4),
    ("sm_90", "exact"): (32, 16, 4),
    ("sm_100", "first_order"): (32, 16, 4),
    ("sm_100", "exact"): (32, 16, 4),
    ("gfx942", "first_order"): (32, 16, 4),
    ("gfx942", "exact"): (32, 16, 4),
}


@triton.jit
def information(x, A: tl.constexpr, B: tl.constexpr, ALPHA: tl.constexpr, EXPONENTIAL: tl.constexpr):
    """phi of float64 x."""
    if EXPONENTIAL:
        y = 1.0 - tl.exp2(x * (-ALPHA * LOG2_E))
    else:
        y = tl.exp2(tl.log2(x + A) * B)
    return y


@triton.jit
def table_kernel(
    state_ptr, table_ptr, L, A: tl.constexpr, B: tl.constexpr, ALPHA: tl.constexpr,
    EXPONENTIAL: tl.constexpr, EXACT: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """This program writes phi (exact) or its slope for BLOCK_L labels."""
    at = tl.program_id(0).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    x = tl.load(state_ptr + at, mask=at < L, other=1.0)
    if EXACT:
        y = information(x, A, B, ALPHA, EXPONENTIAL)
    elif EXPONENTIAL:
        y = tl.exp2(x * (-ALPHA * LOG2_E)) * ALPHA
    else:
        y = tl.exp2(tl.log2(x + A) * (B - 1.0)) * B
    tl.store(table_ptr + at, y, mask=at < L)


@triton.jit
def gain_kernel(
    indptr_ptr, indices_ptr, values_ptr, state_ptr, table_ptr, rows_ptr, gains_ptr, N,
    A: tl.constexpr, B: tl.constexpr, ALPHA: tl.constexpr, EXPONENTIAL: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """This program sums the terms of BLOCK_R rows."""
    place = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    live = place < N
    row = place
    if rows_ptr is not None:
        row = tl.load(rows_ptr + place, mask=live, other=0)
    first = tl.load(indptr_ptr + row, mask=live, other=0)
    stop = tl.load(indptr_ptr + row + 1, mask=live, other=0)
    in_e = tl.arange(0, BLOCK_E)
    terms = tl.zeros([BLOCK_R, BLOCK_E], tl.float64)
    for start in range(0, tl.max(stop - first, axis=0).to(tl.int32), BLOCK_E):
        at = first[:, None] + (start + in_e)[None, :]  # [BLOCK_R, BLOCK_E]
        there = at < stop[:, None]
        label = tl.load(indices_ptr + at, mask=there, other=0)
        value = tl.load(values_ptr + at, mask=there, other=0.0).to(tl.float64)
        here = tl.load(table_ptr + label, mask=there, other=0.0)
        if EXACT:
            x = tl.load(state_ptr + label, mask=there, other=1.0)
            raised = information(x + value, A, B, ALPHA, EXPONENTIAL)
            terms += tl.where(there, raised - here, 0.0)
        else:
            terms += value * here
    tl.store(gains_ptr + place, tl.sum(terms, axis=1), mask=live)


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
    """Why these inputs cannot run here, or None."""
    return no_device(state)


def plan(
    label_rows: LabelRows,
    state: torch.Tensor,
    rows: torch.Tensor | None,
    rule: str,
    phi: str,
    a: float,
    b: float,
    alpha: float,
    *,
    architecture: str,
) -> tuple[torch.Tensor, list[Launch]]:
    """The (still unwritten) gains and the launches that write them, for a key of LAUNCH_TABLE."""
    block_r, block_e, num_warps = LAUNCH_TABLE[architecture, rule]
    count = len(label_rows) if rows is None else len(rows)
    gains = state.new_empty(count)
    table = state.new_empty(label_rows.n_labels)
    # Parameters are compile-time constants: as arguments they would be rounded to float32.
    curve = {"A": a, "B": b, "ALPHA": alpha, "EXPONENTIAL": phi == "exp", "EXACT": rule == "exact"}
    state = state.contiguous()
    tabulate = Launch(
        table_kernel,
        (triton.cdiv(label_rows.n_labels, BLOCK_L),),
        {"state_ptr": state, "table_ptr": table, "L": label_rows.n_labels},
        curve | {"BLOCK_L": BLOCK_L},
        {"num_warps": 4},
    )
    add_up = Launch(
        gain_kernel,
        (triton.cdiv(count, block_r),),
        {"indptr_ptr": label_rows.indptr, "indices_ptr": label_rows.indices, "values_ptr": label_rows.values}
        | {"state_ptr": state, "table_ptr": table, "gains_ptr": gains, "N": count}
        | {"rows_ptr": None if rows is None else rows.contiguous()},
        curve | {"BLOCK_R": block_r, "BLOCK_E": block_e},
        {"num_warps": num_warps},
    )
    return gains, [tabulate, add_up]


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
    gains, launches = plan(label_rows, state, rows, rule, phi, a, b, alpha, architecture=triton_architecture(state))
    for launch in launches:
        launch.run()
    return gains
