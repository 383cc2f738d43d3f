import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsel import metrics
from fastsel.errors import UsageError


def matrix(n=50, d=7, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d)) + 0.3


def all_distances(x, metric):
    """Every pair in float64, [n, n]; a row of zeros is at cosine distance 1 from every row."""
    x = np.asarray(x, np.float64)
    if metric == "cosine":
        lengths = np.linalg.norm(x, axis=1, keepdims=True)
        unit = x / np.where(lengths > 0, lengths, 1)
        return 1 - unit @ unit.T
    squares = ((x[:, None] - x[None]) ** 2).sum(2)
    return squares if metric == "sqeuclidean" else np.sqrt(squares)


METRICS = ["cosine", "euclidean", "sqeuclidean"]


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 60), d=st.integers(1, 9), seed=st.integers(0, 99), metric=st.sampled_from(METRICS))
def test_law_sums_are_those_of_all_pairs(n, d, seed, metric):
    x = matrix(n, d, seed)
    distances = all_distances(x, metric)
    apart = distances.sum() - np.trace(distances)
    assert metrics.dist_sum(x, metric=metric) == pytest.approx(apart, rel=1e-9, abs=1e-9)
    assert metrics.dist_sum(x, metric=metric, average="all") == pytest.approx(distances.mean(), rel=1e-9, abs=1e-12)
    if n > 1:
        mean = metrics.dist_sum(x, metric=metric, average="pairs")
        assert mean == pytest.approx(apart / (n * (n - 1)), rel=1e-9, abs=1e-12)


def test_novelsums_cos_distance_is_the_mean_of_the_whole_matrix():
    """compute_cos_distance of the authors' code, then mean(): what torch.cosine_similarity says of every pair."""
    x = torch.from_numpy(matrix(40, 12)).float()
    theirs = (1 - torch.cosine_similarity(x[:, None], x[None], dim=2)).mean()
    assert metrics.dist_sum(x, average="all") == pytest.approx(float(theirs), rel=1e-5)


def test_hand_worked():
    """0, 3 and 7 on a line: pairs 3, 4, 7, each twice; nearest neighbours at 3, 3 and 4."""
    x = np.array([[0.0], [3], [7]])
    assert metrics.dist_sum(x, metric="euclidean") == 28
    assert metrics.dist_sum(x, metric="sqeuclidean") == pytest.approx(2 * (9 + 16 + 49), rel=1e-12)
    assert metrics.knn(x, k=1) == pytest.approx(10 / 3)
    assert metrics.knn(x, k=2, statistic="kth") == pytest.approx((7 + 4 + 7) / 3)
    assert metrics.radius(np.array([[0.0, 0], [2, 8]])) == pytest.approx(2)  # deviations 1 and 4
    assert metrics.dist_sum(np.eye(3)) == pytest.approx(6)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("statistic", ["mean", "kth"])
def test_knn_is_that_of_all_distances_without_the_diagonal(metric, statistic):
    x = matrix(80, 6)
    x[7] = x[3]  # a copy is a neighbour at 0
    distances = all_distances(x, metric)
    np.fill_diagonal(distances, np.inf)
    nearest = np.sort(distances, axis=1)[:, :5]
    expected = nearest.mean() if statistic == "mean" else nearest[:, 4].mean()
    assert metrics.knn(x, k=5, metric=metric, statistic=statistic) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_radius_is_numpys():
    x = matrix(200, 5) * [1, 2, 3, 4, 5]
    assert metrics.radius(x) == pytest.approx(np.exp(np.log(x.std(0)).mean()), rel=1e-12)
    x[:, 2] = 5.0
    stds = x.std(0)
    stds[2] = 1e-10
    assert metrics.radius(x) == pytest.approx(np.exp(np.log(stds).mean()), rel=1e-12)


def test_blocks_change_nothing(monkeypatch, tmp_path):
    x = matrix(150, 5).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    calls = [
        lambda x: metrics.dist_sum(x), lambda x: metrics.dist_sum(x, metric="euclidean"),
        lambda x: metrics.dist_sum(x, metric="sqeuclidean"), lambda x: metrics.knn(x), metrics.radius,
    ]  # fmt: skip
    whole = [call(x) for call in calls]
    monkeypatch.setattr("fastsel.metrics.distances.BLOCK_ROWS", 32)
    monkeypatch.setattr("fastsel.selectors.neighbours.MAPPED_POINTS", 40)
    np.testing.assert_allclose([call(mapped) for call in calls], whole, rtol=1e-12)


def test_edges_far_from_the_origin_and_copies():
    x = matrix(60, 4) + 1e4
    assert metrics.dist_sum(x, metric="euclidean") == pytest.approx(all_distances(x, "euclidean").sum(), rel=1e-9)
    assert metrics.dist_sum(x, metric="sqeuclidean") == pytest.approx(all_distances(x, "sqeuclidean").sum(), rel=1e-9)
    same = np.ones((20, 3))
    for metric in METRICS:
        assert metrics.dist_sum(same, metric=metric) == pytest.approx(0, abs=1e-12)
        assert metrics.knn(same, metric=metric) == pytest.approx(0, abs=1e-6)


def test_edges_zero_rows_are_orthogonal_to_everything():
    x = np.array([[0.0, 0], [0, 0], [1, 0]])
    assert metrics.dist_sum(x) == 6
    assert metrics.dist_sum(x, average="all") == pytest.approx((6 + 2) / 9)  # a zero row is not like itself either
    assert metrics.knn(x, k=1, metric="cosine") == 1


def test_edges_none_and_one():
    none, one = np.zeros((0, 3)), np.ones((1, 3))
    assert metrics.dist_sum(none) == metrics.dist_sum(one) == 0
    assert math.isnan(metrics.dist_sum(none, average="all")) and math.isnan(metrics.dist_sum(one, average="pairs"))
    assert math.isnan(metrics.knn(one)) and math.isnan(metrics.radius(none))
    assert metrics.radius(one) == pytest.approx(1e-10)
    assert metrics.knn(np.eye(2), k=9) == pytest.approx(math.sqrt(2))


@pytest.mark.parametrize("convert", [np.float32, torch.from_numpy, lambda x: x.tolist()])
def test_edges_what_arrays_come_as(convert):
    x = matrix(30, 4)
    assert metrics.dist_sum(convert(x)) == pytest.approx(metrics.dist_sum(x), rel=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: metrics.dist_sum(x, metric="l2"), "metric must be one of cosine, euclidean, sqeuclidean; got 'l2'"),
        (lambda x: metrics.dist_sum(x, average="mean"), "average must be one of none, pairs, all"),
        (lambda x: metrics.knn(x, k=0), "k must be a whole number of at least 1"),
        (lambda x: metrics.knn(x, statistic="max"), "statistic must be one of mean, kth"),
        (lambda x: metrics.radius(x, least=0), "least must be positive"),
        (lambda x: metrics.radius(x * np.nan), "x: row 0 holds NaN"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(UsageError, match=message):
        call(matrix(5, 2))
