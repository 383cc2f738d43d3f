"""k-means sampling over an embedded pool."""

import numpy as np
import pytest

import fastsel
from fastsel.io import open_pool

pytest.importorskip("faiss")


def kmeans(matrix, sources=None, **options):
    rows = [{"instruction": f"question {i}", "output": "a"} for i in range(len(matrix))]
    for row, source in zip(rows, sources or [], strict=False):
        row["source"] = source
    return fastsel.kmeans(open_pool(rows), encoder=np.asarray(matrix, np.float32), progress="none", **options)


BLOBS = np.repeat([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]], [20, 10, 10], axis=0) + np.random.default_rng(
    0
).standard_normal((40, 2))


def test_worked_example():
    """Points at 0, 1, 5 and at 100, 101, 103 on a line: centres 2 and 101.33; nearest are 1 (row 1) and 101 (row 4)."""
    got = kmeans([[0.0], [1.0], [5.0], [100.0], [101.0], [103.0]], clusters=2, pick="nearest", budget=2)
    assert sorted(got.indices.tolist()) == [1, 4]
    np.testing.assert_allclose(got.scores[[0, 1, 2]], [-4, -1, -9], rtol=1e-5)
    assert len(set(got.clusters[:3])) == len(set(got.clusters[3:])) == 1


@pytest.mark.parametrize(("shares", "expected"), [("proportional", [4, 2, 2]), ("equal", [3, 3, 2])])
def test_every_cluster_gives_its_share(shares, expected):
    got = kmeans(BLOBS, clusters=3, shares=shares, budget=8)
    taken = np.bincount(np.repeat([0, 1, 2], [20, 10, 10])[got.indices])
    assert sorted(taken.tolist(), reverse=True) == expected


def test_seeds_repeat_and_smaller_budgets_are_prefixes():
    ten, again, four = (kmeans(BLOBS, clusters=3, budget=b, seed=5) for b in (10, 10, 4))
    assert ten.indices.tolist() == again.indices.tolist()
    assert ten.indices[:4].tolist() == four.indices.tolist()


def test_quotas_hold():
    got = kmeans(BLOBS, sources=["a", "b"] * 20, clusters=3, budget=10, per="source=a:4,b:1")
    assert (got.indices % 2 == 0).sum() == 8


def test_no_more_clusters_than_rows():
    assert sorted(kmeans(np.eye(3), clusters=100, budget=3).indices.tolist()) == [0, 1, 2]
