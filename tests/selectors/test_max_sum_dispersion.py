"""max_sum_dispersion against a float64 loop that adds every distance to every row after every pick."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsel.errors import UsageError
from fastsel.selectors import max_sum_dispersion


def naive(x, k, *, metric="cosine", initial=(), first=0):
    x = np.asarray(x, np.float64)
    lengths = np.linalg.norm(x, axis=1)
    unit = x / np.where(lengths == 0, 1, lengths)[:, None]
    sums, rows, gains, taken = np.zeros(len(x)), [], [], []
    for row in [*initial, *([None] * min(k, len(x) - len(initial)))]:
        is_pick = row is None
        if is_pick:
            sums[taken] = -np.inf
            tie = 1e-12 * max(sums.max(), len(taken) if metric == "cosine" else 0)
            row = first if not taken else int((sums >= sums.max() - tie).argmax())
            rows.append(row)
            gains.append(sums[row])
        taken.append(row)
        sums += 1 - unit @ unit[row] if metric == "cosine" else np.linalg.norm(x - x[row], axis=1)
    return np.array(rows, np.int64), np.array(gains, np.float64)


def assert_equal(got, expected, atol=1e-10):
    assert got[0].dtype == np.int64 and got[1].dtype == np.float64
    np.testing.assert_array_equal(got[0], expected[0])
    np.testing.assert_allclose(got[1], expected[1], rtol=1e-9, atol=atol)


def clouds(n=700, d=16, spread=0.3, seed=0):
    generator = np.random.default_rng(seed)
    return generator.standard_normal((15, d))[generator.integers(0, 15, n)] + spread * generator.standard_normal((n, d))


KINDS = {
    "random": lambda: np.random.default_rng(0).standard_normal((700, 16)),
    "clouds": clouds,
    "one side": lambda: clouds() + 3,
    "lengths of many sizes": lambda: clouds() * np.exp(np.random.default_rng(1).standard_normal((700, 1))),
    "one-hot": lambda: np.eye(300),
}


@pytest.fixture
def few_candidates(monkeypatch):
    """Many rounds, in which rows outside the candidates could win."""
    monkeypatch.setitem(max_sum_dispersion.__globals__, "CANDIDATES", 16)
    monkeypatch.setitem(max_sum_dispersion.__globals__, "BLOCK_ROWS", 100)


@pytest.mark.usefixtures("few_candidates")
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("kind", KINDS)
def test_matches_reference(kind, metric):
    x = KINDS[kind]()
    assert_equal(max_sum_dispersion(x, 150, metric=metric), naive(x, 150, metric=metric))


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_matches_reference_with_candidates_as_shipped(metric):
    x = clouds(3000, 24).astype(np.float32)
    assert_equal(max_sum_dispersion(x, 400, metric=metric), naive(x, 400, metric=metric))


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 50), d=st.integers(1, 5), k=st.integers(0, 60), levels=st.integers(1, 3), seed=st.integers(0, 999),
    metric=st.sampled_from(["cosine", "euclidean"]),
)  # fmt: skip
def test_law_any_shape_with_many_ties(n, d, k, levels, seed, metric):
    x = np.random.default_rng(seed).integers(-levels, levels + 1, (n, d)).astype(np.float64)
    assert_equal(max_sum_dispersion(x, k, metric=metric), naive(x, k, metric=metric))


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_law_the_first_are_the_selection_for_fewer_and_initial_continues(metric):
    x = clouds()
    rows, gains = max_sum_dispersion(x, 120, metric=metric)
    for j in (0, 1, 50):
        assert_equal(max_sum_dispersion(x, j, metric=metric), (rows[:j], gains[:j]))
    assert_equal(max_sum_dispersion(x, 70, metric=metric, initial=rows[:50]), (rows[50:], gains[50:]))
    assert_equal(
        max_sum_dispersion(x, 60, metric=metric, initial=[400, 3]), naive(x, 60, metric=metric, initial=[400, 3])
    )


def test_law_the_sum_is_at_least_half_of_the_best():
    """Brute force over all sets of three of nine points."""
    from itertools import combinations

    for seed in range(20):
        x = np.random.default_rng(seed).standard_normal((9, 2))
        distance = np.linalg.norm(x[:, None] - x[None], axis=2)
        best = max(distance[np.ix_(s, s)].sum() for s in map(list, combinations(range(9), 3)))
        rows = max_sum_dispersion(x, 3, metric="euclidean")[0]
        assert distance[np.ix_(rows, rows)].sum() >= best / 2


def test_law_gains_add_up_to_the_sum_of_all_distances():
    x = clouds()
    rows, gains = max_sum_dispersion(x, 90)
    unit = x[rows] / np.linalg.norm(x[rows], axis=1)[:, None]
    assert gains.sum() == pytest.approx(np.triu(1 - unit @ unit.T, 1).sum(), rel=1e-12)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_law_threads_change_no_row(metric):
    x, before = clouds(3000, 40).astype(np.float32), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = max_sum_dispersion(x, 100, metric=metric)
        torch.set_num_threads(3)
        assert_equal(max_sum_dispersion(x, 100, metric=metric), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_a_mapped_file_and_other_arrays_give_the_same(metric, tmp_path, monkeypatch):
    x = clouds().astype(np.float32)
    expected = max_sum_dispersion(x, 100, metric=metric)
    assert_equal(max_sum_dispersion(torch.from_numpy(x), 100, metric=metric), expected)
    np.save(tmp_path / "x.npy", x)
    monkeypatch.setattr("fastsel.selectors.rows.Rows.whole", lambda self: pytest.fail("copied as a whole"))
    assert_equal(max_sum_dispersion(np.load(tmp_path / "x.npy", mmap_mode="r"), 100, metric=metric), expected)


def test_edges_hand_worked():
    """On a line at 0, 1, 2, 10: from 0 comes 10 (10), then 1 (1 + 9) and 2 (2 + 8) tie at 10: the lower row."""
    rows, gains = max_sum_dispersion(np.array([[0.0], [1.0], [2.0], [10.0]]), 4, metric="euclidean")
    assert rows.tolist() == [0, 3, 1, 2] and gains.tolist() == [0.0, 10.0, 10.0, 11.0]


def test_edges_rows_of_zeros_are_orthogonal_to_everything():
    rows, gains = max_sum_dispersion(np.array([[1.0, 0], [0, 0], [-2, 0], [5, 0]]), 4)
    assert rows.tolist() == [0, 2, 1, 3] and gains.tolist() == [0.0, 2.0, 2.0, 3.0]


def test_edges_nothing_to_choose():
    assert [len(part) for part in max_sum_dispersion(np.zeros((0, 3)), 5)] == [0, 0]
    assert [len(part) for part in max_sum_dispersion(np.ones((4, 3)), 0)] == [0, 0]
    assert max_sum_dispersion(np.ones((5, 2)), 9)[0].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "manhattan"}, "metric must be euclidean or cosine"),
        ({"k": -1}, "k=-1 must not be negative"),
        ({"first": "last"}, "first must be a row number or random"),
        ({"initial": [1, 1]}, "row 1 stands there twice"),
    ],
)
def test_refuses_options_that_make_no_sense(options, message):
    with pytest.raises(UsageError, match=message):
        max_sum_dispersion(np.ones((9, 2)), **{"k": 5, **options})


def test_refuses_rows_that_are_not_finite_by_number():
    x = np.ones((50, 3))
    x[37, 1] = np.inf
    with pytest.raises(UsageError, match="row 37 holds NaN or infinity"):
        max_sum_dispersion(x, 5)
