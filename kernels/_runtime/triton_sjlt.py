# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""SJLT of the rows of a matrix on a GPU, read backwards and without atomics (rng.sjlt_map).

A block of 2^m coordinates meets 2^m rows of out, one each. A program reads a block of ROWS rows of x in order, gives
    each element its sign, lays them into shared memory, asks for each of its rows of out which coordinate of the block
    meets it, and adds that element to a register.
Who owns what: a program owns ROWS rows of x, BLOCK_K numbers of one part of out and a segment of the coordinates, whose
    blocks it goes through.
Reads: x once from memory, in order, and again for each further BLOCK_K of the part. Writes: 4 bytes a number and
    segment; a second kernel adds the segments to out, in order. Segments are cut at multiples of a power of two that
    depends on p and k alone: the same bits on every GPU.
Blocks of more than 2^SHARED_BITS coordinates do not fit: their elements are gathered from memory in random order, which
    costs a sector of 32 bytes each unless the first-level cache holds the block.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from fastsel.kernels._runtime import rng
from fastsel.kernels._runtime.triton_hash import (
    aligned_word,
    counter_word,
    inner_key,
    outer_key,
    sjlt_block,
    sjlt_coordinate,
)
from fastsel.kernels._runtime.triton_launch import Launch

MOST_SEGMENTS = 256
FEWEST_LANES = 256
SHARED_BITS = 13  # 8,192 numbers of 4 bytes a row
UNIT = 16  # elements: first is handed over in these where it can be, so that Triton knows of the alignment
SUM_BLOCK = 1024
# architecture: most of BLOCK_K, most ROWS, numbers of a thread, STAGES (2: the next block comes while one is added)
SJLT_TABLE = {
    "sm_80": (8192, 2, 32, 2),
    "sm_90": (8192, 2, 32, 1),
    "sm_100": (8192, 2, 32, 2),
    "gfx942": (8192, 2, 32, 1),
}


@triton.jit
def _bits(x):
    """The bits of numbers of 16 or 32, as uint32."""
    if x.dtype == tl.float32:
        return x.to(tl.uint32, bitcast=True)
    else:
        return x.to(tl.uint16, bitcast=True).to(tl.uint32)


@triton.jit
def _rows_at(rows_at, inside, index, sign, of_second):
    """[N] float32: element index (int32) of two rows, with the signs of their elements; without a second, twice one's.

    inside: which of a row's elements in [WORDS, WORD] are there. Rows of 16-bit numbers go in pairs of them.
    """
    in_row = tl.arange(0, inside.shape[0])[:, None] * inside.shape[1] + tl.arange(0, inside.shape[1])[None, :]
    bits = _bits(tl.load(rows_at + in_row, mask=inside, other=0.0))
    if rows_at.dtype.element_ty == tl.float32:
        bits = tl.reshape(bits ^ sign, [inside.numel])
        first = tl.gather(bits, index, axis=0).to(tl.float32, bitcast=True)
        if of_second is not None:
            more = _bits(tl.load(of_second + in_row, mask=inside, other=0.0))
            more = tl.reshape(more ^ sign, [inside.numel])
            return first, tl.gather(more, index, axis=0).to(tl.float32, bitcast=True)
        else:
            return first, first
    else:
        if of_second is not None:
            bits |= _bits(tl.load(of_second + in_row, mask=inside, other=0.0)) << 16
        pair = tl.gather(tl.reshape(bits ^ (sign | (sign >> 16)), [inside.numel]), index, axis=0)
        element_ty: tl.constexpr = rows_at.dtype.element_ty
        first = (pair & 0xFFFF).to(tl.uint16).to(element_ty, bitcast=True).to(tl.float32)
        if of_second is not None:
            return first, (pair >> 16).to(tl.uint16).to(element_ty, bitcast=True).to(tl.float32)
        else:
            return first, first


@triton.jit(do_not_specialize=["first_units", "row_first", "row_second", "sign_first", "sign_second"])
def sjlt_kernel(
    x_ptr, partial_ptr, B, P, K, first_units, stride_b, row_first, row_second, sign_first, sign_second,
    SPARSITY: tl.constexpr, SEGMENT_BITS: tl.constexpr, BITS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr, TILES: tl.constexpr, REPEAT: tl.constexpr, UNIT: tl.constexpr,
    EXACT: tl.constexpr, IN_SHARED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """This program adds a segment of ROWS (1 or 2) rows of x into BLOCK_K numbers of part j of the projections."""
    segment = tl.program_id(0).to(tl.int64)
    first = (segment * 0 + first_units) * UNIT
    j = tl.program_id(1).to(tl.int64) // TILES
    low = j * K // SPARSITY
    length = ((j + 1) * K // SPARSITY - low).to(tl.int32)
    LANES: tl.constexpr = REPEAT * BLOCK_K
    lane = tl.arange(0, LANES)
    in_part = (tl.program_id(1) % TILES) * BLOCK_K + lane % BLOCK_K
    row = tl.program_id(2).to(tl.int64) * ROWS
    sign_inner, sign_outer = inner_key(j, sign_first), outer_key(j, sign_second)
    # In units of blocks, from coordinate 0 on.
    begin = ((first >> SEGMENT_BITS) + segment) << (SEGMENT_BITS - BITS)
    begin = tl.maximum(begin, first >> BITS)
    end = tl.minimum(((first >> SEGMENT_BITS) + segment + 1) << (SEGMENT_BITS - BITS), ((first + P - 1) >> BITS) + 1)
    sums_0 = tl.zeros([LANES], tl.float32)
    sums_1 = sums_0
    for i in tl.range((end - begin + REPEAT - 1) // REPEAT, num_stages=STAGES):
        block = begin + i * REPEAT
        number = block << BITS  # of the first coordinate
        at = number - first  # of x
        if REPEAT > 1:
            block += lane // BLOCK_K
        start, x, a_inverse, b_inverse = sjlt_block(block, j, length, row_first, row_second)
        c, met = sjlt_coordinate(in_part, length, start, x, a_inverse, b_inverse, BITS)
        # Rows past the end read the last one again.
        row_0 = x_ptr + row * stride_b + at
        row_1 = x_ptr + tl.minimum(row + 1, B - 1) * stride_b + at
        if IN_SHARED:
            # WORD coordinates share a word of signs, as a block begins at a multiple of them.
            WORD: tl.constexpr = 32 if BITS >= 5 else 1
            WORDS: tl.constexpr = (REPEAT << BITS) // WORD
            in_block = tl.arange(0, WORDS)[:, None] * WORD + tl.arange(0, WORD)[None, :]
            inside = (in_block >= -at) & (in_block < tl.minimum(P - at, (end << BITS) - number))
            if WORD == 32:
                word = aligned_word(number >> 5, tl.arange(0, WORDS).to(tl.uint32), sign_inner, sign_outer)
                sign = (word[:, None] << (31 - tl.arange(0, WORD)).to(tl.uint32)[None, :]) & 0x80000000
            else:
                of = number + in_block
                sign = (counter_word(of >> 5, sign_inner, sign_outer) << (31 - (of & 31)).to(tl.uint32)) & 0x80000000
            c = c.to(tl.int32)
            if REPEAT > 1:
                c += (lane // BLOCK_K) << BITS
            live = met & (in_part < length)
            if ROWS == 1:
                value_0, _ = _rows_at(row_0, inside, c, sign, None)
            else:
                value_0, value_1 = _rows_at(row_0, inside, c, sign, row_1)
                sums_1 += value_1 if EXACT else tl.where(live, value_1, 0.0)
            sums_0 += value_0 if EXACT else tl.where(live, value_0, 0.0)
        else:  # REPEAT is 1, and number a multiple of 32
            word = aligned_word(number >> 5, c >> 5, sign_inner, sign_outer)
            sign = (word >> (c & 31)) << 31
            # The block's columns that x has are skipped to skipped + there - 1; where no coordinate is met, none.
            skipped = tl.maximum(-at, 0).to(tl.uint32)
            there = tl.minimum(P - at, 1 << BITS).to(tl.uint32) - skipped
            live = ((c - skipped) < there) & met & (in_part < length)
            bits = tl.load(row_0 + c.to(tl.int32), mask=live, other=0.0).to(tl.float32).to(tl.uint32, bitcast=True)
            sums_0 += (bits ^ sign).to(tl.float32, bitcast=True)
            if ROWS > 1:
                bits = tl.load(row_1 + c.to(tl.int32), mask=live, other=0.0).to(tl.float32).to(tl.uint32, bitcast=True)
                sums_1 += (bits ^ sign).to(tl.float32, bitcast=True)
    to = partial_ptr + (segment * B + row) * K + low
    _store_row(to, sums_0, row < B, length, BLOCK_K, TILES, REPEAT)
    if ROWS > 1:
        _store_row(to + K, sums_1, row + 1 < B, length, BLOCK_K, TILES, REPEAT)


@triton.jit
def _store_row(to, sums, is_row, length, BLOCK_K: tl.constexpr, TILES: tl.constexpr, REPEAT: tl.constexpr):
    if REPEAT > 1:
        sums = tl.sum(tl.reshape(sums, [REPEAT, BLOCK_K]), axis=0)
    in_part = (tl.program_id(1) % TILES) * BLOCK_K + tl.arange(0, BLOCK_K)
    tl.store(to + in_part, sums, mask=in_part < tl.where(is_row, length, 0))


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


def sjlt_launch(
    x: torch.Tensor, k: int, sparsity: int, seed: int, first: int, fewest_bits: int, architecture: str
) -> tuple[torch.Tensor, Launch]:
    """The (still unwritten) sums of segments [segments, b, k] float32, without 1 / sqrt(sparsity), and their launch.

    fewest_bits: a segment has 2^fewest_bits coordinates at least.
    """
    b, p = x.shape
    bits = (k // sparsity).bit_length() - 1
    segment_bits, segments = segments_of(first, p, max(fewest_bits, bits + 2))
    most_k, most_rows, of_thread, stages = SJLT_TABLE[architecture]
    length = -(-k // sparsity)
    block_k = min(most_k, triton.next_power_of_2(length))
    rows, tiles = (1 if b == 1 else most_rows), triton.cdiv(length, block_k)
    partial = x.new_empty(segments, b, k, dtype=torch.float32)
    unit = UNIT if first % UNIT == 0 else 1
    arguments: dict[str, Any] = {"x_ptr": x, "partial_ptr": partial, "B": b, "P": p, "K": k}
    arguments |= {"first_units": first // unit, "stride_b": x.stride(0)}
    for name, purpose in (("row", rng.SJLT), ("sign", rng.SJLT_SIGN)):
        arguments[f"{name}_first"], arguments[f"{name}_second"] = rng.hash_key(seed, purpose).signed()
    # A small k leaves threads without a number: several blocks go side by side then.
    constants = {"SPARSITY": sparsity, "SEGMENT_BITS": segment_bits, "BITS": bits, "ROWS": rows, "BLOCK_K": block_k}
    repeat = max(1, FEWEST_LANES // block_k) if bits <= SHARED_BITS else 1
    constants |= {"TILES": tiles, "REPEAT": repeat, "UNIT": unit}
    constants |= {"EXACT": length == 1 << bits and block_k <= length and k % sparsity == 0}
    constants |= {"IN_SHARED": bits <= SHARED_BITS, "STAGES": stages}
    if bits > SHARED_BITS:  # addresses of elements take registers
        of_thread //= 2
    num_warps = max(4, min(16, block_k // (32 * of_thread)))
    grid = (segments, sparsity * tiles, triton.cdiv(b, rows))
    return partial, Launch(sjlt_kernel, grid, arguments, constants, {"num_warps": num_warps})


def sum_launch(partial: torch.Tensor, out: torch.Tensor, scale: float) -> Launch:
    """The launch that adds scale times the sum of the segments to out [b, k]."""
    segments, b, k = partial.shape
    return Launch(
        sum_kernel, (triton.cdiv(k, SUM_BLOCK), b),
        {"partial_ptr": partial, "out_ptr": out, "scale": scale, "B": b, "K": k, "SEGMENTS": segments}
        | {"stride_out": out.stride(0)},
        {"BLOCK": SUM_BLOCK}, {"num_warps": 4},
    )  # fmt: skip


def segments_of(first: int, p: int, bits: int) -> tuple[int, int]:
    """Segments of 2^bits coordinates, cut at multiples of that: bits, as given or more, and their number."""
    while p >> bits >= MOST_SEGMENTS:
        bits += 1
    return bits, ((first + p - 1) >> bits) - (first >> bits) + 1
