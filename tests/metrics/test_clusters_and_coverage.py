import math

import numpy as np
import pytest

from fastsel import metrics
from fastsel.errors import UsageError


def matrix(n=50, d=7, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32) + 0.3


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_partition_entropy_is_that_of_novelsums_code():
    """Their entropy.py: faiss.Kmeans(d, c, niter=20, seed=42) on the reference, labels by index.search, log2."""
    faiss = pytest.importorskip("faiss")
    reference, x = matrix(900, 6, 1), matrix(200, 6, 2)
    theirs = faiss.Kmeans(6, 10, niter=20, seed=42)
    theirs.train(reference)
    counts = np.bincount(theirs.index.search(x, 1)[1][:, 0])
    shares = counts[counts > 0] / 200
    expected = -(shares * np.log2(shares)).sum()
    assert metrics.partition_entropy(x, reference, clusters=10) == pytest.approx(expected, rel=1e-12)
    natural = metrics.partition_entropy(x, reference, clusters=10, base=math.e)
    assert natural == pytest.approx(expected * math.log(2), rel=1e-12)
    normalised = metrics.partition_entropy(x, reference, clusters=10, normalised=True)
    assert normalised == pytest.approx(natural / math.log(10), rel=1e-12)


def test_partition_entropy_hand_worked():
    """Two of four rows near the first centroid, one near each other: 1/2, 1/4, 1/4: 1.5 bits."""
    x = np.array([[0.1], [-0.1], [5], [9]])
    assert metrics.partition_entropy(x, centroids=[[0.0], [5], [10]]) == pytest.approx(1.5)
    assert metrics.partition_entropy(x, centroids=[[0.0], [50]]) == 0
    assert metrics.partition_entropy(x, centroids=[[0.0]], normalised=True) == 0
    assert math.isnan(metrics.partition_entropy(x[:0], centroids=[[0.0]]))


def test_cluster_inertia_is_that_of_faiss():
    faiss = pytest.importorskip("faiss")
    x = matrix(300, 6)
    theirs = faiss.Kmeans(6, 12, niter=20, seed=42)
    theirs.train(x)
    centroids = theirs.centroids.astype(np.float64)
    squares = ((x[:, None].astype(np.float64) - centroids[None]) ** 2).sum(2).min(1)
    assert metrics.cluster_inertia(x, clusters=12) == pytest.approx(squares.sum(), rel=1e-6)
    assert metrics.cluster_inertia(x, centroids=centroids) == pytest.approx(squares.sum(), rel=1e-6)
    cosine = (1 - unit(x) @ unit(centroids).T).min(1).sum()
    assert metrics.cluster_inertia(x, centroids=centroids, metric="cosine") == pytest.approx(cosine, rel=1e-5)
    assert metrics.cluster_inertia(x, clusters=999) == pytest.approx(0, abs=1e-3)
    assert metrics.cluster_inertia(x[:0]) == 0


def test_facility_location_forms():
    reference, x = matrix(120, 5, 3), matrix(9, 5, 4)
    similarity = unit(reference.astype(np.float64)) @ unit(x.astype(np.float64)).T
    best = similarity.max(1)
    assert metrics.facility_location(x, reference) == pytest.approx(best.sum(), rel=1e-6)
    assert metrics.facility_location(x, reference, average=True) == pytest.approx(best.mean(), rel=1e-6)
    assert metrics.facility_location(x, reference, form="cost") == pytest.approx((1 - best).sum(), rel=1e-5)
    assert metrics.facility_location(x, reference, form="reciprocal") == pytest.approx((1 / (1 - best)).sum(), rel=1e-4)
    nearest = np.sqrt(((reference[:, None].astype(np.float64) - x[None]) ** 2).sum(2)).min(1)
    assert metrics.facility_location(x, reference, form="cost", metric="euclidean") == pytest.approx(nearest.sum())
    assert metrics.facility_location(x, reference, metric="euclidean") == pytest.approx(-nearest.sum())


def test_facility_location_edges():
    reference = matrix(30, 5)
    assert metrics.facility_location(reference, reference, form="cost") == pytest.approx(0, abs=1e-5)
    assert metrics.facility_location(reference, reference, form="reciprocal") == 0
    assert metrics.facility_location(reference, reference) == pytest.approx(30, rel=1e-6)
    assert math.isnan(metrics.facility_location(reference[:0], reference))
    zeros = np.zeros((2, 5))
    assert metrics.facility_location(zeros, reference) == 0


def test_more_rows_never_cover_less(tmp_path, monkeypatch):
    np.save(tmp_path / "pool.npy", matrix(200, 5))
    reference = np.load(tmp_path / "pool.npy", mmap_mode="r")
    whole = metrics.facility_location(np.array(reference[:60]), np.array(reference))
    monkeypatch.setattr("fastsel.selectors.neighbours.MAPPED_POINTS", 64)
    values = [metrics.facility_location(reference[:n], reference) for n in (1, 5, 20, 60)]
    assert values == sorted(values) and values[-1] == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: metrics.partition_entropy(x), "partition_entropy needs a reference"),
        (lambda x: metrics.partition_entropy(x, x, base=1), "base must be above 1"),
        (lambda x: metrics.partition_entropy(x, centroids=[[0.0]]), r"centroids must be \[clusters, 3\]"),
        (lambda x: metrics.cluster_inertia(x, metric="l1"), "metric must be one of sqeuclidean, cosine"),
        (lambda x: metrics.facility_location(x, x, form="max"), "form must be one of maxsim, cost, reciprocal"),
        (lambda x: metrics.facility_location(x, x[:, :2]), "reference has 2 columns, the rows have 3"),
        (lambda x: metrics.facility_location(x, x * np.nan), "reference: row 0 holds NaN"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(UsageError, match=message):
        call(matrix(5, 3))
