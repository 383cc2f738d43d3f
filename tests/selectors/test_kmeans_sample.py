import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsel.errors import MissingExtraError, UsageError
from fastsel.selectors import kmeans_sample
from fastsel.selectors.clustering import assign, kmeans
from fastsel.selectors.rows import Rows

pytest.importorskip("faiss")


def groups(sizes=(40, 25, 10, 5), d=6, spread=0.05, seed=0):
    """Groups far apart, in mixed order; the rows and each row's group."""
    generator = np.random.default_rng(seed)
    labels = generator.permutation(np.repeat(np.arange(len(sizes)), sizes))
    centres = 10 * np.eye(len(sizes), d)
    return centres[labels] + spread * generator.standard_normal((len(labels), d)), labels


def taken(labels, indices, clusters=4):
    return np.bincount(labels[indices], minlength=clusters).tolist()


def test_hand_worked():
    """Two clusters on a line, {0, 1, 2} and {10, 11, 12, 15}, centroids 1 and 12: by size/(2 taken + 1) the order of
    clusters is B (4), A (3), B (4/3), A (1), B (4/5), A (3/5), B (4/7); nearest first: 12, 1, 11, 0, 10, 2, 15."""
    x = np.array([[0.0], [1], [2], [10], [11], [12], [15]])
    indices, gains = kmeans_sample(x, 7, clusters=2)
    assert x[indices, 0].tolist() == [12, 1, 11, 0, 10, 2, 15]
    assert gains.tolist() == [0, 0, -1, -1, -4, -1, -9]
    assert indices.dtype == np.int64 and gains.dtype == np.float64


def test_shares_of_each_allocation():
    x, labels = groups()
    assert taken(labels, kmeans_sample(x, 16, clusters=4)[0]) == [8, 5, 2, 1]
    assert taken(labels, kmeans_sample(x, 16, clusters=4, allocation="largest_remainder")[0]) == [8, 5, 2, 1]
    # 7 of 80: shares 3.5, 2.1875, 0.875, 0.4375: whole parts 3, 2, 0, 0, then the rests .875 and .5.
    assert taken(labels, kmeans_sample(x, 7, clusters=4, allocation="largest_remainder")[0]) == [4, 2, 1, 0]
    assert taken(labels, kmeans_sample(x, 16, clusters=4, allocation="equal")[0]) == [4, 4, 4, 4]
    # The two small ones are used up; which of the large ones is first by number is up to k-means.
    assert sorted(taken(labels, kmeans_sample(x, 40, clusters=4, allocation="equal")[0])) == [5, 10, 12, 13]


@pytest.mark.parametrize("rule", ["nearest", "random"])
@pytest.mark.parametrize("allocation", ["proportional", "equal"])
def test_law_the_first_of_k_are_the_selection_for_fewer_and_initial_goes_on(rule, allocation):
    x, _ = groups(spread=3.0)
    options = {"clusters": 7, "rule": rule, "allocation": allocation}
    whole, gains = kmeans_sample(x, 80, **options)
    assert sorted(whole) == list(range(80))
    for k in (0, 1, 13, 50):
        assert np.array_equal(kmeans_sample(x, k, **options)[0], whole[:k])
        rest, rest_gains = kmeans_sample(x, 80, initial=whole[:k], **options)
        assert np.array_equal(rest, whole[k:]) and np.array_equal(rest_gains, gains[k:])


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), k=st.integers(0, 70), clusters=st.integers(1, 12), allocation=st.sampled_from(
    ["proportional", "largest_remainder", "equal"]))  # fmt: skip
def test_law_shares_follow_the_sizes(seed, k, clusters, allocation):
    x = np.random.default_rng(seed).standard_normal((60, 3))
    indices, _ = kmeans_sample(x, k, clusters=clusters, allocation=allocation)
    assert len(set(indices.tolist())) == len(indices) == min(k, 60)
    labels, _ = assign(Rows(x), kmeans(Rows(x), clusters))
    counts = np.bincount(labels[indices], minlength=clusters)
    shares = np.bincount(labels, minlength=clusters) * min(k, 60) / 60
    if allocation == "largest_remainder":
        assert (np.abs(counts - shares) < 1).all()
    if allocation == "proportional":
        assert (np.abs(counts - shares) < 2).all()


def test_nearest_rows_of_a_cluster_come_first():
    x, _ = groups(spread=1.0)
    rows = Rows(x)
    labels, squares = assign(rows, kmeans(rows, 4))
    indices, _ = kmeans_sample(x, 20, clusters=4)
    for cluster in range(4):
        members = indices[labels[indices] == cluster]
        best = np.flatnonzero(labels == cluster)[np.argsort(squares[labels == cluster], kind="stable")]
        assert np.array_equal(members, best[: len(members)])


@pytest.mark.parametrize("n", [300, 2000])
def test_centroids_are_those_of_faiss(n):
    """2,000 rows are more than 256 for each of 5 centroids: the same rows are sampled."""
    import faiss

    x = np.random.default_rng(1).standard_normal((n, 8)).astype(np.float32)
    theirs = faiss.Kmeans(8, 5, niter=20, seed=42)
    theirs.train(x)
    assert np.array_equal(kmeans(Rows(x), 5), theirs.centroids)
    labels, squares = assign(Rows(x), kmeans(Rows(x), 5))
    distances, expected = theirs.index.search(x, 1)
    assert np.array_equal(labels, expected[:, 0])
    np.testing.assert_allclose(squares, distances[:, 0], rtol=1e-5)


def test_spherical_compares_directions_only():
    x, _ = groups(spread=1.0)
    lengths = np.random.default_rng(0).uniform(0.1, 50, (len(x), 1))
    a, gains = kmeans_sample(x, 20, clusters=4, spherical=True)
    b, _ = kmeans_sample(x * lengths, 20, clusters=4, spherical=True)
    assert np.array_equal(a, b)
    assert (gains <= 1e-6).all() and (gains >= -2).all()
    centroids = kmeans(Rows(x, unit=True), 4, spherical=True)
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize("convert", [np.float32, np.float16, torch.from_numpy, lambda x: x.tolist()])
def test_edges_what_arrays_come_as(convert):
    x, labels = groups()
    given = convert(x) if callable(convert) else x.astype(convert)
    indices, gains = kmeans_sample(given, 12, clusters=4)
    assert indices.dtype == np.int64 and gains.dtype == np.float64
    assert taken(labels, indices) == taken(labels, kmeans_sample(x, 12, clusters=4)[0])


def test_edges_few_rows_duplicates_and_zeros():
    assert kmeans_sample(np.zeros((0, 3)), 4)[0].tolist() == []
    assert kmeans_sample(np.ones((1, 3)), 4)[0].tolist() == [0]
    assert sorted(kmeans_sample(np.ones((5, 3)), 9, clusters=3)[0]) == [0, 1, 2, 3, 4]
    assert sorted(kmeans_sample(np.zeros((5, 3)), 9, clusters=3, spherical=True)[0]) == [0, 1, 2, 3, 4]
    x, _ = groups()
    assert sorted(kmeans_sample(x, 999, clusters=200)[0]) == list(range(80))


def test_edges_a_mapped_file_is_read_in_blocks(tmp_path, monkeypatch):
    x, _ = groups(spread=2.0)
    np.save(tmp_path / "x.npy", x.astype(np.float32))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    monkeypatch.setattr("fastsel.selectors.neighbours.MAPPED_POINTS", 16)
    found, expected = kmeans_sample(mapped, 30, clusters=5), kmeans_sample(x.astype(np.float32), 30, clusters=5)
    assert np.array_equal(found[0], expected[0]) and np.array_equal(found[1], expected[1])


@pytest.mark.parametrize("threads", [1, 2])
def test_law_threads_change_nothing(threads):
    x = np.random.default_rng(0).standard_normal((3000, 16))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        got = kmeans_sample(x, 200, clusters=20)
        torch.set_num_threads(1)
        assert all(np.array_equal(a, b) for a, b in zip(got, kmeans_sample(x, 200, clusters=20), strict=True))
    finally:
        torch.set_num_threads(before)


def test_the_seed_draws():
    x, _ = groups(spread=3.0)
    a, b, c = (kmeans_sample(x, 20, rule="random", clusters=1, seed=seed)[0].tolist() for seed in (1, 1, 2))
    assert a == b != c


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "best"}, "rule must be one of nearest, random"),
        ({"allocation": "all"}, "allocation must be one of proportional"),
        ({"clusters": 0}, "clusters must be a whole number of at least 1"),
        ({"iterations": 0}, "iterations must be"),
        ({"k": -1}, "must not be negative"),
        ({"initial": [99]}, "initial: there is no row 99"),
        ({"x": np.full((3, 2), np.nan)}, "x: row 0 holds NaN"),
    ],
)
def test_refuses(options, message):
    x, _ = groups()
    with pytest.raises(UsageError, match=message):
        kmeans_sample(**({"x": x, "k": 3} | options))


def test_refuses_without_faiss_and_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(
        MissingExtraError, match=r"k-means needs the package faiss-cpu: pip install 'fastsel\[diversity"
    ):
        kmeans_sample(np.ones((5, 2)), 2)
