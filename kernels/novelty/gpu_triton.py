# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Density-weighted distances of rows to picks on a GPU, each row's sorted and summed by rank.

Who owns what: "order" is one kernel, a program owns BLOCK_N rows and one set of weights and reads its rows once. The
    others take two steps: a program of values_kernel owns a tile of rows x picks and writes its weighted distances;
    a program of sort_kernel owns RUN values of one row (of several where RUN is short), sorts them in registers and
    sums them with their weights. Rows with more picks are sorted in up to RUNS runs, and a program of merge_kernel,
    which owns a row, finds the rank of each value by binary search in the other runs. More picks than that are
    torch.sort's (torch_blocked.py).
Reads and writes: "order" reads rows once, 4 bytes x d of vectors a program from the cache, and writes 4 bytes a row.
    The others write and read 4 bytes a value, 8 with "distance" (the distance in front of the value, as one whole
    number), twice that with runs; for a block of contenders that is less than the second-level cache.
Accumulator: float32 for products, float64 for the sums over ranks. float32 products: three TF32 products ("tf32x3") on
    NVIDIA, true float32 on AMD. Equal keys keep the order of their runs, so that bits repeat.
Limits: float32, bfloat16, float16; any strides, but rows that are no multiple of 16 elements are read narrowly.

Ladder: docs/measured.md has the predicted times and what was tried and those measured on an H200.
"""

import torch
import triton
import triton.language as tl

from fastsel.kernels._runtime.devices import triton_architecture
from fastsel.kernels._runtime.triton_blocks import tile_product
from fastsel.kernels._runtime.triton_launch import Launch, Programs, Work, no_device

RUN = {"weighted": 4096, "distance": 2048}  # most values that one program sorts: 4 and 8 bytes each
RUNS = 8  # most runs of a row
SORTED_VALUES = 1024  # a program sorts several rows at once where they are shorter
# (architecture, bytes of an element, alignment): BLOCK_N, BLOCK_T, BLOCK_D, num_warps, num_stages, float32 products
LAUNCH_TABLE = {
    ("sm_80", 2, "aligned"): (64, 128, 64, 4, 3, "ieee"),
    ("sm_80", 2, "unaligned"): (64, 64, 32, 4, 2, "ieee"),
    ("sm_80", 4, "aligned"): (64, 64, 32, 4, 3, "tf32x3"),
    ("sm_80", 4, "unaligned"): (64, 32, 32, 4, 2, "tf32x3"),
    ("sm_90", 2, "aligned"): (64, 128, 64, 4, 3, "ieee"),
    ("sm_90", 2, "unaligned"): (64, 64, 32, 4, 2, "ieee"),
    ("sm_90", 4, "aligned"): (64, 64, 32, 4, 3, "tf32x3"),
    ("sm_90", 4, "unaligned"): (64, 64, 32, 4, 2, "tf32x3"),
    ("sm_100", 2, "aligned"): (128, 128, 64, 8, 3, "ieee"),
    ("sm_100", 2, "unaligned"): (64, 64, 32, 4, 2, "ieee"),
    ("sm_100", 4, "aligned"): (64, 64, 32, 4, 3, "tf32x3"),
    ("sm_100", 4, "unaligned"): (64, 64, 32, 4, 2, "tf32x3"),
    ("gfx942", 2, "aligned"): (64, 128, 64, 4, 2, "ieee"),
    ("gfx942", 2, "unaligned"): (64, 64, 32, 4, 2, "ieee"),
    ("gfx942", 4, "aligned"): (64, 64, 32, 4, 2, "ieee"),
    ("gfx942", 4, "unaligned"): (64, 64, 32, 4, 2, "ieee"),
}
ORDER_BLOCK = {2: (16, 256, 4), 4: (16, 128, 4)}  # bytes of an element: BLOCK_N, BLOCK_D, num_warps of "order"


@triton.jit
def order_kernel(
    rows_ptr, density_ptr, vectors_ptr, sums_ptr, out_ptr, N, D, S, stride_rows_n, stride_rows_d,
    BOTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
):  # fmt: skip
    """density (sums[s] - rows . vectors[s]), plus the same of the second half of the vectors when BOTH."""
    one_set = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows past the end read the last one again: the loop needs no mask for them.
    safe_rows = tl.minimum(rows, N - 1)
    in_d = tl.arange(0, BLOCK_D)
    rows_at = rows_ptr + safe_rows[:, None] * stride_rows_n + in_d[None, :] * stride_rows_d
    first_at = vectors_ptr + one_set * D + in_d
    second_at = first_at + S * D
    first = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    second = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for d0 in range(0, D, BLOCK_D):
        if EVEN_D:
            x = tl.load(rows_at + d0 * stride_rows_d).to(tl.float32)
            a = tl.load(first_at + d0)
        else:
            x = tl.load(rows_at + d0 * stride_rows_d, mask=(in_d + d0 < D)[None, :], other=0.0).to(tl.float32)
            a = tl.load(first_at + d0, mask=in_d + d0 < D, other=0.0)
        first += x * a[None, :]
        if BOTH:
            b = tl.load(second_at + d0, mask=in_d + d0 < D, other=0.0)
            second += x * b[None, :]
    value = tl.load(sums_ptr + one_set) - tl.sum(first, axis=1).to(tl.float64)
    if density_ptr is not None:
        value *= tl.load(density_ptr + safe_rows)
    if BOTH:
        value += tl.load(sums_ptr + S + one_set) - tl.sum(second, axis=1).to(tl.float64)
    tl.store(out_ptr + rows * S + one_set, value.to(tl.float32), mask=rows < N)


@triton.jit
def _ordered_bits(x):
    """int32 in the order of the float32 numbers; its own inverse, on bits."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value_of(key):
    """The weighted distance in a key: itself, or the low half of a 64-bit one."""
    if key.dtype == tl.int64:
        low = (key ^ 0x80000000).to(tl.int32)
        value = (low ^ ((low >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    else:
        value = key
    return value


@triton.jit
def values_kernel(
    rows_ptr, picks_ptr, row_density_ptr, pick_density_ptr, keys_ptr, N, T, D, T_PADDED,
    stride_rows_n, stride_rows_d, stride_picks_t, stride_picks_d,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
    BY_DISTANCE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """This program writes the keys of BLOCK_N rows x BLOCK_T picks; beyond the picks, the greatest key."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    safe_rows, safe_cols = tl.minimum(rows, N - 1), tl.minimum(cols, T - 1)
    in_d = tl.arange(0, BLOCK_D)
    rows_at = rows_ptr + safe_rows[:, None] * stride_rows_n + in_d[None, :] * stride_rows_d
    picks_at = picks_ptr + safe_cols[:, None] * stride_picks_t + in_d[None, :] * stride_picks_d
    product = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    for d0 in range(0, D, BLOCK_D):
        if EVEN_D:
            x = tl.load(rows_at + d0 * stride_rows_d)
            y = tl.load(picks_at + d0 * stride_picks_d)
        else:
            x = tl.load(rows_at + d0 * stride_rows_d, mask=(in_d + d0 < D)[None, :], other=0.0)
            y = tl.load(picks_at + d0 * stride_picks_d, mask=(in_d + d0 < D)[None, :], other=0.0)
        product = tile_product(x, tl.trans(y), product, PRECISION)
    distance = 1.0 - product
    value = distance
    if row_density_ptr is not None:
        row_density = tl.load(row_density_ptr + safe_rows).to(tl.float32)
        if pick_density_ptr is not None:
            value = distance * (row_density[:, None] + tl.load(pick_density_ptr + safe_cols).to(tl.float32)[None, :])
        else:
            value = distance * row_density[:, None]
    elif pick_density_ptr is not None:
        value = distance * tl.load(pick_density_ptr + safe_cols).to(tl.float32)[None, :]
    at = keys_ptr + rows[:, None] * T_PADDED + cols[None, :]
    live = (rows < N)[:, None] & (cols < T_PADDED)[None, :]
    if BY_DISTANCE:
        low = _ordered_bits(value).to(tl.int64) & 0xFFFFFFFF
        keys = (_ordered_bits(distance).to(tl.int64) << 32) | (low ^ 0x80000000)
        keys = tl.where((cols < T)[None, :], keys, 0x7FFFFFFFFFFFFFFF)
        tl.store(at, keys, mask=live)
    else:
        tl.store(at, tl.where((cols < T)[None, :], value, float("inf")), mask=live)


@triton.jit
def sort_kernel(
    keys_ptr, weights_ptr, out_ptr, N, T, S, T_PADDED, BLOCK_N: tl.constexpr, RUN: tl.constexpr
):  # fmt: skip
    """This program sorts one run of BLOCK_N rows: it writes the sums where that is all, else the sorted run."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    places = tl.arange(0, RUN)
    safe_rows = tl.minimum(rows, N - 1)
    at = safe_rows[:, None] * T_PADDED + tl.program_id(1) * RUN + places[None, :]
    keys = tl.sort(tl.load(keys_ptr + at))
    if out_ptr is not None:
        values = _value_of(keys).to(tl.float64)
        live = places < T
        for one_set in range(0, S):
            weights = tl.load(weights_ptr + one_set * T + places, mask=live, other=0.0)
            total = tl.sum(tl.where(live[None, :], values * weights[None, :], 0.0), axis=1)
            tl.store(out_ptr + rows * S + one_set, total.to(tl.float32), mask=rows < N)
    else:
        tl.store(keys_ptr + at, keys, mask=(rows < N)[:, None])


@triton.jit
def merge_kernel(keys_ptr, weights_ptr, out_ptr, T, S, T_PADDED, RUN: tl.constexpr, STEPS: tl.constexpr):
    """This program ranks one row's sorted runs among each other and writes the sums; 2^STEPS is RUN."""
    row = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, RUN)
    base = keys_ptr + row * T_PADDED
    for one_set in range(0, S):
        total = tl.zeros([RUN], tl.float64)
        for begin in range(0, T_PADDED, RUN):
            keys = tl.load(base + begin + places)
            rank = places
            for other in range(0, T_PADDED, RUN):
                # How many keys of the other run come first: equal ones do if that run does. After STEPS halvings
                # `found` is that number, or the one before the last when all RUN come first.
                found = tl.zeros([RUN], tl.int32)
                for step in tl.static_range(STEPS):
                    tried = found + (RUN >> (step + 1))
                    probe = tl.load(base + other + tried - 1)
                    found = tl.where((probe < keys) | ((probe == keys) & (other < begin)), tried, found)
                probe = tl.load(base + other + found)
                found += ((probe < keys) | ((probe == keys) & (other < begin))).to(tl.int32)
                rank += tl.where(other == begin, 0, found)
            live = rank < T
            weights = tl.load(weights_ptr + one_set * T + rank, mask=live, other=0.0)
            total += tl.where(live, _value_of(keys).to(tl.float64) * weights, 0.0)
        tl.store(out_ptr + row * S + one_set, tl.sum(total, axis=0).to(tl.float32))


def unsupported(
    rows: torch.Tensor,
    picks: torch.Tensor,
    weights: torch.Tensor,
    row_density: torch.Tensor | None,
    pick_density: torch.Tensor | None,
    rank_by: str,
) -> str | None:
    """Why these inputs cannot run here, or None."""
    if rows.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"takes float32, bfloat16 and float16; rows is {str(rows.dtype).removeprefix('torch.')}"
    if rank_by != "order" and len(picks) > RUNS * RUN[rank_by]:
        return f"sorts at most {RUNS * RUN[rank_by]} picks a row by {rank_by}, got {len(picks)}: torch sorts them"
    for name, x in (("rows", rows), ("picks", picks)):
        if x.stride(1) != 1 and x.shape[1] * x.stride(1) >= 2**31:
            return f"counts elements along a row in 32 bits; {name} spreads {x.shape[1]} over {x.stride(1)} each"
    return no_device(rows)


def plan(
    rows: torch.Tensor,
    picks: torch.Tensor,
    weights: torch.Tensor,
    row_density: torch.Tensor | None,
    pick_density: torch.Tensor | None,
    rank_by: str,
    *,
    architecture: str,
) -> tuple[torch.Tensor, list[Launch]]:
    """The (still unwritten) result [n, s] and the launches that write it, for an architecture of LAUNCH_TABLE."""
    (n, d), (t, s) = rows.shape, weights.shape
    if t == 0:
        return rows.new_zeros(n, s, dtype=torch.float32), []
    out = rows.new_empty(n, s, dtype=torch.float32)
    density = None if row_density is None else row_density.contiguous()
    if rank_by == "order":
        return out, [_order_launch(rows, picks, weights, density, pick_density, out)]
    is_aligned = all(x.shape[1] % 16 == 0 and x.stride(0) % 16 == 0 and x.stride(1) == 1 for x in (rows, picks))
    key = (architecture, rows.element_size(), "aligned" if is_aligned else "unaligned")
    block_n, block_t, block_d, num_warps, num_stages, precision = LAUNCH_TABLE[key]
    run = min(RUN[rank_by], max(16, triton.next_power_of_2(t)))
    n_runs, sorted_rows = triton.cdiv(t, run), max(1, SORTED_VALUES // run)
    keys = rows.new_empty(n, n_runs * run, dtype=torch.int64 if rank_by == "distance" else torch.float32)
    values = Launch(
        values_kernel,
        (triton.cdiv(n, block_n), triton.cdiv(n_runs * run, block_t)),
        {"rows_ptr": rows, "picks_ptr": picks, "row_density_ptr": density}
        | {"pick_density_ptr": None if pick_density is None else pick_density.contiguous(), "keys_ptr": keys}
        | {"N": n, "T": t, "D": d, "T_PADDED": n_runs * run}
        | {"stride_rows_n": rows.stride(0), "stride_rows_d": rows.stride(1)}
        | {"stride_picks_t": picks.stride(0), "stride_picks_d": picks.stride(1)},
        {"BLOCK_N": block_n, "BLOCK_T": block_t, "BLOCK_D": block_d, "EVEN_D": d % block_d == 0}
        | {"BY_DISTANCE": rank_by == "distance", "PRECISION": precision},
        {"num_warps": num_warps, "num_stages": num_stages},
    )
    shared = {"keys_ptr": keys, "weights_ptr": weights.T.contiguous(), "T": t, "S": s, "T_PADDED": n_runs * run}
    sort = Launch(
        sort_kernel,
        (triton.cdiv(n, sorted_rows), n_runs),
        shared | {"out_ptr": out if n_runs == 1 else None, "N": n},
        {"RUN": run, "BLOCK_N": sorted_rows},
        {"num_warps": 8 if run > 1024 else 4},
    )
    if n_runs == 1:
        return out, [values, sort]
    steps = run.bit_length() - 1
    merge = Launch(merge_kernel, (n,), shared | {"out_ptr": out}, {"RUN": run, "STEPS": steps}, {"num_warps": 8})
    return out, [values, sort, merge]


def _order_launch(
    rows: torch.Tensor,
    picks: torch.Tensor,
    weights: torch.Tensor,
    density: torch.Tensor | None,
    pick_density: torch.Tensor | None,
    out: torch.Tensor,
) -> Launch:
    """The picks are summed first: torch_blocked.py has the formula."""
    (n, d), s = rows.shape, weights.shape[1]
    by_pick = weights if pick_density is None else weights * pick_density[:, None]
    is_both = density is not None and pick_density is not None
    parts = torch.cat([weights, by_pick], dim=1) if is_both else by_pick
    block_n, block_d, num_warps = ORDER_BLOCK[rows.element_size()]
    return Launch(
        order_kernel,
        (triton.cdiv(n, block_n), s),
        {"rows_ptr": rows, "density_ptr": density, "vectors_ptr": (parts.T @ picks.double()).float().contiguous()}
        | {"sums_ptr": parts.sum(0), "out_ptr": out, "N": n, "D": d, "S": s}
        | {"stride_rows_n": rows.stride(0), "stride_rows_d": rows.stride(1)},
        {"BOTH": is_both, "BLOCK_N": block_n, "BLOCK_D": block_d, "EVEN_D": d % block_d == 0},
        {"num_warps": num_warps},
    )


def work(launch: Launch, n: int, t: int, d: int) -> Work:
    """What values_kernel executes and what its task needs, for a predicted time."""
    c, itemsize = launch.constants, launch.arguments["rows_ptr"].element_size()
    products = 3 if c["PRECISION"] == "tf32x3" else 1
    return Work(
        programs=[Programs(launch.grid[0] * launch.grid[1], (triton.cdiv(d, c["BLOCK_D"]),), 1)],
        flops=products * 2 * c["BLOCK_N"] * c["BLOCK_T"] * c["BLOCK_D"],
        cache_bytes=(c["BLOCK_N"] + c["BLOCK_T"]) * c["BLOCK_D"] * itemsize,
        matrix_units="16-bit" if itemsize == 2 else "tf32",
        needed_flops=products * 2 * n * t * d,
        needed_exponentials=0,
        needed_bytes=(n + t) * d * itemsize + 4 * n * t,
    )


def compute(
    rows: torch.Tensor,
    picks: torch.Tensor,
    weights: torch.Tensor,
    row_density: torch.Tensor | None,
    pick_density: torch.Tensor | None,
    rank_by: str,
) -> torch.Tensor:
    """See api.novelty; weights [t, s], result [n, s]."""
    result, launches = plan(
        rows, picks, weights, row_density, pick_density, rank_by, architecture=triton_architecture(rows)
    )
    for launch in launches:
        launch.run()
    return result
