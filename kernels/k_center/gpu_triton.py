# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Squared distance of each point to its nearest of a block of centres, on a GPU; no distance leaves the registers.

Who owns what: a program owns BLOCK_N + MORE_N points x all centres; it walks the centres tile by tile and keeps one
    largest p . c - |c|^2 / 2 a point. Both parts of its points meet the same tile of centres: a taller tile needs fewer
    bytes from the second-level cache for each product. It also says which of its points is farthest, of each
    FARTHEST_BLOCK. No atomics: a point's bits depend on it and the centres alone.
Reads: points once from memory, and b / BLOCK_B times from the second-level cache where there are more centres than one
    tile holds; centres n / BLOCK_N times from that cache. Writes: 4 bytes a point, 8 bytes for FARTHEST_BLOCK points.
Accumulator: float32. float32 products: three TF32 products ("tf32x3") on NVIDIA, true float32 on AMD.
Limits: float32, bfloat16, float16; any strides, but rows that are no multiple of 16 elements are read narrowly.
    A tile with fewer centres than BLOCK_B multiplies padding: with few new centres the read of the points is the time.

Ladder, predicted for one H100, n = 1,000,000, d = 1,024, bfloat16 (docs/measured.md: measured):
    64 centres (floor 0.615 ms, the read of the points) and 256 centres (the same floor)
    2026-11-26  tile 128 x 64, 4 warps, two programs a multiprocessor      0.615 ms    -
    2026-11-26  tile 128 x 128, 8 warps                                    -           0.970 ms   cache-bound
    2026-11-26  4 warps, two programs overlap                              -           0.886 ms   cache-bound
    2026-11-26  tile 128 x 256, 8 warps: a third fewer bytes a flop        -           0.709 ms   cache-bound
    2026-11-27  (128 + 256) x 128: 11 % fewer bytes, from -|c|^2 / 2       -           0.626 ms   cache-bound
B200, 1,024 centres, bfloat16 (floor 0.930 ms) and float32 (5.58 ms)
    2026-11-26  tile 128 x 256 and 128 x 128                               1.554 ms    9.060 ms
    2026-11-27  (128 + 128) x 256 and x 128, least distance at tile's end  1.077 ms, spills 200 bytes
    2026-11-27  the same, products start from -|c|^2 / 2                   1.079 ms    7.587 ms, nothing spills
"""

import torch
import triton
import triton.language as tl

from fastsel.kernels._runtime.devices import triton_architecture
from fastsel.kernels._runtime.triton_blocks import tile_product
from fastsel.kernels._runtime.triton_launch import Launch, Programs, Work, no_device
from fastsel.kernels.k_center.api import FARTHEST_BLOCK

FEWEST_CENTRES, FEW_CENTRES = 16, 64  # up to here one narrow tile holds all centres
# (architecture, bytes of an element, variant):
#     BLOCK_N, MORE_N, BLOCK_B, BLOCK_D, num_warps, num_stages, float32 products
# BLOCK_N is FARTHEST_BLOCK, MORE_N 0 or a multiple of it. "fewest" and "few": at most as many centres; "many";
# "unaligned": rows are no multiple of 16 elements.
LAUNCH_TABLE = {
    ("sm_80", 2, "fewest"): (128, 0, 16, 64, 4, 3, "ieee"),
    ("sm_80", 2, "few"): (128, 0, 64, 64, 4, 3, "ieee"),
    ("sm_80", 2, "many"): (128, 0, 128, 64, 8, 3, "ieee"),
    ("sm_80", 2, "unaligned"): (128, 0, 64, 32, 4, 2, "ieee"),
    ("sm_80", 4, "fewest"): (128, 0, 16, 32, 4, 3, "tf32x3"),
    ("sm_80", 4, "few"): (128, 0, 32, 32, 4, 3, "tf32x3"),
    ("sm_80", 4, "many"): (128, 0, 32, 32, 4, 3, "tf32x3"),
    ("sm_80", 4, "unaligned"): (128, 0, 32, 32, 8, 2, "tf32x3"),
    ("sm_90", 2, "fewest"): (128, 0, 16, 128, 4, 3, "ieee"),
    ("sm_90", 2, "few"): (128, 0, 64, 64, 4, 4, "ieee"),
    ("sm_90", 2, "many"): (128, 0, 256, 64, 8, 3, "ieee"),
    ("sm_90", 2, "unaligned"): (128, 0, 64, 32, 4, 2, "ieee"),
    ("sm_90", 4, "fewest"): (128, 0, 16, 64, 4, 3, "tf32x3"),
    ("sm_90", 4, "few"): (128, 0, 64, 32, 8, 3, "tf32x3"),
    ("sm_90", 4, "many"): (128, 0, 128, 32, 8, 3, "tf32x3"),
    ("sm_90", 4, "unaligned"): (128, 0, 64, 32, 8, 2, "tf32x3"),
    ("sm_100", 2, "fewest"): (128, 0, 16, 64, 4, 4, "ieee"),
    ("sm_100", 2, "few"): (128, 0, 64, 64, 4, 4, "ieee"),
    ("sm_100", 2, "many"): (128, 128, 256, 32, 8, 4, "ieee"),
    ("sm_100", 2, "unaligned"): (128, 0, 64, 32, 4, 2, "ieee"),
    ("sm_100", 4, "fewest"): (128, 0, 16, 32, 4, 3, "tf32x3"),
    ("sm_100", 4, "few"): (128, 0, 64, 32, 4, 3, "tf32x3"),
    ("sm_100", 4, "many"): (128, 128, 128, 32, 8, 3, "tf32x3"),
    ("sm_100", 4, "unaligned"): (128, 0, 64, 32, 8, 2, "tf32x3"),
    ("gfx942", 2, "fewest"): (128, 0, 16, 64, 4, 2, "ieee"),
    ("gfx942", 2, "few"): (128, 0, 64, 64, 4, 2, "ieee"),
    ("gfx942", 2, "many"): (128, 0, 128, 64, 8, 2, "ieee"),
    ("gfx942", 2, "unaligned"): (128, 0, 64, 32, 4, 2, "ieee"),
    ("gfx942", 4, "fewest"): (128, 0, 16, 32, 4, 2, "ieee"),
    ("gfx942", 4, "few"): (128, 0, 64, 32, 4, 2, "ieee"),
    ("gfx942", 4, "many"): (128, 0, 128, 32, 8, 2, "ieee"),
    ("gfx942", 4, "unaligned"): (128, 0, 64, 32, 4, 2, "ieee"),
}


@triton.jit(do_not_specialize=["wrap_mask"])
def nearest_kernel(
    points_ptr, centres_ptr, nearest_ptr, rows_ptr, point_sqnorms_ptr, centre_sqnorms_ptr, out_ptr, farthest_ptr,
    M, B, D, wrap_mask, stride_points_n, stride_points_d, stride_centres_b, stride_centres_d,
    BLOCK_N: tl.constexpr, MORE_N: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """This program finds the nearest centre's squared distance of BLOCK_N + MORE_N points, and the farthest of each."""
    block = tl.program_id(0).to(tl.int64) * (1 + MORE_N // BLOCK_N)
    at = block * BLOCK_N + tl.arange(0, BLOCK_N)
    in_d = tl.arange(0, BLOCK_D)
    point, points_at = _rows_of(points_ptr, rows_ptr, at, in_d, M, stride_points_n, stride_points_d)
    least = tl.full([BLOCK_N], float("inf"), tl.float32)
    if MORE_N > 0:
        more_at = (block + 1) * BLOCK_N + tl.arange(0, MORE_N)
        more_point, more_points_at = _rows_of(points_ptr, rows_ptr, more_at, in_d, M, stride_points_n, stride_points_d)
        more_least = tl.full([MORE_N], float("inf"), tl.float32)
    for b0 in range(0, B, BLOCK_B):
        # A centre that is read twice changes no minimum, so that columns past the end need no mask either. In narrow
        # tiles they read other centres, as many as there are: 16 centres waited for the one line of memory that all
        # asked for (0.96 ms on an H200, where 64 take 0.48). Elsewhere that costs registers which are not there.
        in_tile = tl.arange(0, BLOCK_B)
        if BLOCK_B <= 64 and EVEN_D:
            centre = tl.where(b0 + in_tile < B, b0 + in_tile, in_tile & wrap_mask).to(tl.int64)
        else:
            centre = tl.minimum(b0 + in_tile, B - 1).to(tl.int64)
        centres_at = centres_ptr + centre[:, None] * stride_centres_b + in_d[None, :] * stride_centres_d
        # p . c - |c|^2 / 2, of which the largest is the nearest's: no vector of norms is left for the tile's end.
        half_norms = tl.load(centre_sqnorms_ptr + centre) * -0.5
        product = tl.zeros([BLOCK_N, BLOCK_B], tl.float32) + half_norms[None, :]
        if MORE_N > 0:
            more_product = tl.zeros([MORE_N, BLOCK_B], tl.float32) + half_norms[None, :]
        for d0 in range(0, D, BLOCK_D):
            if EVEN_D:
                x = tl.load(points_at + d0 * stride_points_d)
                c = tl.load(centres_at + d0 * stride_centres_d)
            else:
                x = tl.load(points_at + d0 * stride_points_d, mask=(in_d + d0 < D)[None, :], other=0.0)
                c = tl.load(centres_at + d0 * stride_centres_d, mask=(in_d + d0 < D)[None, :], other=0.0)
            product = tile_product(x, tl.trans(c), product, PRECISION)
            if MORE_N > 0:
                if EVEN_D:
                    y = tl.load(more_points_at + d0 * stride_points_d)
                else:
                    y = tl.load(more_points_at + d0 * stride_points_d, mask=(in_d + d0 < D)[None, :], other=0.0)
                more_product = tile_product(y, tl.trans(c), more_product, PRECISION)
        least = tl.minimum(least, -2.0 * tl.max(product, axis=1))
        if MORE_N > 0:
            more_least = tl.minimum(more_least, -2.0 * tl.max(more_product, axis=1))
    _write(point, at, least, block, nearest_ptr, point_sqnorms_ptr, out_ptr, farthest_ptr, M, BLOCK_N)
    if MORE_N > 0:
        of_points = (nearest_ptr, point_sqnorms_ptr, out_ptr, farthest_ptr)
        _write(more_point, more_at, more_least, block + 1, *of_points, M, BLOCK_N)


@triton.jit
def _rows_of(points_ptr, rows_ptr, at, in_d, M, stride_points_n, stride_points_d):
    """The points at these places, and where their first features lie."""
    # Points past the end read the last one again: the inner loop then needs no mask for them.
    point = tl.minimum(at, M - 1)
    if rows_ptr is not None:
        point = tl.load(rows_ptr + point)
    return point, points_ptr + point[:, None] * stride_points_n + in_d[None, :] * stride_points_d


@triton.jit
def _write(point, at, least, block, nearest_ptr, point_sqnorms_ptr, out_ptr, farthest_ptr, M, BLOCK: tl.constexpr):
    """Squared distances of some blocks of points from number `block` on, and the place of the largest of each."""
    square = tl.maximum(tl.load(point_sqnorms_ptr + point) + least, 0.0)
    if nearest_ptr is not None:
        square = tl.minimum(square, tl.load(nearest_ptr + tl.minimum(at, M - 1)))
    live = at < M
    tl.store(out_ptr + at, square, mask=live)
    BLOCKS: tl.constexpr = at.shape[0] // BLOCK
    square = tl.reshape(tl.where(live, square, -1.0), [BLOCKS, BLOCK])
    best = tl.max(square, axis=1)
    places = tl.arange(0, BLOCK)[None, :]
    first = tl.min(tl.where(square == best[:, None], places, BLOCK - 1), axis=1)  # ties: the first
    blocks = block + tl.arange(0, BLOCKS)
    tl.store(farthest_ptr + blocks, blocks * BLOCK + first, mask=blocks * BLOCK < M)


def unsupported(
    points: torch.Tensor,
    centres: torch.Tensor,
    nearest: torch.Tensor | None,
    rows: torch.Tensor | None,
    point_sqnorms: torch.Tensor,
    centre_sqnorms: torch.Tensor,
) -> str | None:
    """Why these inputs cannot run here, or None."""
    if points.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"takes float32, bfloat16 and float16; points are {str(points.dtype).removeprefix('torch.')}"
    for name, x in (("points", points), ("centres", centres)):
        if x.stride(1) != 1 and x.shape[1] * x.stride(1) >= 2**31:
            return f"counts elements along a row in 32 bits; {name} spreads {x.shape[1]} over {x.stride(1)} each"
    return no_device(points)


def plan(
    points: torch.Tensor,
    centres: torch.Tensor,
    nearest: torch.Tensor | None,
    rows: torch.Tensor | None,
    point_sqnorms: torch.Tensor,
    centre_sqnorms: torch.Tensor,
    *,
    architecture: str,
) -> tuple[tuple[torch.Tensor, torch.Tensor], list[Launch]]:
    """The (still unwritten) results and the launch that writes them, for a key of LAUNCH_TABLE."""
    (b, d), m = centres.shape, len(points) if rows is None else len(rows)
    # Triton knows of an alignment only when a stride is a multiple of 16 elements.
    is_unaligned = any(x.shape[1] % 16 or x.stride(0) % 16 or x.stride(1) != 1 for x in (points, centres))
    variant = "fewest" if b <= FEWEST_CENTRES else "few" if b <= FEW_CENTRES else "many"
    variant = "unaligned" if is_unaligned else variant
    key = (architecture, points.element_size(), variant)
    block_n, more_n, block_b, block_d, num_warps, num_stages, precision = LAUNCH_TABLE[key]
    blocks = triton.cdiv(m, FARTHEST_BLOCK)
    out = points.new_empty(m, dtype=torch.float32)
    farthest = points.new_empty(blocks, dtype=torch.int64)
    launch = Launch(
        nearest_kernel,
        (triton.cdiv(blocks, 1 + more_n // block_n),),
        {"points_ptr": points, "centres_ptr": centres}
        | {"nearest_ptr": None if nearest is None else nearest.contiguous()}
        | {"rows_ptr": None if rows is None else rows.contiguous()}
        | {"point_sqnorms_ptr": point_sqnorms.contiguous(), "centre_sqnorms_ptr": centre_sqnorms.contiguous()}
        | {"out_ptr": out, "farthest_ptr": farthest, "M": m, "B": b, "D": d}
        | {"wrap_mask": (1 << max(1, b).bit_length() - 1) - 1}  # the largest power of two that b reaches, less 1
        | {"stride_points_n": points.stride(0), "stride_points_d": points.stride(1)}
        | {"stride_centres_b": centres.stride(0), "stride_centres_d": centres.stride(1)},
        {"BLOCK_N": block_n, "MORE_N": more_n, "BLOCK_B": block_b, "BLOCK_D": block_d}
        | {"EVEN_D": d % block_d == 0, "PRECISION": precision},
        {"num_warps": num_warps, "num_stages": num_stages},
    )
    return (out, farthest), [launch]


def work(launch: Launch, m: int, b: int, d: int) -> Work:
    """What the launch executes and what the task needs, for a predicted time."""
    c, itemsize = launch.constants, launch.arguments["points_ptr"].element_size()
    products = 3 if c["PRECISION"] == "tf32x3" else 1
    inner, outer = triton.cdiv(d, c["BLOCK_D"]), triton.cdiv(b, c["BLOCK_B"])
    return Work(
        programs=[Programs(launch.grid[0], (inner * outer,), outer)],
        flops=products * 2 * (c["BLOCK_N"] + c["MORE_N"]) * c["BLOCK_B"] * c["BLOCK_D"],
        cache_bytes=(c["BLOCK_N"] + c["MORE_N"] + c["BLOCK_B"]) * c["BLOCK_D"] * itemsize,
        matrix_units="16-bit" if itemsize == 2 else "tf32",
        needed_flops=products * 2 * m * b * d,
        needed_exponentials=0,
        needed_bytes=(m + b) * d * itemsize + 12 * m,
    )


def compute(
    points: torch.Tensor,
    centres: torch.Tensor,
    nearest: torch.Tensor | None,
    rows: torch.Tensor | None,
    point_sqnorms: torch.Tensor,
    centre_sqnorms: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See api.k_center."""
    results, launches = plan(
        points, centres, nearest, rows, point_sqnorms, centre_sqnorms, architecture=triton_architecture(points)
    )
    for launch in launches:
        launch.run()
    return results
