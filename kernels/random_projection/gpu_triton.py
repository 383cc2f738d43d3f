# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""random_projection on a GPU, without atomics: SJLT read backwards, Rademacher a product with signs made in place.

SJLT is kernels/_runtime/triton_sjlt.py, which lora_gradient_sketch uses too.
Rademacher. Who owns what: a program owns BLOCK_K columns, BLOCK_B rows of x and a segment; for 32 coordinates at a time
    it makes a word of signs for each column, widens the bits to +-1 and multiplies. 16-bit signs are made two at a time
    (a shift, and a choice of bits) in the registers from which the matrix units of A100 and H100 read them. Reads: x
    k / BLOCK_K times, all but the first from the second-level cache. float32 x: three TF32 products ("tf32x3"), of
    which the signs need no split. The segments' sums go to [segments, b, k] float32, which the second kernel adds;
    SLAB coordinates are passed at a time, for that array's size.
Limits: float32, bfloat16, float16; x with rows that are not contiguous is copied.
"""

import torch
import triton
import triton.language as tl

from fastsel.kernels._runtime import rng
from fastsel.kernels._runtime.devices import triton_architecture
from fastsel.kernels._runtime.triton_blocks import tile_product
from fastsel.kernels._runtime.triton_hash import counter_word, inner_key, outer_key
from fastsel.kernels._runtime.triton_launch import Launch, Programs, Work, no_device
from fastsel.kernels._runtime.triton_sjlt import segments_of, sjlt_launch, sum_launch

SEGMENT_BITS = 16  # of SJLT: a segment has 2^16 coordinates at least
# Of dense signs: 2^13 coordinates, 2^20 in a launch. Matrix units cut what they add up instead of rounding it: on an
# H200 sums of 2^16 coordinates of float16 erred by 0.1 where float32 additions err by 0.04 at most.
CHAIN_BITS, SLAB = 13, 2**20
# (architecture, bytes of an element): BLOCK_K, most of BLOCK_B, num_warps, num_stages, float32 products
RADEMACHER_TABLE = {
    ("sm_80", 2): (256, 64, 4, 3, "ieee"),
    ("sm_80", 4): (128, 32, 4, 2, "tf32x3"),
    ("sm_90", 2): (256, 64, 8, 3, "ieee"),
    ("sm_90", 4): (128, 64, 4, 3, "tf32x3"),
    ("sm_100", 2): (256, 64, 4, 3, "ieee"),
    ("sm_100", 4): (128, 64, 4, 3, "tf32x3"),
    ("gfx942", 2): (128, 64, 4, 2, "ieee"),
    ("gfx942", 4): (64, 32, 4, 2, "ieee"),
}


@triton.jit
def _with_neighbours_apart(word):
    """The bits of uint32 words in another order: of bits 2 j and 2 j + 1 the second lies 16 places above the first.

    Then one shift puts both into the sign's places of two numbers of 16 bits: by 15 - 2 j of the lower 16 bits, which
    come to even places, and by 30 - 2 j of the upper 16.
    """
    return (word & 0x5555) | ((word & 0xAAAA) << 15) | ((word >> 15) & 0xAAAA) | (word & 0xAAAA0000)


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
    in_word, in_pairs = tl.arange(0, 32), tl.arange(0, 16)
    to_sign = tl.where(in_pairs < 8, 15 - 2 * in_pairs, 30 - 2 * in_pairs).to(tl.uint32)
    rows_at = x_ptr + tl.minimum(row, B - 1)[None, :] * stride_b + in_word[:, None]
    begin = ((first >> SEGMENT_BITS) + segment) << (SEGMENT_BITS - 5)
    begin = tl.maximum(begin, first >> 5)
    end = tl.minimum(((first >> SEGMENT_BITS) + segment + 1) << (SEGMENT_BITS - 5), ((first + P - 1) >> 5) + 1)
    sums = tl.zeros([BLOCK_K, BLOCK_B], tl.float32)
    for i in range(end - begin):
        block = begin + i
        word = counter_word(block, inner, outer)
        if x_ptr.dtype.element_ty != tl.float32:
            word = _with_neighbours_apart(word)
        # Each word is made by one thread and fetched from shared memory by those that need it: as an elementwise
        # operation alone it would be made anew in each of the four threads that share a row of the product.
        word = tl.gather(word, tl.arange(0, BLOCK_K), axis=0)
        if x_ptr.dtype.element_ty == tl.float32:
            bit = (word[:, None] >> in_word.to(tl.uint32)[None, :]) & 1
            sign = ((bit << 31) | 0x3F800000).to(tl.float32, bitcast=True)
        else:
            ONES: tl.constexpr = 0x3F803F80 if x_ptr.dtype.element_ty == tl.bfloat16 else 0x3C003C00
            pair = ((word[:, None] << to_sign[None, :]) & 0x80008000) | ONES
            pair = tl.join((pair & 0xFFFF).to(tl.uint16), (pair >> 16).to(tl.uint16))
            sign = tl.reshape(pair, [BLOCK_K, 32]).to(x_ptr.dtype.element_ty, bitcast=True)
        start = (block << 5) - first
        live = (in_word >= -start) & (in_word < P - start)
        x = tl.load(rows_at + start, mask=live[:, None], other=0.0)
        sums = tile_product(sign, x, sums, PRECISION)
    to = partial_ptr + (segment * B + row[None, :]) * K + column[:, None]
    tl.store(to, sums, mask=(row < B)[None, :] & (column < K)[:, None])


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
    if kind == "sjlt":
        partial, launch = sjlt_launch(x, k, sparsity, seed, first, SEGMENT_BITS, architecture)
        return [launch, sum_launch(partial, out, sparsity**-0.5)]
    segment_bits, segments = segments_of(first, p, CHAIN_BITS)
    block_k, most_b, num_warps, num_stages, precision = RADEMACHER_TABLE[architecture, x.element_size()]
    # Narrower tiles of float32 spill on sm_100.
    block_b = min(most_b, max(16 if x.element_size() == 2 else 32, triton.next_power_of_2(b)))
    partial = x.new_empty(segments, b, k, dtype=torch.float32)
    key_first, key_second = rng.hash_key(seed, rng.RADEMACHER).signed()
    launch = Launch(
        rademacher_kernel,
        (segments, triton.cdiv(k, block_k), triton.cdiv(b, block_b)),
        {"x_ptr": x, "partial_ptr": partial, "B": b, "P": p, "K": k, "first": first, "stride_b": x.stride(0)}
        | {"key_first": key_first, "key_second": key_second},
        {"SEGMENT_BITS": segment_bits, "BLOCK_K": block_k, "BLOCK_B": block_b, "PRECISION": precision},
        {"num_warps": num_warps, "num_stages": num_stages},
    )
    return [launch, sum_launch(partial, out, 1.0)]


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


def compute(
    x: torch.Tensor, k: int, kind: str, sparsity: int, seed: int, first: int, out: torch.Tensor
) -> torch.Tensor:
    """See api.random_projection."""
    slab = SLAB if kind == "rademacher" else max(1, x.shape[1])
    for start in range(0, max(1, x.shape[1]), slab):
        part = x[:, start : start + slab]
        for launch in plan(part, k, kind, sparsity, seed, first + start, out, architecture=triton_architecture(x)):
            launch.run()
    return out
