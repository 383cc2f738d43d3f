# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""random_projection on a GPU, without atomics: SJLT read backwards, Rademacher a product with signs made in place.

SJLT. A block of 2^m coordinates meets 2^m rows, one each (rng.sjlt_map), so a program asks for each of its rows which
    coordinate of the block meets it, reads that element and adds it to a register. Who owns what: a program owns ROWS
    rows of x, BLOCK_K numbers of one part of out and a segment of the coordinates, whose blocks it goes through.
    Reads: x once from memory, and once for each BLOCK_K of the part from the caches (elements of a block are read in
    random order, but the block lies in the first-level cache). Writes: 4 bytes a number and segment.
Rademacher. Who owns what: a program owns BLOCK_K columns, BLOCK_B rows of x and a segment; for 32 coordinates at a time
    it makes a word of signs for each column, widens the bits to +-1 and multiplies. Reads: x k / BLOCK_K times, all but
    the first from the second-level cache. float32 x: three TF32 products ("tf32x3"), of which the signs need no split.
Both: the segments' sums go to [segments, b, k] float32 and a second kernel adds them in order. Segments are cut at
    multiples of a power of two that depends on p and k alone: the same bits on every GPU.
Limits: float32, bfloat16, float16; x with rows that are not contiguous is copied.
"""

import torch
import triton
import triton.language as tl

from fastsel.kernels._runtime import rng
from fastsel.kernels._runtime.devices import triton_architecture
from fastsel.kernels._runtime.triton_blocks import tile_product
from fastsel.kernels._runtime.triton_hash import (
    aligned_word,
    counter_word,
    inner_key,
    outer_key,
    sjlt_block,
    sjlt_coordinate,
)  # fmt: skip
from fastsel.kernels._runtime.triton_launch import Launch, Programs, Work, no_device

MOST_SEGMENTS = 256
SUM_BLOCK = 1024
FEWEST_LANES = 256
# architecture: most of BLOCK_K, most ROWS, numbers of a thread
SJLT_TABLE = {
    "sm_80": (8192, 2, 16),
    "sm_90": (8192, 2, 16),
    "sm_100": (8192, 2, 16),
    "gfx942": (8192, 2, 16),
}
# (architecture, bytes of an element): BLOCK_K, most of BLOCK_B, num_warps, num_stages, float32 products
RADEMACHER_TABLE = {
    ("sm_80", 2): (128, 64, 4, 3, "ieee"),
    ("sm_80", 4): (128, 32, 4, 2, "tf32x3"),
    ("sm_90", 2): (128, 64, 4, 3, "ieee"),
    ("sm_90", 4): (128, 64, 4, 3, "tf32x3"),
    ("sm_100", 2): (128, 64, 4, 3, "ieee"),
    ("sm_100", 4): (128, 64, 4, 3, "tf32x3"),
    ("gfx942", 2): (128, 64, 4, 2, "ieee"),
    ("gfx942", 4): (64, 32, 4, 2, "ieee"),
}


@triton.jit(do_not_specialize=["first", "row_first", "row_second", "sign_first", "sign_second"])
def sjlt_kernel(
    x_ptr, partial_ptr, B, P, K, first, stride_b, row_first, row_second, sign_first, sign_second,
    SPARSITY: tl.constexpr, SEGMENT_BITS: tl.constexpr, BITS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr, TILES: tl.constexpr, REPEAT: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """This program adds a segment of ROWS rows of x into BLOCK_K numbers of part j of the projections."""
    segment = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1).to(tl.int64) // TILES
    low = j * K // SPARSITY
    length = ((j + 1) * K // SPARSITY - low).to(tl.int32)
    lane = tl.arange(0, REPEAT * BLOCK_K)
    in_part = (tl.program_id(1) % TILES) * BLOCK_K + lane % BLOCK_K
    row = tl.program_id(2).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    rows_at = x_ptr + tl.minimum(row, B - 1)[:, None] * stride_b
    sign_inner, sign_outer = inner_key(j, sign_first), outer_key(j, sign_second)
    # In units of blocks, from coordinate 0 on.
    begin = ((first >> SEGMENT_BITS) + segment) << (SEGMENT_BITS - BITS)
    begin = tl.maximum(begin, first >> BITS)
    end = tl.minimum(((first >> SEGMENT_BITS) + segment + 1) << (SEGMENT_BITS - BITS), ((first + P - 1) >> BITS) + 1)
    sums = tl.zeros([ROWS, REPEAT * BLOCK_K], tl.float32)
    for i in range((end - begin + REPEAT - 1) // REPEAT):
        block = begin + i * REPEAT
        if REPEAT > 1:
            block += lane // BLOCK_K
        start, x, a_inverse, b_inverse = sjlt_block(block, j, length, row_first, row_second)
        c, met = sjlt_coordinate(in_part, length, start, x, a_inverse, b_inverse, BITS)
        number = block << BITS  # of the block's first coordinate
        word = aligned_word(number >> 5, c >> 5, sign_inner, sign_outer)
        sign = (word >> (((number & 31).to(tl.uint32) + c) & 31)) << 31
        # The block's columns that x has are skipped to skipped + there - 1; where no coordinate is met, none.
        skipped = tl.maximum(first - number, 0).to(tl.uint32)
        there = tl.minimum(first + P - number, 1 << BITS).to(tl.uint32) - skipped
        if REPEAT > 1:
            there = tl.where(block < end, there, 0)
        live = (c - skipped) < there
        if not EXACT:
            live &= met & (in_part < length)
        values = tl.load(rows_at + (number - first) + c.to(tl.int32)[None, :], mask=live[None, :], other=0.0).to(
            tl.float32
        )
        sums += (values.to(tl.uint32, bitcast=True) ^ sign[None, :]).to(tl.float32, bitcast=True)
    sums = tl.sum(tl.reshape(sums, [ROWS, REPEAT, BLOCK_K]), axis=1)
    in_part = (tl.program_id(1) % TILES) * BLOCK_K + tl.arange(0, BLOCK_K)
    to = partial_ptr + (segment * B + row[:, None]) * K + low + in_part[None, :]
    tl.store(to, sums, mask=(row < B)[:, None] & (in_part < length)[None, :])


@triton.jit(do_not_specialize=["first", "key_first", "key_second"])
def rademacher_kernel(
    x_ptr, partial_ptr, B, P, K, first, stride_b, key_first, key_second, SEGMENT_BITS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_B: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """This program adds a segment of BLOCK_B rows of x into BLOCK_K columns of the projections."""
    segment = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    row = tl.program_id(2).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    inner, outer = inner_key(column, key_first), outer_key(column, key_second)
    in_word = tl.arange(0, 32)
    rows_at = x_ptr + tl.minimum(row, B - 1)[None, :] * stride_b + in_word[:, None]
    begin = ((first >> SEGMENT_BITS) + segment) << (SEGMENT_BITS - 5)
    begin = tl.maximum(begin, first >> 5)
    end = tl.minimum(((first >> SEGMENT_BITS) + segment + 1) << (SEGMENT_BITS - 5), ((first + P - 1) >> 5) + 1)
    sums = tl.zeros([BLOCK_K, BLOCK_B], tl.float32)
    for i in range(end - begin):
        block = begin + i
        word = counter_word(block, inner, outer)
        bit = (word[:, None] >> in_word.to(tl.uint32)[None, :]) & 1
        if x_ptr.dtype.element_ty == tl.bfloat16:
            sign = ((bit << 15) | 0x3F80).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        elif x_ptr.dtype.element_ty == tl.float16:
            sign = ((bit << 15) | 0x3C00).to(tl.uint16).to(tl.float16, bitcast=True)
        else:
            sign = ((bit << 31) | 0x3F800000).to(tl.float32, bitcast=True)
        start = (block << 5) - first
        live = (in_word >= -start) & (in_word < P - start)
        x = tl.load(rows_at + start, mask=live[:, None], other=0.0)
        sums = tile_product(sign, x, sums, PRECISION)
    to = partial_ptr + (segment * B + row[None, :]) * K + column[:, None]
    tl.store(to, sums, mask=(row < B)[None, :] & (column < K)[:, None])


@triton.jit
def sum_kernel(partial_ptr, out_ptr, scale, B, K, SEGMENTS, stride_out, BLOCK: tl.constexpr):
    """This program adds the segments' sums of BLOCK numbers of a row to out, in order."""
    row = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < K
    total = tl.load(out_ptr + row * stride_out + at, mask=live)
    from_segment = partial_ptr + row * K + at
    for _ in range(SEGMENTS):
        total += scale * tl.load(from_segment, mask=live)
        from_segment += (row * 0 + B) * K
    tl.store(out_ptr + row * stride_out + at, total, mask=live)


def unsupported(
    x: torch.Tensor, k: int, kind: str, sparsity: int, seed: int, first: int, out: torch.Tensor
) -> str | None:
    """Why these inputs cannot run here, or None."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"takes float32, bfloat16 and float16; x is {str(x.dtype).removeprefix('torch.')}"
    return no_device(x)


def plan(
    x: torch.Tensor, k: int, kind: str, sparsity: int, seed: int, first: int, out: torch.Tensor, *, architecture: str
) -> list[Launch]:
    """The two launches that add the projection of x to out, for a key of the tables."""
    b, p = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    common = {"x_ptr": x, "B": b, "P": p, "K": k, "first": first, "stride_b": x.stride(0)}
    names: tuple[str, ...]
    keys: tuple[int, ...]
    if kind == "sjlt":
        bits = (k // sparsity).bit_length() - 1
        segment_bits, segments = _segments(first, p, max(16, bits + 3))
        most_k, most_rows, of_thread = SJLT_TABLE[architecture]
        length = -(-k // sparsity)
        block_k = min(most_k, triton.next_power_of_2(length))
        rows, tiles = (1 if b == 1 else most_rows), triton.cdiv(length, block_k)
        names = ("row_first", "row_second", "sign_first", "sign_second")
        keys = rng.hash_key(seed, rng.SJLT).signed() + rng.hash_key(seed, rng.SJLT_SIGN).signed()
        grid = (segments, sparsity * tiles, triton.cdiv(b, rows))
        kernel, constants = sjlt_kernel, {"SPARSITY": sparsity, "BITS": bits, "ROWS": rows, "BLOCK_K": block_k}
        # A small k leaves threads without a number: several blocks go side by side then.
        repeat = max(1, FEWEST_LANES // block_k)
        constants |= {"TILES": tiles, "SEGMENT_BITS": segment_bits, "REPEAT": repeat}
        constants |= {"EXACT": length == 1 << bits and block_k <= length and k % sparsity == 0}
        options = {"num_warps": max(4, min(16, block_k // (32 * of_thread)))}
    else:
        segment_bits, segments = _segments(first, p, 16)
        block_k, most_b, num_warps, num_stages, precision = RADEMACHER_TABLE[architecture, x.element_size()]
        # Narrower tiles of float32 spill on sm_100.
        block_b = min(most_b, max(16 if x.element_size() == 2 else 32, triton.next_power_of_2(b)))
        names = ("key_first", "key_second")
        keys = rng.hash_key(seed, rng.RADEMACHER).signed()
        grid = (segments, triton.cdiv(k, block_k), triton.cdiv(b, block_b))
        kernel, constants = rademacher_kernel, {"BLOCK_K": block_k, "BLOCK_B": block_b, "PRECISION": precision}
        constants |= {"SEGMENT_BITS": segment_bits}
        options = {"num_warps": num_warps, "num_stages": num_stages}
    partial = x.new_empty(segments, b, k, dtype=torch.float32)
    arguments = common | {"partial_ptr": partial} | dict(zip(names, keys, strict=True))
    sums = {"partial_ptr": partial, "out_ptr": out, "scale": sparsity**-0.5, "B": b, "K": k, "SEGMENTS": segments}
    return [
        Launch(kernel, grid, arguments, constants, options),
        Launch(
            sum_kernel, (triton.cdiv(k, SUM_BLOCK), b), sums | {"stride_out": out.stride(0)},
            {"BLOCK": SUM_BLOCK}, {"num_warps": 4},
        ),
    ]  # fmt: skip


def work(launch: Launch, b: int, p: int, k: int) -> Work:
    """What the launch of a Rademacher projection executes and what the task needs, for a predicted time."""
    c, itemsize = launch.constants, launch.arguments["x_ptr"].element_size()
    products = 3 if c["PRECISION"] == "tf32x3" else 1
    programs = launch.grid[0] * launch.grid[1] * launch.grid[2]
    words = triton.cdiv(min(p, 1 << c["SEGMENT_BITS"]), 32)
    return Work(
        programs=[Programs(programs, (words,), 1)],
        flops=products * 2 * c["BLOCK_K"] * c["BLOCK_B"] * 32,
        cache_bytes=c["BLOCK_B"] * 32 * itemsize,
        matrix_units="16-bit" if itemsize == 2 else "tf32",
        needed_flops=products * 2 * b * p * k,
        needed_exponentials=0,
        needed_bytes=b * p * itemsize + 8 * launch.grid[0] * b * k,
    )


def _segments(first: int, p: int, bits: int) -> tuple[int, int]:
    """Segments of 2^bits coordinates, cut at multiples of that: bits, as given or more, and their number."""
    while p >> bits >= MOST_SEGMENTS:
        bits += 1
    return bits, ((first + p - 1) >> bits) - (first >> bits) + 1


def compute(
    x: torch.Tensor, k: int, kind: str, sparsity: int, seed: int, first: int, out: torch.Tensor
) -> torch.Tensor:
    """See api.random_projection."""
    for launch in plan(x, k, kind, sparsity, seed, first, out, architecture=triton_architecture(x)):
        launch.run()
    return out
