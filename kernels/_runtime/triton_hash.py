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
def sjlt_row(word, size):
    """int32 row of 0 to size - 1; bit 0 of the word is the sign (set: minus)."""
    return tl.umulhi(word, (tl.zeros_like(word) + size).to(tl.uint32)).to(tl.int32)
