"""The counter hash against a transcription in Python integers, and what a random source must show."""

import numpy as np
import pytest
import torch

from fastsel.kernels._runtime import rng

WORD = 2**32
GOLDEN_KEY = (2065550767, 3793791033)
GOLDEN_WORDS = [414133776, 784271966, 4001362989, 2107215588, 1127094144]


def mix(h):
    h = (h ^ (h >> 16)) * 0x21F0AAAD % WORD
    h = (h ^ (h >> 15)) * 0xD35A2D97 % WORD
    return h ^ (h >> 15)


def word(seed, purpose, counter, stream):
    first, second = rng.hash_key(seed, purpose)
    inner, outer = mix(stream ^ first), mix((stream + second) % WORD)
    return mix(mix(counter % WORD ^ inner) ^ (outer + 0x9E3779B9 * (counter >> 32)) % WORD)


@pytest.mark.parametrize("seed", [0, 1, 2**63 + 12345, 2**64 - 1])
@pytest.mark.parametrize("start", [0, 2**32 - 20, 2**40 + 3, 2**63 - 64])
def test_matches_reference_in_python_integers(seed, start):
    counters = [start + i for i in range(64)]
    for stream in (0, 7, 2**31, WORD - 5):
        expected = [word(seed, rng.SJLT, counter, stream) for counter in counters]
        got = rng.words(rng.hash_key(seed, rng.SJLT), torch.tensor(counters), stream)
        assert got.tolist() == expected


def test_golden_words_never_change():
    """Sketches on disk are only comparable while these words stay: a change needs another generator id."""
    assert rng.hash_key(0, rng.SJLT) == GOLDEN_KEY
    got = rng.words(rng.hash_key(0, rng.SJLT), torch.tensor([0, 1, 2, 2**32, 2**40]), 3)
    assert got.tolist() == GOLDEN_WORDS


@pytest.mark.parametrize("what", ["counter", "high counter", "stream", "seed"])
def test_law_every_input_bit_turns_every_output_bit_half_the_time(what):
    n = 1 << 14
    generator = torch.Generator().manual_seed(0)
    counter = torch.randint(0, 2**40, (n,), generator=generator)
    stream = torch.randint(0, 8192, (n,), generator=generator)
    base = rng.words(rng.hash_key(5, 1), counter, stream)
    for bit in range(32):
        if what == "seed":
            turned = rng.words(rng.hash_key(5 ^ 1 << bit, 1), counter, stream)
        elif what == "stream":
            turned = rng.words(rng.hash_key(5, 1), counter, stream ^ 1 << bit)
        else:
            turned = rng.words(rng.hash_key(5, 1), counter ^ 1 << (bit + (31 if what == "high counter" else 0)), stream)
        share = ((base ^ turned)[:, None] >> torch.arange(32) & 1).double().mean(0)
        assert (share - 0.5).abs().max() < 5.5 * 0.5 / n**0.5


def test_law_words_of_streams_and_neighbours_are_uncorrelated():
    signs = rng.rademacher_signs(3, torch.arange(2048), torch.arange(512)).double()
    for gram, length in ((signs.T @ signs, 2048), (signs @ signs.T, 512)):
        off = gram[~torch.eye(len(gram), dtype=torch.bool)] / length**0.5
        assert abs(off.mean()) < 0.02 and abs(off.std() - 1) < 0.02 and off.abs().max() < 6


def test_law_rows_and_signs_are_even():
    rows, signs = rng.sjlt_map(1, torch.arange(200_000), 100, 3)
    for j in range(3):
        low, high = j * 100 // 3, (j + 1) * 100 // 3
        cells = (rows[j] - low) * 2 + (signs[j] < 0)
        expected = len(cells) / (2 * (high - low))
        chi = ((torch.bincount(cells, minlength=2 * (high - low)) - expected) ** 2 / expected).sum()
        assert rows[j].min() == low and rows[j].max() == high - 1
        assert abs(chi - 2 * (high - low) + 1) < 5 * (4 * (high - low)) ** 0.5


@pytest.mark.parametrize(("p", "keep"), [(10, 10), (1000, 7), (2**40 + 11, 1000), (1, 1), (5, 0)])
def test_mask_keeps_one_coordinate_of_each_stretch(p, keep):
    kept = rng.coordinate_mask(9, p, keep).tolist()
    bounds = [p * i // keep for i in range(keep + 1)] if keep else []
    assert len(kept) == keep
    assert all(low <= at < high for low, at, high in zip(bounds, kept, bounds[1:], strict=False))


def test_law_mask_keeps_every_coordinate_equally_often():
    counts = np.bincount(np.concatenate([rng.coordinate_mask(seed, 50, 20).numpy() for seed in range(3000)]))
    assert len(counts) == 50 and abs(counts / 3000 - 0.4).max() < 0.13  # stretches of 2 and of 3 coordinates
