"""DEITA's representation filter over an embedded pool, by hand and against a transcription."""

import json
from pathlib import Path

import numpy as np
import pytest

import fastsel
from fastsel.errors import InputError, UsageError
from fastsel.io import open_pool

GOLDEN = Path(__file__).with_name("golden")


def repr_filter(matrix, scores=None, **options):
    rows = [{"instruction": f"question {i}", "output": "a"} for i in range(len(matrix))]
    for row, score in zip(rows, scores if scores is not None else [], strict=False):
        row["s"] = score
    pool = open_pool(rows, score_column=None if scores is None else "s")
    return fastsel.repr_filter(pool, encoder=np.asarray(matrix), progress="none", **options)


def transcription(x, order, k, threshold):
    x = np.asarray(x, np.float64)
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    kept = []
    for row in order:
        if len(kept) < k and all(x[row] @ x[other] <= threshold for other in kept):
            kept.append(int(row))
    return kept


def angles(*degrees):
    radians = np.deg2rad(degrees)
    return np.stack([np.cos(radians), np.sin(radians)], axis=1)


def test_worked_example():
    """By score rows 3, 0, 1, 2 at 0, 10, 40 and 100 degrees. cos 10 = 0.985 drops row 0; cos 40 = 0.766 keeps row 1;
    row 2 is 60 degrees from row 1: kept. Nothing else is left: one row short of four."""
    got = repr_filter(angles(10, 40, 100, 0), [3.0, 2.0, 1.0, 4.0], budget=4)
    assert got.indices.tolist() == [3, 1, 2]
    np.testing.assert_allclose(got.gains[[3, 1, 2]], [np.inf, 1 - np.cos(np.deg2rad(40)), 0.5], rtol=1e-5)
    assert got.scores.tolist() == [3, 2, 1, 4]
    assert got.short_by == 1 and got.refused.tolist() == [True, False, False, False]
    assert got.rule == "cosine above 0.9 to a kept row"


@pytest.mark.parametrize("rank_by", ["auto", "score", "pool", "random"])
def test_matches_the_transcription(rank_by):
    random = np.random.default_rng(0)
    x, scores = random.standard_normal((120, 6)), random.random(120)
    order = {"pool": np.arange(120), "random": np.argsort(-np.random.default_rng(7).random(120))}
    expected = transcription(x, order.get(rank_by, np.argsort(-scores)), 25, 0.8)
    got = repr_filter(x, scores, rank_by=rank_by, threshold=0.8, budget=25, seed=7)
    assert got.indices.tolist() == expected and len(got) == 25


def test_without_a_score_column_the_order_is_the_seeds():
    x = np.eye(20)
    got = repr_filter(x, budget=5, seed=3)
    assert got.indices.tolist() == np.argsort(-np.random.default_rng(3).random(20))[:5].tolist()


def test_official_sorts_equal_scores_as_pandas_does():
    pandas = pytest.importorskip("pandas")
    scores = np.random.default_rng(1).integers(0, 4, 200).astype(float)
    got = repr_filter(np.eye(200), scores, official=True, budget=200)
    theirs = pandas.DataFrame({"s": scores}).sort_values(by="s", ascending=False).index.tolist()
    assert got.indices.tolist() == theirs
    ours = repr_filter(np.eye(200), scores, budget=200)
    assert ours.indices.tolist() == np.argsort(-scores, kind="stable").tolist()


@pytest.mark.parametrize("threshold", [0.9, 0.7])
def test_official_keeps_what_the_authors_filter_keeps(threshold):
    recorded = json.loads((GOLDEN / "repr_filter.json").read_text())[str(threshold)]
    random = np.random.RandomState(20240613)
    x, scores = random.standard_normal((160, 5)), random.randint(0, 10, 160).astype(float)
    budget = recorded["size"] if recorded["size"] > 0 else 160
    got = repr_filter(x, scores, official=True, threshold=threshold, budget=budget)
    assert got.indices.tolist() == recorded["rows"]


def test_refuses():
    with pytest.raises(UsageError, match="rank_by='best' is not known"):
        repr_filter(np.eye(3), rank_by="best")
    with pytest.raises(InputError, match="carries no scores: name their column"):
        repr_filter(np.eye(3), rank_by="score")
    with pytest.raises(UsageError, match="threshold must be a cosine"):
        repr_filter(np.eye(3), threshold=2)
