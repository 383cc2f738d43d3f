"""k-center over an embedded pool, by hand and against a transcription."""

import numpy as np
import pytest

import fastsel
from fastsel.errors import UsageError
from fastsel.io import open_pool


def pool_of(n, sources=None):
    rows = [{"instruction": f"question {i}", "output": f"answer {i}"} for i in range(n)]
    for row, source in zip(rows, sources or [], strict=False):
        row["source"] = source
    return open_pool(rows)


def k_center(matrix, **options):
    pool = options.pop("pool", None) or pool_of(len(matrix))
    return fastsel.k_center(pool, encoder=np.asarray(matrix), progress="none", **options)


def transcription(x, k, first):
    """Farthest first, row by row, in float64."""
    x = np.asarray(x, np.float64)
    chosen = [first]
    while len(chosen) < k:
        nearest = np.array([min(np.linalg.norm(row - x[c]) for c in chosen) for row in x])
        nearest[chosen] = -1
        chosen.append(int(nearest.argmax()))
    return chosen


def test_worked_example():
    """On a line at 0, 10, 4, 7, 1. Seed 0 draws row 4 (at 1): farthest is 10 (9 away), then 4 (3 from 1) before 7 (3
    from 10): a tie, the lowest row first; then 7 (3 from 4 and from 10)."""
    got = k_center([[0.0], [10.0], [4.0], [7.0], [1.0]], budget=4)
    assert got.indices.tolist() == [4, 1, 2, 3]
    np.testing.assert_allclose(got.gains[[4, 1, 2, 3]], [np.inf, 9, 3, 3])
    assert np.isnan(got.gains[0]) and np.isnan(got.scores[0])
    assert got.eligible.all() and got.short_by == 0


def test_matches_the_transcription():
    x = np.random.default_rng(0).standard_normal((60, 5)).astype(np.float32)
    got = k_center(x, budget=20, seed=3)
    assert got.indices.tolist() == transcription(x, 20, got.indices[0])


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_on_unit_vectors_both_metrics_choose_the_same(metric):
    x = np.random.default_rng(1).standard_normal((50, 6))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    assert k_center(x, budget=10, metric=metric).indices.tolist() == k_center(x, budget=10).indices.tolist()


def test_quotas_hold_and_a_smaller_budget_is_a_prefix():
    x = np.random.default_rng(2).standard_normal((40, 4))
    pool = pool_of(40, ["a"] * 30 + ["b"] * 10)
    got = k_center(x, pool=pool, budget=8, per="source")
    assert (got.indices < 30).sum() == 6 and len(got) == 8
    ten, four = k_center(x, budget=10), k_center(x, budget=4)
    assert ten.indices[:4].tolist() == four.indices.tolist()


def test_the_notes_say_how_near_rows_are_to_chosen_ones():
    x = np.eye(4)[[0, 0, 1, 1, 2, 2]]
    (note,) = k_center(x, budget=3).notes
    assert note.startswith("cosine with the nearest chosen row: mean 1.000, least 1.000; random draw: mean ")


def test_refuses():
    with pytest.raises(UsageError, match="counts tokens, but this method counts none"):
        k_center(np.eye(3), budget="10tok")
    with pytest.raises(UsageError, match="metric must be euclidean or cosine"):
        k_center(np.eye(3), metric="dot")
    with pytest.raises(UsageError, match="chose its rows one after another; a new budget needs a new run"):
        k_center(np.eye(3), budget=2).choose_again(1)
