"""spherical_kmeans against Lloyd's iterations written out in float64."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsel.errors import UsageError
from fastsel.selectors.rows import Rows
from fastsel.selectors.spherical_kmeans import spherical_kmeans


def clouds(seed, n, d, k, spread=0.5):
    generator = np.random.default_rng(seed)
    return generator.standard_normal((k, d))[generator.integers(0, k, n)] + spread * generator.standard_normal((n, d))


def naive(x, first, iterations, official):
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    centroids = unit[first].astype(np.float32).astype(np.float64)
    labels = None
    for _ in range(iterations):
        similarity = unit @ centroids.T
        labels = similarity.argmax(1)
        for j in range(len(centroids)):
            total = unit[labels == j].sum(0)
            centroids[j] = total / max(np.linalg.norm(total), 1e-300)
        empty = [j for j in range(len(centroids)) if not (labels == j).any()]
        if not official and empty:
            centroids[empty] = unit[np.argsort(similarity.max(1), kind="stable")[: len(empty)]]
    return labels if official else (unit @ centroids.T).argmax(1), centroids


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("iterations", [1, 2, 20])
def test_matches_lloyds_iterations(iterations, official, monkeypatch):
    monkeypatch.setattr("fastsel.selectors.spherical_kmeans.BLOCK_ROWS", 64)
    x = clouds(0, 300, 12, 8, 0.8)
    labels, centroids = spherical_kmeans(Rows(x, unit=True), 10, iterations=iterations, official=official)
    expected, middles = naive(x, random.Random(42).sample(range(300), 10), iterations, official)
    assert labels.tolist() == expected.tolist() and labels.dtype == np.int64
    np.testing.assert_allclose(centroids, middles, atol=1e-6)
    assert centroids.dtype == np.float32


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 40), k=st.integers(1, 8), seed=st.integers(0, 999), official=st.booleans())
def test_law_equals_lloyds_iterations(n, k, seed, official):
    x = clouds(seed, n, 5, 3)
    first = np.random.default_rng(seed).permutation(n)[: min(k, n)]
    labels, _ = spherical_kmeans(Rows(x, unit=True), k, iterations=4, initial=first, official=official)
    assert labels.tolist() == naive(x, first, 4, official)[0].tolist()


def test_an_empty_cluster_begins_anew_where_rows_fit_worst():
    """Two copies start two clusters: the second is empty, since ties go to the first."""
    x = np.array([[1.0, 0], [1, 0], [1, 0.1], [-0.2, 1]])
    labels, centroids = spherical_kmeans(Rows(x, unit=True), 2, initial=[0, 1])
    assert labels.tolist() == [0, 0, 0, 1]
    official, zeros = spherical_kmeans(Rows(x, unit=True), 2, initial=[0, 1], official=True)
    assert zeros[1].tolist() == [0, 0] and official.tolist() == [0, 0, 0, 0]


def test_law_threads_and_mapped_files(tmp_path):
    x = clouds(1, 500, 16, 6, 1.0).astype(np.float32)
    expected = spherical_kmeans(Rows(x, unit=True), 9)
    np.save(tmp_path / "x.npy", x)
    before = torch.get_num_threads()
    try:
        for threads, given_x in ((1, x), (3, torch.from_numpy(x)), (1, np.load(tmp_path / "x.npy", mmap_mode="r"))):
            torch.set_num_threads(threads)
            labels, centroids = spherical_kmeans(Rows(given_x, unit=True), 9)
            assert labels.tolist() == expected[0].tolist() and centroids.tolist() == expected[1].tolist()
    finally:
        torch.set_num_threads(before)


def test_edges_more_clusters_than_rows_and_copies():
    labels, centroids = spherical_kmeans(Rows(np.eye(3), unit=True), 99)
    assert sorted(labels.tolist()) == [0, 1, 2] and centroids.shape == (3, 3)
    assert spherical_kmeans(Rows(np.ones((5, 2)), unit=True), 1)[0].tolist() == [0] * 5
    assert spherical_kmeans(Rows(np.zeros((2, 3)), unit=True), 1)[0].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (np.eye(3), {"clusters": 0}, "clusters must be a whole number of at least 1, got 0"),
        (np.eye(3), {"clusters": 2, "iterations": 0}, "iterations must be a whole number of at least 1, got 0"),
        (np.eye(3), {"clusters": 2, "initial": [0]}, "initial has 1 rows, for 2 clusters"),
        (np.zeros((0, 3)), {"clusters": 2}, "there are no rows to cluster"),
    ],
)
def test_refuses(x, options, message):
    with pytest.raises(UsageError, match=message):
        spherical_kmeans(Rows(x, unit=True), **options)
