"""Random words that depend on nothing but (seed, purpose, counter, stream), and the random projections made of them.

No state and no order: a piece of a projection can be made anywhere, by native/counter_hash.h, triton_hash.py or this
file, with the same bits. docs/decisions/0015 says why this function and what was tested.

    word = mix(mix(low ^ inner) ^ (outer + 0x9e3779b9 high)),   counter = low + 2^32 high,
    inner = mix(stream ^ first), outer = mix(stream + second),   (first, second) = hash_key(seed, purpose), modulo 2^32
"""

from typing import NamedTuple

import torch

SJLT, RADEMACHER, MASK = 1, 2, 3  # purposes: one seed serves all three without their words being related
COORDINATES_OF_WORD = 32  # Rademacher: bit i of a column's word is the sign of coordinate 32 * block + i
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

    Nonzero j falls into rows [floor(j k / sparsity), floor((j + 1) k / sparsity)), so that a coordinate never meets
    itself. A row is the high half of word times size, uniform to a relative size / 2^32; bit 0 set means minus.
    """
    starts = [j * k // sparsity for j in range(sparsity + 1)]
    key = hash_key(seed, SJLT)
    rows, signs = [], []
    for j in range(sparsity):
        word = words(key, coordinates, j)
        rows.append(starts[j] + ((word * (starts[j + 1] - starts[j])) >> 32))
        signs.append(1.0 - 2.0 * (word & 1).to(torch.float32))
    return torch.stack(rows), torch.stack(signs)


def rademacher_signs(seed: int, coordinates: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Signs [n, c] float32 of +-1 for coordinates [n] and columns [c]; a set bit of a word means minus."""
    word = words(hash_key(seed, RADEMACHER), (coordinates // COORDINATES_OF_WORD)[:, None], columns[None, :])
    bit = (word >> (coordinates % COORDINATES_OF_WORD)[:, None]) & 1
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
