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
    columns = rng.rademacher_signs(3, torch.arange(2048), torch.arange(512)).double()
    streams = rng.sjlt_map(3, torch.arange(2048), 512, 512)[1].T.double()
    for gram, length in ((columns.T @ columns, 2048), (columns @ columns.T, 512), (streams.T @ streams, 2048)):
        off = gram[~torch.eye(len(gram), dtype=torch.bool)] / length**0.5
        assert abs(off.mean()) < 0.02 and abs(off.std() - 1) < 0.02 and off.abs().max() < 6


@pytest.mark.parametrize(("k", "sparsity"), [(1, 1), (2, 1), (100, 3), (97, 1), (256, 1), (5, 5)])
def test_law_a_block_of_coordinates_meets_no_row_twice(k, sparsity):
    bits = (k // sparsity).bit_length() - 1
    first = (2**40 // k) << bits
    rows, signs = rng.sjlt_map(1, torch.arange(first, first + 64 * 2**bits), k, sparsity)
    for j in range(sparsity):
        low, high = j * k // sparsity, (j + 1) * k // sparsity
        assert rows[j].min() >= low and rows[j].max() < high
        for block in rows[j].view(64, -1):
            assert len(block.unique()) == len(block)
    assert set(signs.unique().tolist()) <= {-1.0, 1.0}


@pytest.mark.parametrize("k", [64, 100])
def test_law_rows_are_even_and_two_blocks_meet_as_often_as_chance(k):
    """Over seeds: a coordinate is in each row equally often; two of different blocks meet with probability 1 / k."""
    n_seeds = 2000
    coordinates = torch.tensor([0, 1, 17, 63, 64, 65, 200, 2**40])
    rows = torch.stack([rng.sjlt_map(seed, coordinates, k, 1)[0][0] for seed in range(n_seeds)])
    for i in range(len(coordinates)):
        expected = n_seeds / k
        chi = ((torch.bincount(rows[:, i], minlength=k) - expected) ** 2 / expected).sum()
        assert abs(chi - (k - 1)) < 4.5 * (2 * (k - 1)) ** 0.5
        for j in range(i):
            meetings = (rows[:, i] == rows[:, j]).sum()
            if coordinates[i] // 64 == coordinates[j] // 64:
                assert meetings == 0
            else:
                assert abs(meetings - n_seeds / k) < 4.5 * (n_seeds / k) ** 0.5


@pytest.mark.parametrize(("p", "keep"), [(10, 10), (1000, 7), (2**40 + 11, 1000), (1, 1), (5, 0)])
def test_mask_keeps_one_coordinate_of_each_stretch(p, keep):
    kept = rng.coordinate_mask(9, p, keep).tolist()
    bounds = [p * i // keep for i in range(keep + 1)] if keep else []
    assert len(kept) == keep
    assert all(low <= at < high for low, at, high in zip(bounds, kept, bounds[1:], strict=False))


def test_law_mask_keeps_every_coordinate_equally_often():
    counts = np.bincount(np.concatenate([rng.coordinate_mask(seed, 50, 20).numpy() for seed in range(2000)]))
    assert len(counts) == 50 and abs(counts / 2000 - 0.4).max() < 0.13  # stretches of 2 and of 3 coordinates
