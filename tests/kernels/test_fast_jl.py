"""The emulated matrices of TRAK's CUDA kernel against a transcription of that kernel, thread by thread."""

import numpy as np
import pytest
import torch

from fastsel.kernels.random_projection import fast_jl, fast_jl_projection, fast_jl_rows

LOW = 2**32 - 1


class Xorwow:
    """curand_init(seed, 0, 0, &state), then curand(&state)."""

    def __init__(self, seed):
        t0, t1 = 1099087573 * (seed ^ 0xAAD26B49) & LOW, 2591861531 * 0xF7DCEFDD & LOW
        self.d = (6615241 + t1 + t0) & LOW
        self.v = [(123456789 + t0) & LOW, 362436069 ^ t0, (521288629 + t1) & LOW, 88675123 ^ t1, (5783321 + t0) & LOW]

    def draw(self):
        t = self.v[0] ^ (self.v[0] >> 2)
        self.v = [*self.v[1:], (self.v[4] ^ (self.v[4] << 4 & LOW)) ^ (t ^ (t << 1 & LOW))]
        self.d = (self.d + 362437) & LOW
        return (self.v[4] + self.d) & LOW


def transcribed(p, k, num_sms, seed):
    """[p, k]: one block of (16, 2, 16) threads for every 512 columns and tile; a warp's factors are half2 [16][16]."""
    n_tiles = min(p, num_sms)
    tile_size = (p - 1) // n_tiles + 1
    matrix = np.zeros((p, k))
    for tile in range(n_tiles):
        for block in range(k // 512):
            for z in range(16):
                for y in range(2):
                    for x in range(16):
                        column = (x + 16 * y) + z * 32 + block * 512
                        state = Xorwow((seed + 658105236 * column + 359124577 * tile) & LOW)
                        for chunk in range(0, tile_size, 16):
                            bits = state.draw()
                            for pair in range(8):
                                place = pair * 32 + x + 16 * y  # of half2
                                row, half2 = divmod(place, 16)
                                within, coordinate = chunk + row, tile * tile_size + chunk + row
                                for b in range(2):
                                    if within < tile_size and coordinate < p:
                                        matrix[coordinate, block * 512 + z * 32 + 2 * half2 + b] = 1 if bits & 1 else -1
                                    bits >>= 1
    return matrix


def matrix_of(p, k, **options):
    matrix, seen = np.zeros((p, k)), np.zeros(p, int)
    for rows, signs in fast_jl_rows(p, k, **options):
        matrix[rows] = signs
        seen[rows] += 1
    assert (seen == 1).all()
    return matrix


@pytest.mark.parametrize(("p", "k", "num_sms", "seed"), [(70, 512, 3, 0), (5, 512, 108, 7), (33, 1024, 2, 2**32 - 5)])
def test_matches_the_transcription(p, k, num_sms, seed, monkeypatch):
    expected = transcribed(p, k, num_sms, seed)
    np.testing.assert_array_equal(matrix_of(p, k, num_sms=num_sms, seed=seed), expected)
    monkeypatch.setattr(fast_jl, "BYTES", 1)  # a tile at a time
    np.testing.assert_array_equal(matrix_of(p, k, num_sms=num_sms, seed=seed), expected)


def test_projects_as_the_kernel_does():
    """Inputs become float16; the model's number moves the seed by 10,000."""
    x = torch.randn(3, 70, generator=torch.Generator().manual_seed(0))
    got = fast_jl_projection(x, 512, num_sms=3, seed=1, model_id=2)
    expected = x.half().double() @ torch.from_numpy(matrix_of(70, 512, num_sms=3, seed=20_001))
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-5)
    assert fast_jl_projection(x[:, :0], 512, num_sms=3).abs().sum() == 0


def test_law_each_gpu_has_a_matrix_of_its_own():
    """Half of the signs of an A100 and an H100 agree; with enough rows a tile, both keep inner products."""
    a100, h100 = (matrix_of(54_000, 512, num_sms=n) for n in (108, 132))
    assert abs((a100 == h100).mean() - 0.5) < 0.005
    generator = np.random.default_rng(0)
    u, v = generator.standard_normal((2, 54_000)) / 54_000**0.5
    for matrix in (a100, h100):
        assert abs((u @ matrix) @ (v @ matrix) / 512 - u @ v) < 5 / 512**0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [({"k": 100}, "k must be a multiple of 512, got 100"), ({"num_sms": 0}, "num_sms must be at least 1, got 0")],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        fast_jl_projection(torch.ones(1, 4), **{"k": 512, "num_sms": 3, **options})
