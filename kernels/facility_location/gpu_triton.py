# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Facility-location gains on a GPU; similarities live one tile at a time in registers or tensor memory.

Who owns what: a program owns BLOCK_C + MORE_C candidates x one slice of the points; it walks the slice tile by tile
    and keeps one float64 sum a candidate. Both parts of its candidates meet the same tile of points: a taller tile
    needs fewer bytes from the second-level cache for each product, and 192 rows is no power of two.
    torch adds the slices of a candidate, in order, in float64. No atomics: the same bits in every run.
Reads: candidates m / BLOCK_P times and points n / (BLOCK_C + MORE_C) times, nearly all of that from the
    second-level cache: programs that run together are 8 slices x a few blocks of candidates, so that their candidates
    (6 MB for d = 1,024 in 16 bits) stay there. Writes: 8 bytes x n x slices of partial sums, which is also the extra
    memory; a slice has up to 65,536 points, fewer where there would not be enough programs.
Accumulator: float32 in a tile, float64 from tile to tile. Products start from -best instead of 0, so that the tile
    only needs max(x, 0) and a sum. float32 products: three TF32 products on NVIDIA, of numbers split here, because
    Triton's "tf32x3" takes every sum through registers at each step; true float32 on AMD.
Limits: float32, bfloat16, float16; best, raised and weights are rounded to float32; any strides, but rows that are no
    multiple of 16 elements are read narrowly. One number is read back from the device first: how many best are -inf.

Ladder, predicted from the compiled kernel for n = m = 1,048,576, d = 1,024 (measured: docs/measured.md). Floors:
    bfloat16 2.28 s on H100 and 1.00 s on B200, float32 5.99 s on B200.
    2026-11-26  H100 bfloat16  tile 128 x 128, 4 warps, two programs overlap      3.76 s   cache-bound
    2026-11-26                 128 x 256, 8 warps                                 3.00 s   cache-bound
    2026-11-26                 (128 + 64) x 256, best subtracted behind           2.46 s   raised: 56 bytes spill
    2026-11-26                 the same from -best, 32 features a step, not 64    2.42 s   nothing spills
    2026-11-26  B200 bfloat16  128 x 256, 8 warps                                 1.66 s   cache-bound
    2026-11-26                 (128 + 128) x 256 from -best                       1.16 s   raised: 272 bytes spill
    2026-11-26                 the same, summed by quarters, 32 features a step   1.13 s   nothing spills
    2026-11-26  B200 float32   128 x 256, Triton's tf32x3                         7.91 s   alu-bound, 160 bytes spill
    2026-11-26                 (128 + 128) x 128, numbers split here              6.24 s   matrix units
"""

import math

import torch
import triton
import triton.language as tl
from torch.nn.functional import pad

from fastsel.kernels._runtime.devices import triton_architecture
from fastsel.kernels._runtime.triton_blocks import LOG2_E, tile_product
from fastsel.kernels._runtime.triton_launch import Launch, Programs, Work, no_device

MOST_SLICE_POINTS = 65_536  # of one program
ENOUGH_PROGRAMS = 1024  # seven a multiprocessor on the largest chip: then the last wave costs little
GROUP = 8  # slices whose programs run side by side
FEW_CANDIDATES, FEW_POINTS = 64, 128
NORM_ROWS, NORM_D = 32, 64  # tile of the kernel that measures rows
# (architecture, bytes of an element, variant):
#     BLOCK_C, MORE_C, BLOCK_P, BLOCK_D, num_warps, num_stages, float32 products, parts
# "dot": raised or weights, not both; "candidates" and "points": the same with at most FEW_CANDIDATES or FEW_POINTS of
# them; "unaligned": rows are no multiple of 16 elements; "all": the rest.
# parts: of its points, in which a tile is summed, for want of registers.
LAUNCH_TABLE = {
    ("sm_80", 2, "candidates"): (128, 0, 128, 32, 4, 4, "ieee", 1),
    ("sm_80", 2, "points"): (128, 0, 128, 32, 4, 4, "ieee", 1),
    ("sm_80", 2, "dot"): (128, 0, 128, 32, 4, 4, "ieee", 1),
    ("sm_80", 2, "all"): (128, 0, 128, 32, 4, 3, "ieee", 1),
    ("sm_80", 2, "unaligned"): (64, 0, 64, 32, 4, 2, "ieee", 1),
    ("sm_80", 4, "candidates"): (64, 0, 64, 32, 4, 3, "tf32", 1),
    ("sm_80", 4, "points"): (64, 0, 64, 32, 4, 3, "tf32", 1),
    ("sm_80", 4, "dot"): (64, 0, 64, 32, 4, 3, "tf32", 1),
    ("sm_80", 4, "all"): (64, 0, 64, 32, 4, 3, "tf32", 1),
    ("sm_80", 4, "unaligned"): (64, 0, 32, 32, 4, 2, "tf32", 1),
    ("sm_90", 2, "candidates"): (64, 0, 128, 64, 4, 3, "ieee", 1),
    ("sm_90", 2, "points"): (128, 0, 128, 64, 4, 3, "ieee", 1),
    ("sm_90", 2, "dot"): (128, 64, 256, 32, 8, 4, "ieee", 1),
    ("sm_90", 2, "all"): (128, 0, 256, 64, 8, 3, "ieee", 1),
    ("sm_90", 2, "unaligned"): (64, 0, 64, 32, 4, 2, "ieee", 1),
    ("sm_90", 4, "candidates"): (64, 0, 64, 32, 4, 3, "tf32", 1),
    ("sm_90", 4, "points"): (128, 0, 128, 32, 8, 3, "tf32", 1),
    ("sm_90", 4, "dot"): (128, 0, 128, 32, 8, 3, "tf32", 1),
    ("sm_90", 4, "all"): (128, 0, 64, 32, 4, 3, "tf32", 1),
    ("sm_90", 4, "unaligned"): (64, 0, 64, 32, 4, 2, "tf32", 1),
    ("sm_100", 2, "candidates"): (64, 0, 128, 64, 4, 3, "ieee", 1),
    ("sm_100", 2, "points"): (128, 0, 128, 64, 4, 3, "ieee", 1),
    ("sm_100", 2, "dot"): (128, 128, 256, 32, 8, 4, "ieee", 4),
    ("sm_100", 2, "all"): (128, 0, 256, 32, 8, 4, "ieee", 2),
    ("sm_100", 2, "unaligned"): (64, 0, 64, 32, 4, 2, "ieee", 1),
    ("sm_100", 4, "candidates"): (64, 0, 128, 32, 8, 3, "tf32", 1),
    ("sm_100", 4, "points"): (128, 128, 128, 32, 8, 3, "tf32", 1),
    ("sm_100", 4, "dot"): (128, 128, 128, 32, 8, 3, "tf32", 1),
    ("sm_100", 4, "all"): (128, 128, 128, 32, 8, 3, "tf32", 4),
    ("sm_100", 4, "unaligned"): (64, 0, 64, 32, 4, 2, "tf32", 1),
    ("gfx942", 2, "candidates"): (128, 0, 128, 64, 8, 2, "ieee", 1),
    ("gfx942", 2, "points"): (128, 0, 128, 64, 8, 2, "ieee", 1),
    ("gfx942", 2, "dot"): (128, 0, 128, 64, 8, 2, "ieee", 1),
    ("gfx942", 2, "all"): (128, 0, 128, 64, 8, 2, "ieee", 1),
    ("gfx942", 2, "unaligned"): (64, 0, 64, 32, 4, 2, "ieee", 1),
    ("gfx942", 4, "candidates"): (128, 0, 128, 32, 8, 2, "ieee", 1),
    ("gfx942", 4, "points"): (128, 0, 128, 32, 8, 2, "ieee", 1),
    ("gfx942", 4, "dot"): (128, 0, 128, 32, 8, 2, "ieee", 1),
    ("gfx942", 4, "all"): (128, 0, 128, 32, 8, 2, "ieee", 1),
    ("gfx942", 4, "unaligned"): (64, 0, 64, 32, 4, 2, "ieee", 1),
}


@triton.jit
def tf32_and_rest(x):
    """x rounded to the 11 significant bits that a TF32 product reads, and what is left of it."""
    high = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return high, x - high


@triton.jit
def product_of(c, p, accumulator, PRECISION: tl.constexpr):
    """accumulator + c @ p.T; "tf32" is three products of float32 numbers in two parts, the smallest first."""
    if PRECISION == "tf32":
        c_high, c_rest = tf32_and_rest(c)
        p_high, p_rest = tf32_and_rest(p)
        accumulator = tile_product(c_rest, tl.trans(p_high), accumulator, PRECISION)
        accumulator = tile_product(c_high, tl.trans(p_rest), accumulator, PRECISION)
        accumulator = tile_product(c_high, tl.trans(p_high), accumulator, PRECISION)
    else:
        accumulator = tile_product(c, tl.trans(p), accumulator, PRECISION)
    return accumulator


@triton.jit
def sums_of(
    x, p0, squares, best_ptr, room_ptr, weights_ptr, point_squares_ptr, gamma,
    SIMILARITY: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Sums over the points p0, p0 + 1, ... of a tile of products (less best for "dot"), one a candidate."""
    if PARTS > 1:  # one half of the points after the other: half of the vectors in registers at a time
        half: tl.constexpr = x.shape[1] // 2
        first, second = tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, half]), [0, 2, 1]))
        sums = sums_of(
            first, p0, squares, best_ptr, room_ptr, weights_ptr, point_squares_ptr, gamma, SIMILARITY, PARTS // 2
        )
        return sums + sums_of(
            second, p0 + half, squares, best_ptr, room_ptr, weights_ptr, point_squares_ptr, gamma,
            SIMILARITY, PARTS // 2,
        )  # fmt: skip
    else:
        cols = p0 + tl.arange(0, x.shape[1])
        if SIMILARITY != "dot":
            point_squares = tl.load(point_squares_ptr + cols)
            squared = tl.maximum(squares[:, None] + point_squares[None, :] - 2.0 * x, 0.0)
            if SIMILARITY == "exp_distance":
                squared = tl.sqrt(squared)
            x = tl.exp2(squared * (-gamma * LOG2_E))
            if best_ptr is not None:
                x -= tl.load(best_ptr + cols)[None, :]
        if best_ptr is not None:
            x = tl.maximum(x, 0.0)
        if room_ptr is not None:
            x = tl.minimum(x, tl.load(room_ptr + cols)[None, :])
        if weights_ptr is not None:
            x *= tl.load(weights_ptr + cols)[None, :]
        return tl.sum(x, axis=1)


@triton.jit
def gains_kernel(
    candidates_ptr, points_ptr, best_ptr, room_ptr, weights_ptr, candidate_squares_ptr, point_squares_ptr, partial_ptr,
    N, M, PADDED_M, D, stride_candidates_n, stride_candidates_d, stride_points_m, stride_points_d, slice_points, slices,
    gamma, BLOCK_C: tl.constexpr, MORE_C: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr, SIMILARITY: tl.constexpr, PARTS: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """This program sums BLOCK_C + MORE_C candidates' terms over one slice of the points."""
    # Programs in the order they start: GROUP slices of the first block of candidates, of the second, ...
    of_a_group = GROUP * tl.cdiv(N, BLOCK_C + MORE_C)
    first_slice = tl.program_id(0) // of_a_group * GROUP
    in_group = tl.program_id(0) % of_a_group
    group = tl.minimum(GROUP, slices - first_slice)
    slice_index = first_slice + in_group % group
    first_row = in_group // group * (BLOCK_C + MORE_C)

    in_d = tl.arange(0, BLOCK_D)
    # Rows and points past the end read the first ones again: the inner loop then needs no mask for them, and no line
    # of memory is asked for by many threads at once, which took twice the time where a tile has few rows.
    block_ptr = candidates_ptr + tl.cast(first_row, tl.int64) * stride_candidates_n
    in_block = tl.arange(0, BLOCK_C) % tl.minimum(BLOCK_C, N - first_row)
    rows_at = block_ptr + (in_block[:, None] * stride_candidates_n + in_d[None, :] * stride_candidates_d)
    gain = tl.zeros([BLOCK_C], tl.float64)
    squares, more_squares = None, None
    if SIMILARITY != "dot":
        squares = tl.load(candidate_squares_ptr + first_row + in_block)
    if MORE_C > 0:
        in_more = (BLOCK_C + tl.arange(0, MORE_C)) % tl.minimum(BLOCK_C + MORE_C, N - first_row)
        more_at = block_ptr + (in_more[:, None] * stride_candidates_n + in_d[None, :] * stride_candidates_d)
        more_gain = tl.zeros([MORE_C], tl.float64)
        if SIMILARITY != "dot":
            more_squares = tl.load(candidate_squares_ptr + first_row + in_more)

    begin = slice_index * slice_points
    for p0 in range(begin, tl.minimum(begin + slice_points, PADDED_M), BLOCK_P):
        tile_ptr = points_ptr + tl.cast(p0, tl.int64) * stride_points_m
        in_tile = tl.arange(0, BLOCK_P) % tl.minimum(BLOCK_P, M - p0)
        points_at = tile_ptr + (in_tile[:, None] * stride_points_m + in_d[None, :] * stride_points_d)
        x = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
        if MORE_C > 0:
            more_x = tl.zeros([MORE_C, BLOCK_P], tl.float32)
        if SIMILARITY == "dot" and best_ptr is not None:
            best = tl.load(best_ptr + p0 + tl.arange(0, BLOCK_P))
            x -= best[None, :]
            if MORE_C > 0:
                more_x -= best[None, :]
        for d0 in range(0, D, BLOCK_D):
            if EVEN_D:
                p = tl.load(points_at + d0 * stride_points_d)
                c = tl.load(rows_at + d0 * stride_candidates_d)
                if MORE_C > 0:
                    more_c = tl.load(more_at + d0 * stride_candidates_d)
            else:
                inside = (in_d + d0 < D)[None, :]
                p = tl.load(points_at + d0 * stride_points_d, mask=inside, other=0.0)
                c = tl.load(rows_at + d0 * stride_candidates_d, mask=inside, other=0.0)
                if MORE_C > 0:
                    more_c = tl.load(more_at + d0 * stride_candidates_d, mask=inside, other=0.0)
            x = product_of(c, p, x, PRECISION)
            if MORE_C > 0:
                more_x = product_of(more_c, p, more_x, PRECISION)
        gain += sums_of(x, p0, squares, best_ptr, room_ptr, weights_ptr, point_squares_ptr, gamma, SIMILARITY, PARTS)
        if MORE_C > 0:
            more_gain += sums_of(
                more_x,
                p0,
                more_squares,
                best_ptr,
                room_ptr,
                weights_ptr,
                point_squares_ptr,
                gamma,
                SIMILARITY,
                PARTS,
            )

    out = partial_ptr + tl.cast(slice_index, tl.int64) * N
    rows = first_row + tl.arange(0, BLOCK_C)
    tl.store(out + rows, gain, mask=rows < N)
    if MORE_C > 0:
        more_rows = first_row + BLOCK_C + tl.arange(0, MORE_C)
        tl.store(out + more_rows, more_gain, mask=more_rows < N)


@triton.jit
def squares_kernel(x_ptr, out_ptr, N, D, stride_n, stride_d, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """This program writes the squared lengths of BLOCK_N rows, summed in float64 and rounded to float32."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = rows < N
    in_d = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_N], tl.float64)
    for d0 in range(0, D, BLOCK_D):
        at = x_ptr + rows[:, None] * stride_n + (in_d + d0)[None, :] * stride_d
        x = tl.load(at, mask=live[:, None] & (in_d + d0 < D)[None, :], other=0.0).to(tl.float64)
        total += tl.sum(x * x, axis=1)
    tl.store(out_ptr + rows, total.to(tl.float32), mask=live)


def unsupported(
    candidates: torch.Tensor,
    points: torch.Tensor,
    best: torch.Tensor,
    raised: torch.Tensor | None,
    weights: torch.Tensor | None,
    similarity: str,
    gamma: float,
) -> str | None:
    """Why these inputs cannot run here, or None."""
    if candidates.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"takes float32, bfloat16 and float16; candidates are {str(candidates.dtype).removeprefix('torch.')}"
    for name, x in (("candidates", candidates), ("points", points)):
        if x.shape[0] >= 2**30:
            return f"takes fewer than 2^30 rows; {name} has {x.shape[0]}"
        if 256 * x.stride(0) + x.shape[1] * x.stride(1) >= 2**31:  # rows of a tile x features
            return f"counts the elements of a tile in 32 bits; {name} has strides {list(x.stride())}"
    return no_device(candidates)


def _variant(
    candidates: torch.Tensor,
    points: torch.Tensor,
    raised: torch.Tensor | None,
    weights: torch.Tensor | None,
    similarity: str,
) -> str:
    # Triton knows of an alignment only when a stride is a multiple of 16 elements.
    if any(x.shape[1] % 16 or x.stride(0) % 16 or x.stride(1) != 1 for x in (candidates, points)):
        return "unaligned"
    if similarity != "dot" or (raised is not None and weights is not None):
        return "all"
    return "candidates" if len(candidates) <= FEW_CANDIDATES else "points" if len(points) <= FEW_POINTS else "dot"


def plan(
    candidates: torch.Tensor,
    points: torch.Tensor,
    best: torch.Tensor,
    raised: torch.Tensor | None,
    weights: torch.Tensor | None,
    similarity: str,
    gamma: float,
    *,
    architecture: str,
    has_floor: bool = True,
) -> tuple[torch.Tensor, list[Launch]]:
    """The (still unwritten) float64 sums [slices, n] and the launches that write them, for a key of LAUNCH_TABLE.

    has_floor: best is finite everywhere; else it is -inf everywhere. The last launch is that of the gains.
    """
    (n, d), m = candidates.shape, points.shape[0]
    if not has_floor and weights is None:
        weights = best.new_ones(m)  # a point past the end weighs 0: without a floor nothing else leaves it out
    key = (architecture, candidates.element_size(), _variant(candidates, points, raised, weights, similarity))
    block_c, more_c, block_p, block_d, num_warps, num_stages, precision, parts = LAUNCH_TABLE[key]
    blocks, tiles = triton.cdiv(n, block_c + more_c), triton.cdiv(m, block_p)
    slice_tiles = min(MOST_SLICE_POINTS // block_p, max(1, blocks * tiles // ENOUGH_PROGRAMS))
    slices = triton.cdiv(tiles, slice_tiles)
    partial = candidates.new_empty(slices, n, dtype=torch.float64)
    padding = tiles * block_p - m
    launches, squares = [], {}
    if similarity != "dot":
        for name, x in (("candidate_squares_ptr", candidates), ("point_squares_ptr", points)):
            squares[name] = x.new_zeros(len(x) + padding, dtype=torch.float32)
            measure = {"x_ptr": x, "out_ptr": squares[name], "N": len(x), "D": d}
            strides = {"stride_n": x.stride(0), "stride_d": x.stride(1)}
            sizes = {"BLOCK_N": NORM_ROWS, "BLOCK_D": NORM_D}
            launches.append(
                Launch(squares_kernel, (triton.cdiv(len(x), NORM_ROWS),), measure | strides, sizes, {"num_warps": 4})
            )
    room = None if raised is None else raised - best if has_floor else raised  # what a term is at most
    given = {"best_ptr": best if has_floor else None, "room_ptr": room, "weights_ptr": weights}
    # Past the end no similarity exceeds best, and there is neither room nor weight: the kernel needs no masks.
    vectors = {
        name: None if x is None else pad(x.float(), (0, padding), value=math.inf if name == "best_ptr" else 0.0)
        for name, x in given.items()
    }
    launches.append(
        Launch(
            gains_kernel,
            (blocks * slices,),
            {"candidates_ptr": candidates, "points_ptr": points, "partial_ptr": partial, **vectors}
            | {"candidate_squares_ptr": None, "point_squares_ptr": None, **squares}
            | {"N": n, "M": m, "PADDED_M": m + padding, "D": d, "gamma": gamma}
            | {"slice_points": slice_tiles * block_p, "slices": slices}
            | {"stride_candidates_n": candidates.stride(0), "stride_candidates_d": candidates.stride(1)}
            | {"stride_points_m": points.stride(0), "stride_points_d": points.stride(1)},
            {"BLOCK_C": block_c, "MORE_C": more_c, "BLOCK_P": block_p, "BLOCK_D": block_d, "GROUP": GROUP}
            | {"EVEN_D": d % block_d == 0, "PRECISION": precision, "SIMILARITY": similarity, "PARTS": parts},
            {"num_warps": num_warps, "num_stages": num_stages},
        )
    )
    return partial, launches


def work(launch: Launch, n: int, m: int, d: int) -> Work:
    """What the launch of the gains executes and what the task needs, for a predicted time."""
    c, itemsize = launch.constants, launch.arguments["candidates_ptr"].element_size()
    products = 3 if c["PRECISION"] == "tf32" else 1
    rows, inner = c["BLOCK_C"] + c["MORE_C"], triton.cdiv(d, c["BLOCK_D"])
    blocks, slice_points = triton.cdiv(n, rows), launch.arguments["slice_points"]
    whole, rest = divmod(m, slice_points)
    slices = [(whole, slice_points // c["BLOCK_P"]), (1 if rest else 0, triton.cdiv(rest, c["BLOCK_P"]))]
    return Work(
        programs=[Programs(blocks * number, (inner * tiles,), tiles) for number, tiles in slices if number],
        flops=products * 2 * rows * c["BLOCK_P"] * c["BLOCK_D"],
        cache_bytes=(rows + c["BLOCK_P"]) * c["BLOCK_D"] * itemsize,
        matrix_units="16-bit" if itemsize == 2 else "tf32",
        needed_flops=products * 2 * n * m * d,
        needed_exponentials=0 if c["SIMILARITY"] == "dot" else n * m,
        needed_bytes=(n + m) * d * itemsize,
    )


def compute(
    candidates: torch.Tensor,
    points: torch.Tensor,
    best: torch.Tensor,
    raised: torch.Tensor | None,
    weights: torch.Tensor | None,
    similarity: str,
    gamma: float,
) -> torch.Tensor:
    """See api.facility_location."""
    is_unset = best == -torch.inf
    number = int(is_unset.sum())
    if 0 < number < len(best):
        gains = torch.zeros(len(candidates), dtype=torch.float64, device=candidates.device)
        for rows in (is_unset, ~is_unset):
            some_raised, some_weights = (None if x is None else x[rows] for x in (raised, weights))
            gains += compute(candidates, points[rows], best[rows], some_raised, some_weights, similarity, gamma)
        return gains
    partial, launches = plan(
        candidates, points, best, raised, weights, similarity, gamma,
        architecture=triton_architecture(candidates), has_floor=number == 0,
    )  # fmt: skip
    for launch in launches:
        launch.run()
    return partial.sum(0)
