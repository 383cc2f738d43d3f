"""The matrices of TRAK's CUDA kernel (fast_jl 0.1.3, project_rademacher), emulated on a CPU from what its source says.

For stores that LESS wrote on a GPU: features of other rows compare with them only through the same matrix, and that is
a function of the number of multiprocessors of the GPU that wrote them (108 of an A100, 132 of an H100 SXM), which no
store says. R [p, k] is cut into min(p, num_sms) tiles of as many rows each; a thread stands for a column c of R's
generators and draws one word of curand's XORWOW, seeded by seed + 658105236 c + 359124577 tile, for every 16 rows:

    bit 2 x + b of thread c's word  ->  row 2 x + (c mod 32 >= 16) of the 16,  column c - c mod 32 + 2 (c mod 16) + b

a set bit is +1. The tests hold it to a transcription thread by thread; nobody has compared it with a GPU yet.
"""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

COLUMNS_A_BLOCK = 512  # of threads: k must be a multiple
BYTES = 64 << 20  # of signs at a time


def fast_jl_projection(x: torch.Tensor, k: int, *, num_sms: int, seed: int = 0, model_id: int = 0) -> torch.Tensor:
    """What CudaProjector(...).project(x, model_id) of TRAK returns on a GPU with num_sms multiprocessors.

    Args:
        x: [b, p], rounded to float16 as there.
        k: a multiple of 512.
        num_sms: torch.cuda.get_device_properties(i).multi_processor_count of that GPU.
        seed, model_id: as CudaProjector takes them; LESS has 0 and 0.

    Returns:
        [b, k] float32, not scaled; sums are in another order than there, so equal to about 1e-6 of their lengths.

    Raises:
        ValueError: k is no multiple of 512, or num_sms is below 1.

    Cost: p k / 16 words and 2 b p k flops.
    """
    if k < 1 or k % COLUMNS_A_BLOCK:
        raise ValueError(f"k must be a multiple of {COLUMNS_A_BLOCK}, got {k}")
    if num_sms < 1:
        raise ValueError(f"num_sms must be at least 1, got {num_sms}")
    b, p = x.shape
    halves = x.to(torch.float16).float().cpu()
    out = torch.zeros(b, k)
    if p:
        for rows, signs in fast_jl_rows(p, k, num_sms=num_sms, seed=seed + 10_000 * model_id):
            out += halves[:, rows] @ torch.from_numpy(signs)
    return out.to(x.device)


def fast_jl_rows(
    p: int, k: int, *, num_sms: int, seed: int = 0
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """(coordinates [m], their rows of R [m, k]); every coordinate once."""
    n_tiles = min(p, num_sms)
    size = -(-p // n_tiles)
    together = max(1, BYTES // (64 * k))  # tiles at a time
    for first in range(0, n_tiles, together):
        tiles = np.arange(first, min(first + together, n_tiles))
        words = _words(tiles, k, seed)
        for chunk in range(0, size, 16):
            signs = _signs(next(words))
            within = chunk + np.arange(16)
            coordinates = (tiles[:, None] * size + within).reshape(-1)
            real = np.tile(within < size, len(tiles)) & (coordinates < p)
            if real.any():
                yield coordinates[real], signs.reshape(-1, k)[real]


def _words(tiles: NDArray[np.int64], k: int, seed: int) -> Iterator[NDArray[np.uint32]]:
    """Curand's XORWOW with sequence 0 and offset 0: uint32 [tiles, k], one draw of every thread after another."""
    u = np.uint32
    seeds = ((seed + 658105236 * np.arange(k) + 359124577 * tiles[:, None]) % 2**32).astype(u)
    s0, s1 = seeds ^ u(0xAAD26B49), u(0xF7DCEFDD)
    with np.errstate(over="ignore"):
        t0, t1 = u(1099087573) * s0, u(2591861531) * s1
        d = u(6615241) + t1 + t0
        same = np.zeros_like(t0)
        v = [u(123456789) + t0, u(362436069) ^ t0, same + (u(521288629) + t1), same + (u(88675123) ^ t1),
             u(5783321) + t0]  # fmt: skip
        while True:
            t = v[0] ^ (v[0] >> u(2))
            v = [*v[1:], (v[4] ^ (v[4] << u(4))) ^ (t ^ (t << u(1)))]
            d = d + u(362437)
            yield v[4] + d


def _signs(words: NDArray[np.uint32]) -> NDArray[np.float32]:
    """[tiles, 16, k] of +1 and -1 from the low 16 bits of [tiles, k]."""
    n, k = words.shape
    bits = (words[:, None, :] >> np.arange(16, dtype=np.uint32)[:, None]) & np.uint32(1)  # [tiles, bit, thread]
    # bit (x, b), thread (warp, upper, column pair)  ->  row (x, upper), column (warp, pair, b)
    turned = bits.reshape(n, 8, 2, k // 32, 2, 16).transpose(0, 1, 4, 3, 5, 2)
    signs: NDArray[np.float32] = turned.reshape(n, 16, k).astype(np.float32) * 2 - 1
    return signs
