"""Random words that depend on nothing but (seed, purpose, counter, stream), and the random projections made of them.

No state and no order: a piece of a projection can be made anywhere, by native/counter_hash.h, triton_hash.py or this
file, with the same bits. docs/decisions/0015 says why this function and what was tested.

    word = mix(mix(low ^ inner) ^ (outer + 0x9e3779b9 high)),   counter = low + 2^32 high,
    inner = mix(stream ^ first), outer = mix(stream + second),   (first, second) = hash_key(seed, purpose), modulo 2^32
"""

from typing import NamedTuple

import torch

SJLT, SJLT_SIGN, RADEMACHER, MASK = 1, 2, 3, 4  # purposes: one seed serves all without their words being related
COORDINATES_OF_WORD = 32  # bit i of a word of signs is the sign of coordinate 32 * counter + i; set means minus
_LOW = 0xFFFFFFFF


class HashKey(NamedTuple):
    """Two words of 0 to 2^32 - 1."""

    first: int
    second: int

    def signed(self) -> tuple[int, int]:
        """The same bits as two int32, which is what a Triton kernel is handed."""
        return _as_int32(self.first), _as_int32(self.second)


def hash_key(seed: int, purpose: int) -> HashKey:
    """The key of a call: SplitMix64's finaliser over the seed, modulo 2^64, and the purpose."""
    z = (seed + purpose * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    z ^= z >> 31
    return HashKey(z & _LOW, z >> 32)


def words(key: HashKey, counter: torch.Tensor, stream: torch.Tensor | int) -> torch.Tensor:
    """int64 words of 0 to 2^32 - 1 for counter (int64, 0 to 2^63 - 1) and stream (0 to 2^32 - 1), broadcast."""
    stream = torch.as_tensor(stream, dtype=torch.int64, device=counter.device)
    first, second = key.signed()
    inner = _mix(stream.to(torch.int32) ^ first)
    outer = _mix(stream.to(torch.int32) + second)
    low, high = counter.to(torch.int32), (counter >> 32).to(torch.int32)
    return _mix(_mix(low ^ inner) ^ (outer + high * _as_int32(0x9E3779B9))).to(torch.int64) & _LOW


def _mix(h: torch.Tensor) -> torch.Tensor:
    """A bijection of 32 bits with full avalanche (constants found by C. Wellons's hash prospector); wraps in int32."""
    h = (h ^ ((h >> 16) & 0xFFFF)) * 0x21F0AAAD
    h = (h ^ ((h >> 15) & 0x1FFFF)) * _as_int32(0xD35A2D97)
    return h ^ ((h >> 15) & 0x1FFFF)


def _as_int32(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


def sjlt_map(seed: int, coordinates: torch.Tensor, k: int, sparsity: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where SJLT puts coordinates: rows [sparsity, n] int64 of 0 to k - 1, and signs [sparsity, n] float32 of +-1.

    Nonzero j of a coordinate lies in part j of the rows, from floor(j k / sparsity) to floor((j + 1) k / sparsity). The
    coordinates of a block of 2^m <= k / sparsity are spread by a bijection of m bits over 2^m successive rows of the
    part, which begin at a random one and go round its end. So two coordinates share a row with probability 1 / (length
    of the part), or never when they share a block, which is all that the error of an inner product depends on; and
    because a block can be read backwards, from row to coordinate, a GPU sums without atomics.

        h = c ^ x;  h = a h mod 2^m;  h ^= h >> s;  h = b h mod 2^m;  h ^= h >> s;  row = (start + h) mod length
        c = coordinate mod 2^m, s = max(1, ceil(m / 2)); words 4j to 4j + 3 of the block give start, x, a | 1, b | 1

    Args:
        seed: any int, taken modulo 2^64.
        coordinates: [n] int64, 0 to 2^63 - 1.
        k, sparsity: rows, and nonzeros of a coordinate, 1 <= sparsity <= k < 2^31.
    """
    bits = (k // sparsity).bit_length() - 1
    mask, shift = (1 << bits) - 1, max(1, (bits + 1) // 2)
    block, of_block = torch.unique_consecutive(coordinates >> bits, return_inverse=True)
    word, of_word = torch.unique_consecutive(coordinates // COORDINATES_OF_WORD, return_inverse=True)
    rows, signs = [], []
    for j in range(sparsity):
        low, high = j * k // sparsity, (j + 1) * k // sparsity
        start, x, a, b = (words(hash_key(seed, SJLT), block, 4 * j + i) for i in range(4))
        h = (coordinates & mask) ^ (x & mask)[of_block]
        for odd in (a, b):
            h = h * ((odd | 1) & mask)[of_block] & mask
            h = h ^ (h >> shift)
        row = ((start * (high - low)) >> 32)[of_block] + h
        rows.append(low + torch.where(row < high - low, row, row - (high - low)))
        bit = words(hash_key(seed, SJLT_SIGN), word, j)[of_word] >> (coordinates % COORDINATES_OF_WORD) & 1
        signs.append(1.0 - 2.0 * bit.to(torch.float32))
    return torch.stack(rows), torch.stack(signs)


def rademacher_signs(seed: int, coordinates: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Signs [n, c] float32 of +-1 for coordinates [n] and columns [c]; a column is the stream of its words."""
    word, of_word = torch.unique_consecutive(coordinates // COORDINATES_OF_WORD, return_inverse=True)
    columns_words = words(hash_key(seed, RADEMACHER), word[:, None], columns[None, :]).to(torch.int32)
    bit = columns_words[of_word] >> (coordinates % COORDINATES_OF_WORD)[:, None].to(torch.int32) & 1
    return 1.0 - 2.0 * bit.to(torch.float32)


def coordinate_mask(seed: int, p: int, keep: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """`keep` coordinates of 0 to p - 1, ascending, int64: a random one of each of `keep` equal stretches.

    A coordinate is kept with probability 1 / (length of its stretch); lengths differ by at most one. p < 2^31 keep.
    """
    if keep == 0:
        return torch.empty(0, dtype=torch.int64, device=device)
    number = torch.arange(keep, dtype=torch.int64, device=device)
    # floor(i p / keep) without the product, which need not fit 63 bits.
    starts = number * (p // keep) + number * (p % keep) // keep
    stops = (number + 1) * (p // keep) + (number + 1) * (p % keep) // keep
    word = words(hash_key(seed, MASK), number, 0)
    return starts + ((word * (stops - starts)) >> 32)
