"""NovelSelect against a float64 loop that scores every row at every step, and against the authors' lists."""

import json
import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastsel.errors import UsageError
from fastsel.selectors import novelselect
from fastsel.selectors.density import densities, first_of_equal_rows, mean_squared_distances
from fastsel.selectors.rows import Rows

novelselect_module = sys.modules["fastsel.selectors.novelselect"]  # the package's name is the function
GOLDEN = Path(__file__).parent / "golden" / "novelselect.json"
KINDS = ["random", "clustered", "copies"]


def make(kind, n, d=12, seed=0):
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((n, d)) * generator.uniform(0.5, 2, (n, 1))
    if kind == "clustered":
        x += 3 * generator.standard_normal((7, d))[generator.integers(0, 7, n)]
    if kind == "copies":
        x[n // 2 :] = x[: n - n // 2]
    return x


def naive(x, k, sigma, rule="official", alpha=1.0, quality=None, picks=(0,)):
    """The formula, every row at every step; returns the list, the gains and, per step, how far behind the second is."""
    lengths = np.linalg.norm(x, axis=1, keepdims=True)
    unit = np.divide(x, lengths, out=np.zeros_like(x), where=lengths > 0)
    quality = np.ones(len(x)) if quality is None else quality
    picks, gains, gaps = list(picks), [], []
    while len(picks) < k:
        t = len(picks)
        distances = 1 - unit @ unit[picks].T
        weights = np.arange(1, t + 1) ** -float(alpha)
        if rule == "official":
            values = np.sort(distances * (sigma[:, None] + sigma[picks]), axis=1) / t
        else:
            values = distances * sigma[picks]
            order = np.lexsort((values, np.round(distances * 2.0**40)), axis=1)
            values = np.take_along_axis(values, order, axis=1)
        scores = values @ weights * quality
        scores[picks] = -np.inf
        tied = scores >= scores.max() - 1e-12 * abs(scores.max())
        gaps.append(scores.max() - np.max(scores[~tied], initial=0.0))
        picks.append(int(tied.argmax()))
        gains.append(scores[picks[-1]])
    return picks, gains, gaps


def assert_is_naive(x, k, sigma, **options):
    naive_options = {name: options[name] for name in ("rule", "alpha", "quality") if name in options}
    picks, gains, _ = naive(x, k, sigma, **naive_options)
    got, got_gains = novelselect(x, k, density=sigma, first=0, **options)
    assert got.tolist() == picks
    np.testing.assert_allclose(got_gains[1:], gains, rtol=1e-9, atol=1e-12)
    assert got_gains[0] == 0 and got.dtype == np.int64 and got_gains.dtype == np.float64


def test_worked_example():
    """Four unit vectors at 0, 90, 60 and 180 degrees, density 1 each: A = 2 (1 - cos).

    From row 0: A is 2 (90 degrees), 1 (60) and 4 (180): row 3, gain 4. Then row 1: A = 2, 2, mean of 2 + 2/2 over two
    picks = 1.5; row 2: A = 1 and 2 (1 + 1/2) = 3, (1 + 3/2) / 2 = 1.25: row 1. Row 2 is left with A = 1, 3 and
    2 (1 - cos 30): 0.268; sorted 0.268, 1, 3: (0.268 + 1/2 + 3/3) / 3.
    """
    angles = np.deg2rad([0, 90, 60, 180])
    x = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    indices, gains = novelselect(x, 4, density=np.ones(4), first=0)
    assert indices.tolist() == [0, 3, 1, 2]
    assert gains == pytest.approx([0, 4, 1.5, (2 * (1 - np.cos(np.pi / 6)) + 0.5 + 1) / 3])
    # The paper's: no sum of densities, no mean over the picks. Row 1: 1 + 1/2; row 2: 0.134 + 0.5/2 + 1.5/3.
    indices, gains = novelselect(x, 4, density=np.ones(4), first=0, rule="paper")
    assert indices.tolist() == [0, 3, 1, 2]
    assert gains == pytest.approx([0, 2, 1.5, 1 - np.cos(np.pi / 6) + 0.25 + 0.5])


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("rule", ["official", "paper"])
@pytest.mark.parametrize("kind", KINDS)
def test_matches_the_naive_loop(kind, rule, alpha):
    x = make(kind, 300)
    sigma = np.random.default_rng(1).uniform(0.5, 2.0, 300)
    if kind == "copies":
        sigma[150:] = sigma[:150]
    assert_is_naive(x, 60, sigma, rule=rule, alpha=alpha)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["random", "clustered"])
@pytest.mark.parametrize("rule", ["official", "paper"])
def test_matches_the_naive_loop_on_a_larger_pool(kind, rule):
    x = make(kind, 3000, 96)
    assert_is_naive(x, 300, np.random.default_rng(1).uniform(0.5, 2.0, 3000), rule=rule)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 60), d=st.integers(1, 6), k=st.integers(1, 70), seed=st.integers(0, 999),
    rule=st.sampled_from(["official", "paper"]), is_grid=st.booleans(), has_quality=st.booleans(),
)  # fmt: skip
# Rows on a line: scores tie exactly, and sums of bounds differ in the last bit.
@example(n=21, d=1, k=11, seed=0, rule="paper", is_grid=False, has_quality=False)
# Picks of different densities at distances that are equal but for rounding: their order must not depend on it.
@example(n=28, d=5, k=24, seed=4, rule="paper", is_grid=True, has_quality=False)
@example(n=28, d=5, k=14, seed=3, rule="paper", is_grid=True, has_quality=False)
def test_law_equals_the_naive_loop(n, d, k, seed, rule, is_grid, has_quality):
    """Grids of few values have many ties and zero rows; equal rows have equal densities and quality."""
    generator = np.random.default_rng(seed)
    x = generator.integers(-1, 2, (n, d)).astype(float) if is_grid else generator.standard_normal((n, d))
    sigma = 1 + 0.1 * np.abs(x).sum(1)
    quality = (np.abs(x).sum(1) % 3) if has_quality else None
    assert_is_naive(x, min(k, n), sigma, rule=rule, quality=quality)


@pytest.mark.parametrize("rule", ["official", "paper"])
def test_law_fewer_rows_are_the_first_and_initial_goes_on(rule):
    x = make("clustered", 200)
    indices, gains = novelselect(x, 50, rule=rule)
    for j in (0, 1, 20):
        few, few_gains = novelselect(x, j, rule=rule)
        assert few.tolist() == indices[:j].tolist()
        np.testing.assert_allclose(few_gains, gains[:j], rtol=1e-12)
    rest, rest_gains = novelselect(x, 30, rule=rule, initial=indices[:20])
    assert rest.tolist() == indices[20:].tolist()
    np.testing.assert_allclose(rest_gains, gains[20:], rtol=1e-9)


def test_law_threads_types_and_seeds(monkeypatch):
    x = make("random", 400).astype(np.float32)
    expected, gains = novelselect(x, 40)
    assert expected[0] == np.random.RandomState(42).randint(0, 400)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            again, again_gains = novelselect(x, 40)
            assert again.tolist() == expected.tolist() and again_gains.tolist() == gains.tolist()
    finally:
        torch.set_num_threads(before)
    for given_x in (torch.from_numpy(x), x.astype(np.float64), x.tolist()):
        assert novelselect(given_x, 40)[0].tolist() == expected.tolist()
    assert novelselect(x, 1, seed=7)[0].tolist() == [np.random.RandomState(7).randint(0, 400)]
    assert novelselect(x, 3, first=5)[0][0] == 5


def test_law_implementations_agree():
    x = make("clustered", 300)
    expected = novelselect(x, 50)[0].tolist()
    assert novelselect(x, 50, implementation="torch", density=None)[0].tolist() == expected


def test_a_mapped_file_is_read_in_blocks(tmp_path, monkeypatch):
    x = make("random", 500).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    monkeypatch.setattr(Rows, "whole", lambda rows: pytest.fail("copied whole"))
    monkeypatch.setattr("fastsel.selectors.rows.BLOCK_ROWS", 128)
    got = novelselect(mapped, 40, initial=[3, 4])[0].tolist()
    monkeypatch.undo()
    assert got == novelselect(x, 40, initial=[3, 4])[0].tolist()


def test_edges_more_rows_asked_for_than_there_are():
    x = make("copies", 21)
    for rule in ("official", "paper"):
        assert sorted(novelselect(x, 99, rule=rule)[0].tolist()) == list(range(21))
        assert sorted(novelselect(x, 99, rule=rule, initial=[4, 2])[0].tolist()) == sorted(set(range(21)) - {2, 4})
    assert novelselect(x, 0)[0].tolist() == [] and novelselect(x, 3, initial=range(21))[0].tolist() == []
    assert novelselect(x[:1], 1)[0].tolist() == [0]


def test_edges_equal_rows_and_zero_rows_go_by_number():
    assert novelselect(np.ones((7, 3)), 7, first=3)[0].tolist() == [3, 0, 1, 2, 4, 5, 6]
    x = np.zeros((6, 3))
    x[4] = 1
    # A row of zeros is at distance 1 from everything, the others from row 4 and from each other.
    assert novelselect(x, 6, first=4, density=np.ones(6))[0].tolist() == [4, 0, 1, 2, 3, 5]


def test_quality_multiplies():
    x = make("random", 200)
    quality = np.zeros(200)
    quality[[9, 30, 77]] = 1.0
    assert set(novelselect(x, 4, first=0, quality=quality)[0].tolist()) == {0, 9, 30, 77}


def test_columns_that_are_kept_keep_no_others_in_memory(monkeypatch):
    """A column is a copy: a part of what one pass fetched would keep all of that in memory, beyond COLUMN_VALUES."""
    greedy_of = novelselect_module._Greedy
    kept = []

    def best(greedy):
        kept.append([column.untyped_storage().nbytes() for column in greedy.columns.values()])
        return greedy_best(greedy)

    greedy_best = greedy_of.best
    monkeypatch.setattr(greedy_of, "best", best)
    monkeypatch.setattr(novelselect_module, "COLUMN_VALUES", 300 * 10)
    x = make("random", 300)
    expected = novelselect(x, 60)[0].tolist()
    assert max(map(sum, kept)) <= 4 * 300 * 10
    monkeypatch.undo()
    assert novelselect(x, 60)[0].tolist() == expected


def test_density_of_distinct_rows_among_themselves_is_that_of_two_matrices():
    """1,500 rows are searched among themselves in one call, as another matrix in blocks."""
    x = make("random", 1500, 24).astype(np.float32)
    among = mean_squared_distances(rows := Rows(x), rows, [10])[10]
    assert among.tolist() == mean_squared_distances(Rows(x), Rows(x.copy()), [10])[10].tolist()


def test_it_says_how_little_it_scored(caplog):
    with caplog.at_level(logging.INFO, "fastsel"):
        novelselect(make("random", 2000, 48), 100)
    (record,) = [r for r in caplog.records if r.msg.startswith("novelselect")]
    k, n, n_scored, share, n_passes = record.args
    assert (k, n) == (100, 2000) and share == pytest.approx(100 * n_scored / (n * k))
    assert share < 10 and n_passes < 100


# ------------------------------------------------------------------------------------ density


def test_density_worked_example():
    """Points 0, 1, 3 on a line and a second 0: distinct squares from 0 are 1 and 9, from 1 are 1 and 4."""
    x = np.array([[0.0], [1.0], [3.0], [0.0]])
    means = mean_squared_distances(Rows(x), Rows(x), [1, 2, 5])
    assert means[1].tolist() == [1, 1, 4, 1]
    assert means[2].tolist() == [5, 2.5, 6.5, 5]
    assert means[5].tolist() == means[2].tolist()  # there are no more than two neighbours
    assert densities(means[1], 0.5) == pytest.approx([1, 1, 0.5, 1])
    # A query that is not in the reference loses its nearest neighbour too, or not.
    query = Rows(np.array([[2.0]]))
    assert mean_squared_distances(query, Rows(x), [1])[1].tolist() == [1]
    assert mean_squared_distances(Rows(np.array([[5.0]])), Rows(x), [1])[1].tolist() == [16]
    assert mean_squared_distances(Rows(np.array([[5.0]])), Rows(x), [1], drop_first=False)[1].tolist() == [4]
    assert mean_squared_distances(Rows(x), Rows(x), [1], drop_first=False)[1].tolist() == [1, 1, 4, 1]


def test_equal_rows_are_found_by_content():
    x = np.random.default_rng(0).integers(0, 2, (300, 6)).astype(np.float32)
    x[x == 0] = np.where(np.arange((x == 0).sum()) % 2, 0.0, -0.0)
    expected = np.sort(np.unique(x, axis=0, return_index=True)[1])
    assert first_of_equal_rows(Rows(x)).tolist() == expected.tolist()


def test_law_density_of_a_mapped_reference_is_the_same(tmp_path, monkeypatch):
    x = make("copies", 300).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    monkeypatch.setattr("fastsel.selectors.density.REFERENCE_ROWS", 64)
    mapped = Rows(np.load(tmp_path / "x.npy", mmap_mode="r"))
    for number, means in mean_squared_distances(Rows(x), mapped, [3, 10]).items():
        np.testing.assert_allclose(means, mean_squared_distances(Rows(x), Rows(x), [number])[number], rtol=1e-6)


# ------------------------------------------------------------------------------------ the authors' lists


def golden_rows(case):
    return np.random.RandomState(case["data_seed"]).standard_normal((case["n"], case["d"]))


@pytest.mark.parametrize("case", json.loads(GOLDEN.read_text())["cases"], ids=lambda case: case["name"])
def test_the_authors_float32_lists(case):
    x = golden_rows(case)
    options = {name: case[name] for name in ("alpha", "beta", "neighbours", "seed")}
    indices, _ = novelselect(x, case["k"], **options)
    assert indices.tolist() == case["indices"]


@pytest.mark.parametrize("case", json.loads(GOLDEN.read_text())["half"], ids=lambda case: case["name"])
def test_the_authors_float16_lists_overlap(case):
    """Their half precision decides near-ties by rounding: the lists part early, most of the rows are the same."""
    indices, _ = novelselect(golden_rows(case), case["k"], seed=case["seed"])
    assert indices[:5].tolist() == case["indices"][:5]
    assert 0.7 * case["k"] <= len(set(indices.tolist()) & set(case["indices"])) < case["k"]


# ------------------------------------------------------------------------------------ refusals


def test_refuses():
    x = make("random", 20)
    bad = x.copy()
    bad[7, 2] = np.nan
    for call, message in [
        (lambda: novelselect(bad, 3), "x: row 7 holds NaN or infinity"),
        (lambda: novelselect(x, 3, reference=bad), "reference: row 7 holds NaN or infinity"),
        (lambda: novelselect(x, 3, reference=x[:, :3]), "reference has 3 features a row, x has 12"),
        (lambda: novelselect(x, -1), "k=-1"),
        (lambda: novelselect(x, 3, rule="authors"), "rule must be one of official, paper, got 'authors'"),
        (lambda: novelselect(x, 3, alpha=-1), "alpha must be a number of at least 0"),
        (lambda: novelselect(x, 3, beta=np.nan), "beta must be a number of at least 0"),
        (lambda: novelselect(x, 3, neighbours=0), "neighbours must be a whole number of at least 1"),
        (lambda: novelselect(x, 3, first=20), "there is no row 20"),
        (lambda: novelselect(x, 3, first=2, initial=[3]), "give one of them"),
        (lambda: novelselect(x, 3, quality=-np.ones(20)), "quality: row 0 has -1.0"),
        (lambda: novelselect(x, 3, density=np.ones(3)), r"density must be \[20\]"),
    ]:
        with pytest.raises(UsageError, match=message):
            call()
