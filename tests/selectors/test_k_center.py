"""k_center against a float64 loop that updates every row after every pick."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsel.errors import UsageError
from fastsel.selectors import k_center

k_center_module = sys.modules["fastsel.selectors.k_center"]  # the package's name is the function


def naive(x, k, *, metric="euclidean", initial=(), first=0):
    """Farthest-first as it is written: rows within 1e-12 of the largest square are equal, the lowest is taken."""
    x = np.asarray(x, np.float64)
    is_zero = np.zeros(len(x), bool)
    if metric == "cosine":
        lengths = np.linalg.norm(x, axis=1)
        is_zero = lengths == 0
        x = x / np.where(is_zero, 1, lengths)[:, None]
    nearest, rows, squares = np.full(len(x), np.inf), [], []

    def add(row):
        square = ((x - x[row]) ** 2).sum(1)
        if metric == "cosine":
            square = np.where(is_zero | is_zero[row], 2.0, square)
        np.minimum(nearest, square, out=nearest)

    for row in initial:
        add(row)
    taken = list(initial)
    for _ in range(min(k, len(x) - len(initial))):
        nearest[taken] = -np.inf
        row = first if not taken else int((nearest >= nearest.max() * (1 - 1e-12)).argmax())
        rows.append(row)
        squares.append(nearest[row])
        taken.append(row)
        add(row)
    squares = np.array(squares)
    return np.array(rows, np.int64), squares / 2 if metric == "cosine" else np.sqrt(squares)


def assert_equal(got, expected):
    assert got[0].dtype == np.int64 and got[1].dtype == np.float64
    np.testing.assert_array_equal(got[0], expected[0])
    np.testing.assert_allclose(got[1], expected[1], rtol=1e-9, atol=1e-15)


def clustered(n, d, seed=0, spread=0.2):
    generator = np.random.default_rng(seed)
    return generator.standard_normal((20, d))[generator.integers(0, 20, n)] + spread * generator.standard_normal((n, d))


KINDS = {
    "random": lambda n: np.random.default_rng(0).standard_normal((n, 24)),
    "clustered": lambda n: clustered(n, 24),
    "far from the origin": lambda n: clustered(n, 24) + 1000.0,
    "lengths of many sizes": lambda n: clustered(n, 24) * np.exp(np.random.default_rng(1).standard_normal((n, 1)) * 3),
    "integers": lambda n: np.random.default_rng(0).integers(-2, 3, (n, 3)).astype(float),
    "copies": lambda n: np.random.default_rng(0).standard_normal((n // 5 + 1, 9))[np.arange(n) % (n // 5 + 1)],
    "one-hot": lambda n: np.eye(n),
}


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("kind", KINDS)
def test_matches_reference(kind, metric):
    x = KINDS[kind](700)
    assert_equal(k_center(x, 250, metric=metric), naive(x, 250, metric=metric))


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("kind", KINDS)
def test_matches_reference_where_all_rows_are_passed_as_on_a_gpu(kind, metric, monkeypatch):
    bounds_of, passes = k_center_module._Bounds, []
    start, refresh_all = bounds_of.__init__, bounds_of.refresh_all

    def on_a_gpu(self, *arguments):
        start(self, *arguments)
        self.is_on_a_gpu = True

    monkeypatch.setattr(bounds_of, "__init__", on_a_gpu)
    monkeypatch.setattr(bounds_of, "refresh_all", lambda self, chosen: (passes.append(1), refresh_all(self, chosen)))
    x = KINDS[kind](300)
    assert_equal(k_center(x, 60, metric=metric, first=5), naive(x, 60, metric=metric, first=5))
    assert_equal(k_center(x, 40, metric=metric, initial=[7, 200]), naive(x, 40, metric=metric, initial=[7, 200]))
    assert passes


@pytest.mark.parametrize("implementation", ["native", "torch", "reference"])
def test_matches_reference_with_every_kernel(implementation):
    x = clustered(600, 33).astype(np.float32)
    assert_equal(k_center(x, 200, implementation=implementation), naive(x, 200))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["random", "clustered", "far from the origin"])
def test_matches_reference_at_the_size_of_the_benchmark(kind):
    x = KINDS[kind](5000)
    assert_equal(k_center(x, 500), naive(x, 500))


def test_near_copies_are_told_apart_in_float64():
    """Ten clouds of rows 1e-7 apart: float32 sees ten rows, and the expansion of the square has no digit left."""
    generator = np.random.default_rng(3)
    x = np.repeat(generator.standard_normal((10, 16)), 30, axis=0)
    x += 1e-7 * generator.standard_normal(x.shape)
    assert_equal(k_center(x, 200), naive(x, 200))
    assert_equal(k_center(x, 200, metric="cosine"), naive(x, 200, metric="cosine"))


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 60), d=st.integers(1, 6), k=st.integers(0, 70), levels=st.integers(1, 4), seed=st.integers(0, 999),
    metric=st.sampled_from(["euclidean", "cosine"]), batch=st.sampled_from(["auto", 1, 2, 5]),
)  # fmt: skip
def test_law_any_shape_with_many_ties(n, d, k, levels, seed, metric, batch):
    x = np.random.default_rng(seed).integers(-levels, levels + 1, (n, d)).astype(np.float64)
    assert_equal(k_center(x, k, metric=metric, batch=batch), naive(x, k, metric=metric))


@pytest.mark.parametrize("batch", [1, 3, 64, 5000])
def test_law_the_batch_changes_nothing(batch):
    x = clustered(500, 12)
    a, b = k_center(x, 300), k_center(x, 300, batch=batch)
    np.testing.assert_array_equal(a[0], b[0])
    np.testing.assert_allclose(a[1], b[1], rtol=1e-12)


def test_law_the_first_are_the_selection_for_fewer_and_gains_fall():
    x = clustered(500, 12)
    rows, gains = k_center(x, 200)
    assert gains[0] == np.inf and (np.diff(gains) <= 0).all() and len(set(rows)) == 200
    for j in (0, 1, 17, 150):
        np.testing.assert_array_equal(k_center(x, j)[0], rows[:j])


def test_law_initial_continues():
    x = clustered(500, 12)
    rows, gains = k_center(x, 200)
    more = k_center(x, 150, initial=rows[:50])
    np.testing.assert_array_equal(more[0], rows[50:])
    np.testing.assert_allclose(more[1], gains[50:], rtol=1e-12)
    assert_equal(k_center(x, 80, initial=[400, 3]), naive(x, 80, initial=[400, 3]))


def test_law_radius_is_at_most_twice_the_best():
    """Brute force over all sets of three of nine points."""
    from itertools import combinations

    for seed in range(20):
        x = np.random.default_rng(seed).standard_normal((9, 2))
        distance = np.linalg.norm(x[:, None] - x[None], axis=2)
        best = min(distance[:, list(centres)].min(1).max() for centres in combinations(range(9), 3))
        assert distance[:, k_center(x, 3)[0]].min(1).max() <= 2 * best + 1e-12


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_law_threads_change_no_bit(threads):
    x = clustered(3000, 40).astype(np.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = k_center(x, 200)
        torch.set_num_threads(threads)
        got = k_center(x, 200)
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(got[0], expected[0])
    np.testing.assert_allclose(got[1], expected[1], rtol=1e-12)


@pytest.mark.parametrize(
    "given_as",
    [
        lambda x: x.astype(np.float32),
        torch.from_numpy,
        lambda x: torch.from_numpy(x).bfloat16(),
        lambda x: x[::-1][::-1],
    ],
    ids=["float32", "torch", "bfloat16", "view"],
)
def test_reads_what_arrays_come_as(given_as):
    x = given_as(clustered(300, 10))
    values = x.double().numpy() if isinstance(x, torch.Tensor) else x
    assert_equal(k_center(x, 100), naive(values, 100))


def test_a_mapped_file_gives_the_same_and_is_never_held(tmp_path, monkeypatch):
    x = clustered(900, 20).astype(np.float32) + 5
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    monkeypatch.setattr("fastsel.selectors.rows.Rows.whole", lambda self: pytest.fail("copied as a whole"))
    monkeypatch.setitem(k_center.__globals__, "BLOCK_ROWS", 128)
    for metric in ("euclidean", "cosine"):
        assert_equal(k_center(mapped, 300, metric=metric), naive(x, 300, metric=metric))


def test_edges_hand_worked():
    """On a line at 0, 1, 2, 10: from 0 the farthest is 10 (10), then 2 (2 from 0), then 1 (1)."""
    rows, gains = k_center(np.array([[0.0], [1.0], [2.0], [10.0]]), 4)
    assert rows.tolist() == [0, 3, 2, 1]
    assert gains.tolist() == [np.inf, 10.0, 2.0, 1.0]
    rows, gains = k_center(np.array([[0.0], [1.0], [2.0], [10.0]]), 9, first=2)
    assert rows.tolist() == [2, 3, 0, 1] and gains.tolist() == [np.inf, 8.0, 2.0, 1.0]


def test_edges_rows_of_zeros_are_orthogonal_to_everything():
    """Cosine distances from (1, 0): zeros 1, (0, 1) 1, (-1, 0) 2, (2, 0) 0."""
    x = np.array([[1.0, 0], [0, 0], [0, 1], [-1, 0], [2, 0]])
    rows, gains = k_center(x, 5, metric="cosine")
    assert rows.tolist() == [0, 3, 1, 2, 4]
    assert gains.tolist() == [np.inf, 2.0, 1.0, 1.0, 0.0]


def test_edges_copies_come_last_in_order():
    x = np.array([[0.0, 0], [3, 0], [0, 0], [3, 0], [0, 4]])
    rows, gains = k_center(x, 5)
    assert rows.tolist() == [0, 4, 1, 2, 3] and gains.tolist() == [np.inf, 4.0, 3.0, 0.0, 0.0]
    assert k_center(np.zeros((6, 2)), 6)[0].tolist() == list(range(6))


def test_edges_nothing_to_choose():
    assert [len(part) for part in k_center(np.zeros((0, 3)), 5)] == [0, 0]
    assert [len(part) for part in k_center(np.ones((4, 3)), 0)] == [0, 0]
    assert [len(part) for part in k_center(np.ones((4, 3)), 3, initial=[0, 1, 2, 3])] == [0, 0]


def test_edges_a_random_start_is_drawn_with_the_seed():
    x = clustered(300, 4)
    starts = [k_center(x, 1, first="random", seed=seed)[0][0] for seed in range(8)]
    assert starts == [k_center(x, 1, first="random", seed=seed)[0][0] for seed in range(8)] and len(set(starts)) > 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "manhattan"}, "metric must be euclidean or cosine, got 'manhattan'"),
        ({"k": -1}, "k=-1 must not be negative"),
        ({"k": 1.5}, "k must be a whole number"),
        ({"batch": 0}, "batch must be auto or a positive number"),
        ({"first": 20}, "there is no row 20"),
        ({"first": "last"}, "first must be a row number or random"),
        ({"initial": [1, 1]}, "row 1 stands there twice"),
        ({"implementation": "cuda"}, "is not known here"),
    ],
)
def test_refuses_options_that_make_no_sense(options, message):
    with pytest.raises((UsageError, ValueError), match=message):
        k_center(np.random.default_rng(0).standard_normal((20, 3)), **{"k": 5, **options})


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_refuses_rows_that_are_not_finite_by_number(value):
    x = np.ones((50, 3))
    x[37, 1] = value
    with pytest.raises(UsageError, match="row 37 holds NaN or infinity"):
        k_center(x, 5)
