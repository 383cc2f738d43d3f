# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The most similar points of each query on a GPU; similarities live one tile at a time in registers.

Who owns what: a program of the first kernel owns BLOCK_Q queries x one slice of the points; it walks the slice tile by
    tile and keeps KEPT contenders and the least similarity of each query. A program of the second owns one query: it
    picks KEPT contenders out of those of all slices, computes them anew in float64 and writes the k best.
Reads: points b / BLOCK_Q times from the second-level cache (programs that run together share their slice), queries
    n / BLOCK_P times from the cache; for distances 4 n bytes of squared lengths, written before. Writes: 8 KEPT bytes
    x b x slices, 4 bytes x b x slices for the minimum. The second kernel gathers KEPT rows of points a query.
A tile is compared with the worst kept contender of each query. Entries above it are taken one a query at a time, best
    first, until no query has any: in the first tiles of a slice some dozens of turns, later one every other tile, since
    a query meets about k (1 + ln(n / k)) such entries in all. No sort, no atomics.
Accumulator: float32; float64 in the second kernel. float32 products: three TF32 products ("tf32x3") on NVIDIA.
Ladder, predicted from the compiled kernel for 1,000,000 queries and points, d = 1,024, k = 10, dot products with the
    minimum (measured: docs/measured.md); the loop over entries is counted as one turn a tile:
                bfloat16, H100 (floor 2.07 s)                   A100 (6.57 s)             B200 (0.91 s)
    2026-11-26  128 x 128, 8 warps     4.18 s  cache-bound       8.52 s  shared memory     2.19 s  cache-bound
    2026-11-26  128 x 128, 4 warps     3.46 s  cache-bound       6.63 s, but spills        1.69 s, but spills
    2026-11-26  128 x 256, 8 warps     3.27 s  cache-bound       7.99 s, but spills        1.83 s, but spills
    2026-11-26  128 x 64, 4 warps      -                         8.25 s                    2.53 s
    float32: 13.3 s on H100 (floor 12.4 s), 41.2 s on A100 (39.4 s), 8.7 s on B200 (5.4 s).
    Without the minimum H100 takes 3.21 s; the products alone of 128 x 256 tiles 2.56 s: what the second-level cache of
    5,120 bytes a clock can feed. Distances spill in 128 x 256 (32 bytes a thread), so they keep 128 x 128.
Limits: float32, bfloat16, float16; k up to 59; fewer than 2^31 points.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from fastsel.kernels._runtime.devices import triton_architecture
from fastsel.kernels._runtime.triton_blocks import tile_product
from fastsel.kernels._runtime.triton_launch import Launch, Programs, Work, no_device
from fastsel.kernels.topk_similarity.contenders import common_centre, number_kept

PROGRAMS_WANTED = 512  # enough for every multiprocessor to have several; more slices mean more contenders
LEAST_TILES = 8  # tiles of a slice: below, most of the time goes into first contenders
MOST_KEPT = 64
DECIDE_TILE = 512  # contenders x features that a program of the second kernel holds; 1,024 spill here and there
# (architecture, bytes of an element, variant): BLOCK_Q, BLOCK_P, BLOCK_D, num_warps, num_stages, float32 products
# "few": dot products, at most 16 contenders; "some": at most 32, or distances; "many": up to 64; "unaligned": rows are
# no multiple of 16 elements.
LAUNCH_TABLE = {
    ("sm_80", 2, "few"): (128, 64, 64, 4, 3, "ieee"),
    ("sm_80", 2, "some"): (128, 128, 64, 8, 3, "ieee"),
    ("sm_80", 2, "many"): (64, 128, 64, 8, 3, "ieee"),
    ("sm_80", 2, "unaligned"): (64, 64, 32, 8, 2, "ieee"),
    ("sm_80", 4, "few"): (64, 64, 32, 4, 3, "tf32x3"),
    ("sm_80", 4, "some"): (64, 64, 32, 4, 3, "tf32x3"),
    ("sm_80", 4, "many"): (64, 64, 32, 8, 3, "tf32x3"),
    ("sm_80", 4, "unaligned"): (64, 32, 32, 8, 2, "tf32x3"),
    ("sm_90", 2, "few"): (128, 256, 64, 8, 3, "ieee"),
    ("sm_90", 2, "some"): (128, 128, 64, 8, 3, "ieee"),
    ("sm_90", 2, "many"): (64, 128, 64, 8, 3, "ieee"),
    ("sm_90", 2, "unaligned"): (64, 64, 32, 8, 2, "ieee"),
    ("sm_90", 4, "few"): (128, 128, 32, 8, 3, "tf32x3"),
    ("sm_90", 4, "some"): (128, 64, 32, 8, 3, "tf32x3"),
    ("sm_90", 4, "many"): (64, 64, 32, 8, 3, "tf32x3"),
    ("sm_90", 4, "unaligned"): (64, 64, 32, 8, 2, "tf32x3"),
    ("sm_100", 2, "few"): (128, 128, 64, 8, 3, "ieee"),
    ("sm_100", 2, "some"): (64, 128, 64, 8, 3, "ieee"),
    ("sm_100", 2, "many"): (64, 128, 64, 8, 3, "ieee"),
    ("sm_100", 2, "unaligned"): (64, 64, 32, 8, 2, "ieee"),
    ("sm_100", 4, "few"): (128, 128, 32, 8, 3, "tf32x3"),
    ("sm_100", 4, "some"): (128, 64, 32, 8, 3, "tf32x3"),
    ("sm_100", 4, "many"): (64, 64, 32, 8, 3, "tf32x3"),
    ("sm_100", 4, "unaligned"): (64, 64, 32, 8, 2, "tf32x3"),
    ("gfx942", 2, "few"): (128, 64, 64, 8, 2, "ieee"),
    ("gfx942", 2, "some"): (128, 64, 64, 8, 2, "ieee"),
    ("gfx942", 2, "many"): (64, 64, 64, 8, 2, "ieee"),
    ("gfx942", 2, "unaligned"): (64, 64, 32, 8, 2, "ieee"),
    ("gfx942", 4, "few"): (128, 64, 32, 8, 2, "ieee"),
    ("gfx942", 4, "some"): (128, 64, 32, 8, 2, "ieee"),
    ("gfx942", 4, "many"): (64, 64, 32, 8, 2, "ieee"),
    ("gfx942", 4, "unaligned"): (64, 64, 32, 8, 2, "ieee"),
}


@triton.jit
def scan_kernel(
    queries_ptr, points_ptr, half_squares_ptr, kept_ptr, found_ptr, lowest_ptr,
    B, N, D, SLICES, slice_points, stride_queries_b, stride_queries_d, stride_points_n, stride_points_d,
    BLOCK_Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, KEPT: tl.constexpr,
    EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """This program finds the KEPT most similar points of BLOCK_Q queries within one slice of the points."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    # Rows and columns past the end read the last one again: the inner loop then needs no mask for them.
    safe_rows = tl.minimum(rows, B - 1)
    in_d = tl.arange(0, BLOCK_D)
    in_p = tl.arange(0, BLOCK_P)
    in_kept = tl.arange(0, KEPT)
    queries_at = queries_ptr + safe_rows[:, None] * stride_queries_b + in_d[None, :] * stride_queries_d
    kept = tl.full([BLOCK_Q, KEPT], -float("inf"), tl.float32)
    # Empty places are numbered apart, so that one place at a time is given away.
    found = tl.zeros([BLOCK_Q, KEPT], tl.int32) - 1 - in_kept[None, :]
    worst = tl.full([BLOCK_Q], -float("inf"), tl.float32)
    lowest = tl.full([BLOCK_Q], float("inf"), tl.float32)

    begin = tl.program_id(1) * slice_points
    for p0 in range(begin, tl.minimum(begin + slice_points, N), BLOCK_P):
        cols = p0 + in_p
        safe_cols = tl.minimum(cols, N - 1).to(tl.int64)
        points_at = points_ptr + safe_cols[:, None] * stride_points_n + in_d[None, :] * stride_points_d
        x = tl.zeros([BLOCK_Q, BLOCK_P], tl.float32)
        for d0 in range(0, D, BLOCK_D):
            if EVEN_D:
                q = tl.load(queries_at + d0 * stride_queries_d)
                p = tl.load(points_at + d0 * stride_points_d)
            else:
                q = tl.load(queries_at + d0 * stride_queries_d, mask=(in_d + d0 < D)[None, :], other=0.0)
                p = tl.load(points_at + d0 * stride_points_d, mask=(in_d + d0 < D)[None, :], other=0.0)
            x = tile_product(q, tl.trans(p), x, PRECISION)
        if half_squares_ptr is not None:  # the order of q . p - |p|^2 / 2 is that of the distances
            x -= tl.load(half_squares_ptr + safe_cols)[None, :]
        if lowest_ptr is not None:
            lowest = tl.minimum(lowest, tl.min(x, axis=1))  # of the last point again, past the end: no harm
        x += tl.where(cols < N, 0.0, -float("inf"))[None, :]
        tile_best = tl.max(x, axis=1)
        # Strict: an equal similarity of a later point does not enter; and a NaN never does.
        while tl.max((tile_best > worst).to(tl.int32), axis=0) > 0:
            enters = tile_best > worst
            col = tl.min(tl.where(x == tile_best[:, None], in_p[None, :], BLOCK_P), axis=1)  # ties: the first
            last = tl.max(tl.where(kept == worst[:, None], found, -KEPT - 1), axis=1)  # of equals the last one leaves
            leaves = (found == last[:, None]) & enters[:, None]
            kept = tl.where(leaves, tile_best[:, None], kept)
            found = tl.where(leaves, (p0 + col)[:, None], found)
            worst = tl.min(kept, axis=1)
            x = tl.where(in_p[None, :] == col[:, None], -float("inf"), x)
            tile_best = tl.max(x, axis=1)

    live = rows < B
    part = rows * SLICES + tl.program_id(1)
    at = part[:, None] * KEPT + in_kept[None, :]
    tl.store(kept_ptr + at, kept, mask=live[:, None])
    tl.store(found_ptr + at, found, mask=live[:, None])
    if lowest_ptr is not None:
        tl.store(lowest_ptr + part, lowest, mask=live)


@triton.jit
def decide_kernel(
    queries_ptr, points_ptr, query_squares_ptr, exclude_ptr, kept_ptr, found_ptr, lowest_ptr,
    values_ptr, indices_ptr, minimum_ptr,
    D, SLICES, K, stride_queries_b, stride_queries_d, stride_points_n, stride_points_d,
    ALL_KEPT: tl.constexpr, KEPT: tl.constexpr, BLOCK_D: tl.constexpr, SQUARED: tl.constexpr,
):  # fmt: skip
    """This program takes one query's contenders of all slices, decides them in float64 and writes the K best."""
    row = tl.program_id(0).to(tl.int64)
    in_kept = tl.arange(0, KEPT)
    in_all = tl.arange(0, ALL_KEPT)
    there = in_all < SLICES * KEPT
    kept = tl.load(kept_ptr + row * SLICES * KEPT + in_all, mask=there, other=-float("inf"))
    found = tl.load(found_ptr + row * SLICES * KEPT + in_all, mask=there, other=-1)
    if ALL_KEPT == KEPT:
        contenders = found
    else:
        contenders = tl.zeros([KEPT], tl.int32) - 1
        for place in range(0, KEPT):
            best = tl.max(kept, axis=0)
            is_best = (kept == best) & (found >= 0)
            index = tl.min(tl.where(is_best, found, 2147483647), axis=0)  # ties: the lowest point
            contenders = tl.where(in_kept == place, tl.where(best > -float("inf"), index, -1), contenders)
            kept = tl.where(found == index, -float("inf"), kept)

    is_there = contenders >= 0
    if exclude_ptr is not None:
        is_there = is_there & (contenders != tl.load(exclude_ptr + row))
    in_d = tl.arange(0, BLOCK_D)
    points_at = points_ptr + tl.maximum(contenders, 0).to(tl.int64)[:, None] * stride_points_n
    exact = tl.zeros([KEPT, BLOCK_D], tl.float64)
    for d0 in range(0, D, BLOCK_D):
        in_row = d0 + in_d < D
        at = (d0 + in_d).to(tl.int64)
        q = tl.load(queries_ptr + row * stride_queries_b + at * stride_queries_d, mask=in_row, other=0.0)
        mask = in_row[None, :] & is_there[:, None]
        p = tl.load(points_at + at[None, :] * stride_points_d, mask=mask, other=0.0)
        q = q.to(tl.float64)
        p = p.to(tl.float64)
        if SQUARED:
            exact += (q[None, :] - p) * (q[None, :] - p)
        else:
            exact += q[None, :] * p
    similarity = tl.sum(exact, axis=1)
    if SQUARED:
        similarity = -similarity
    similarity = tl.where(is_there, similarity, -float("inf"))
    is_there = is_there & (similarity > -float("inf"))  # a NaN in float64 ranks nowhere
    similarity = tl.where(is_there, similarity, -float("inf"))
    number = tl.where(is_there, contenders, 2147483647 - in_kept)  # apart, so that no two places are equal
    # A contender's place is how many are better. Both sides of the comparison need the numbers in another layout.
    is_better = similarity[None, :] > similarity[:, None]
    is_equal = similarity[None, :] == similarity[:, None]
    place = tl.sum((is_better | (is_equal & (number[None, :] < number[:, None]))).to(tl.int32), axis=1)
    value = -similarity if SQUARED else similarity
    tl.store(values_ptr + row * K + place, value.to(tl.float32), mask=place < K)
    tl.store(indices_ptr + row * K + place, tl.where(is_there, contenders, -1).to(tl.int64), mask=place < K)
    if minimum_ptr is not None:
        lowest = tl.load(lowest_ptr + row * SLICES + in_all, mask=in_all < SLICES, other=float("inf"))
        least = tl.min(lowest, axis=0)
        if SQUARED:
            # +inf where no similarity was a number
            furthest = tl.maximum(tl.load(query_squares_ptr + row) - 2.0 * least, 0.0)
            least = tl.where(least < float("inf"), furthest, -float("inf"))
        tl.store(minimum_ptr + row, least)


def unsupported(
    queries: torch.Tensor, points: torch.Tensor, k: int, metric: str, exclude: torch.Tensor | None, minimum: bool
) -> str | None:
    """Why these inputs cannot run here, or None."""
    if queries.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"takes float32, bfloat16 and float16; queries are {str(queries.dtype).removeprefix('torch.')}"
    if number_kept(k, exclude) > MOST_KEPT:
        return f"keeps at most {MOST_KEPT} contenders; k = {k} needs {number_kept(k, exclude)}"
    if not 1 <= points.shape[0] < 2**31 - MOST_KEPT:
        return f"takes 1 to 2^31 points; there are {points.shape[0]}"
    for name, x in (("queries", queries), ("points", points)):
        if x.stride(1) != 1 and x.shape[1] * x.stride(1) >= 2**31:
            return f"counts elements along a row in 32 bits; {name} spread {x.shape[1]} over {x.stride(1)} each"
    return no_device(queries)


def plan(
    queries: torch.Tensor,
    points: torch.Tensor,
    k: int,
    metric: str,
    exclude: torch.Tensor | None,
    minimum: bool,
    *,
    architecture: str,
) -> tuple[dict[str, torch.Tensor | None], list[Launch]]:
    """The (still unwritten) results and the launches that write them, for a key of LAUNCH_TABLE."""
    (b, d), n = queries.shape, points.shape[0]
    kept = max(16, triton.next_power_of_2(number_kept(k, exclude)))
    # Triton knows of an alignment only when a stride is a multiple of 16 elements.
    is_aligned = all(x.shape[1] % 16 == 0 and x.stride(0) % 16 == 0 and x.stride(1) == 1 for x in (queries, points))
    is_squared = metric == "sqeuclidean"
    variant = "unaligned" if not is_aligned else "many" if kept > 32 else "some" if kept > 16 or is_squared else "few"
    block_q, block_p, block_d, num_warps, num_stages, precision = LAUNCH_TABLE[
        architecture, queries.element_size(), variant
    ]
    query_blocks, tiles = triton.cdiv(b, block_q), triton.cdiv(n, block_p)
    slices = max(1, min(triton.cdiv(PROGRAMS_WANTED, max(1, query_blocks)), tiles // LEAST_TILES))
    slice_points = triton.cdiv(tiles, slices) * block_p
    slices = triton.cdiv(n, slice_points)
    near_queries, near_points, half_squares = queries, points, None
    if is_squared:
        if queries.dtype == torch.float32:
            # Differences stay as they are, products lose less: 4 (b + n) d bytes. 16-bit rows would be rounded.
            centre = common_centre(points)
            near_queries, near_points = queries - centre, points - centre
        half_squares = _squares(near_points) / 2
    parts = {
        "kept_ptr": queries.new_empty(b, slices, kept, dtype=torch.float32),
        "found_ptr": queries.new_empty(b, slices, kept, dtype=torch.int32),
        "lowest_ptr": queries.new_empty(b, slices, dtype=torch.float32) if minimum else None,
    }
    results = {
        "values": queries.new_empty(b, k, dtype=torch.float32),
        "indices": queries.new_empty(b, k, dtype=torch.int64),
        "minimum": queries.new_empty(b, dtype=torch.float32) if minimum else None,
    }

    def matrices(queries: torch.Tensor, points: torch.Tensor) -> dict[str, Any]:
        strides = {"stride_queries_b": queries.stride(0), "stride_queries_d": queries.stride(1)}
        strides |= {"stride_points_n": points.stride(0), "stride_points_d": points.stride(1)}
        return {"queries_ptr": queries, "points_ptr": points, "D": d, "SLICES": slices} | strides

    scan = Launch(
        scan_kernel,
        (query_blocks, slices),
        matrices(near_queries, near_points)
        | parts
        | {"half_squares_ptr": half_squares, "B": b, "N": n, "slice_points": slice_points},
        {"BLOCK_Q": block_q, "BLOCK_P": block_p, "BLOCK_D": block_d, "KEPT": kept}
        | {"EVEN_D": d % block_d == 0, "PRECISION": precision},
        {"num_warps": num_warps, "num_stages": num_stages},
    )
    decide = Launch(
        decide_kernel,
        (b,),
        matrices(queries, points)
        | parts
        | {"query_squares_ptr": _squares(near_queries) if is_squared and minimum else None}
        | {"exclude_ptr": None if exclude is None else exclude.contiguous(), "K": k}
        | {"values_ptr": results["values"], "indices_ptr": results["indices"], "minimum_ptr": results["minimum"]},
        {
            "ALL_KEPT": triton.next_power_of_2(slices * kept),
            "KEPT": kept,
            "BLOCK_D": DECIDE_TILE // kept,
            "SQUARED": is_squared,
        },
        {"num_warps": 4},
    )
    return results, [scan, decide]


def _squares(rows: torch.Tensor) -> torch.Tensor:
    lengths: torch.Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32)
    return lengths.square()


def work(launch: Launch, b: int, n: int, d: int) -> Work:
    """What the first of the launches executes and what the task needs, for a predicted time."""
    c, itemsize = launch.constants, launch.arguments["queries_ptr"].element_size()
    products = 3 if c["PRECISION"] == "tf32x3" else 1
    inner, outer = triton.cdiv(d, c["BLOCK_D"]), launch.arguments["slice_points"] // c["BLOCK_P"]
    return Work(
        programs=[Programs(launch.grid[0] * launch.grid[1], (inner * outer,), outer)],
        flops=products * 2 * c["BLOCK_Q"] * c["BLOCK_P"] * c["BLOCK_D"],
        cache_bytes=(c["BLOCK_Q"] + c["BLOCK_P"]) * c["BLOCK_D"] * itemsize,
        matrix_units="16-bit" if itemsize == 2 else "tf32",
        needed_flops=products * 2 * b * n * d,
        needed_exponentials=0,
        needed_bytes=(b + n) * d * itemsize,
    )


def compute(
    queries: torch.Tensor, points: torch.Tensor, k: int, metric: str, exclude: torch.Tensor | None, minimum: bool
) -> dict[str, torch.Tensor | None]:
    """See api.topk_similarity."""
    results, launches = plan(queries, points, k, metric, exclude, minimum, architecture=triton_architecture(queries))
    for launch in launches:
        launch.run()
    return results
