# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Random words of (seed, purpose, counter, stream) in Triton: the function of kernels/_runtime/rng.py, bit for bit.

The host hands over the two words of rng.hash_key as int32, exempt from specialisation (one kernel for all seeds):
    @triton.jit(do_not_specialize=["key_first", "key_second"])
"""

import triton
import triton.language as tl


@triton.jit
def mixed(h):
    """A bijection of uint32 with full avalanche."""
    h = (h ^ (h >> 16)) * 0x21F0AAAD
    h = (h ^ (h >> 15)) * 0xD35A2D97
    return h ^ (h >> 15)


@triton.jit
def inner_key(stream, key_first):
    """First half of a stream's key, uint32; once for a stream."""
    return mixed(stream.to(tl.uint32) ^ key_first.to(tl.uint32))


@triton.jit
def outer_key(stream, key_second):
    """Second half of a stream's key, uint32; once for a stream."""
    return mixed(stream.to(tl.uint32) + key_second.to(tl.uint32))


@triton.jit
def counter_word(counter, inner, outer):
    """uint32 words of int64 counters; counter and the stream's two key halves broadcast against each other."""
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    return mixed(mixed(low ^ inner) ^ (high * 0x9E3779B9 + outer))


@triton.jit
def aligned_word(counter, offset, inner, outer):
    """counter_word(counter + offset) where no carry leaves the low half: an int64 counter, uint32 offsets.

    What depends on the counter alone is then computed once, not for each offset.
    """
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    return mixed(mixed((low + offset) ^ inner) ^ (high * 0x9E3779B9 + outer))


@triton.jit
def inverse(odd):
    """The uint32 inverse of odd uint32 numbers modulo 2^32: Newton, 3 right bits at first, twice as many each time."""
    x = odd
    for _ in tl.static_range(4):
        x = x * (2 - odd * x)
    return x


@triton.jit
def sjlt_block(block, j, length, key_first, key_second):
    """What one block (int64 number) of nonzero j needs: start, x, and the inverses of a and b of rng.sjlt_map."""
    stream = (block * 0 + 4 * j).to(tl.uint32)
    word = counter_word(block, inner_key(stream, key_first), outer_key(stream, key_second))
    start = tl.umulhi(word, (block * 0 + length).to(tl.uint32))
    x = counter_word(block, inner_key(stream + 1, key_first), outer_key(stream + 1, key_second))
    a = counter_word(block, inner_key(stream + 2, key_first), outer_key(stream + 2, key_second)) | 1
    b = counter_word(block, inner_key(stream + 3, key_first), outer_key(stream + 3, key_second)) | 1
    return start, x, inverse(a), inverse(b)


@triton.jit
def sjlt_coordinate(row, length, start, x, a_inverse, b_inverse, BITS: tl.constexpr):
    """rng.sjlt_map backwards: the coordinate in its block (uint32) that meets row 0 to length - 1 of the part, and
    whether there is one.
    """
    MASK: tl.constexpr = (1 << BITS) - 1
    SHIFT: tl.constexpr = (BITS + 1) // 2 if BITS > 1 else 1
    row = row.to(tl.uint32)
    h = tl.where(row >= start, row - start, row + (length - start).to(tl.uint32))
    met = h <= MASK
    h = ((h ^ (h >> SHIFT)) * b_inverse) & MASK
    h = ((h ^ (h >> SHIFT)) * a_inverse) & MASK
    return (h ^ x) & MASK, met
