"""The random baseline: same chance for each usable row, and the same rows for the same seed."""

import numpy as np
import pytest

import fastsel
from fastsel.errors import UsageError


def pool_of(n, empty=()):
    return [{"instruction": f"say {i}", "output": "" if i in empty else f"answer {i}"} for i in range(n)]


def test_worked_example():
    """Of four rows one has no answer; two of the other three are taken, in the order of their uniform numbers."""
    selection = fastsel.random(pool_of(4, empty={1}), budget=2, seed=5)
    drawn = np.random.default_rng(5).random(4)
    by_number = [row for row in np.argsort(-drawn) if row != 1]
    assert selection.indices.tolist() == by_number[:2]
    assert np.isnan(selection.scores[1]) and selection.scores[0] == drawn[0]


def test_same_seed_same_rows_and_a_larger_budget_contains_them():
    few, again = (fastsel.random(pool_of(50), budget=5, seed=1) for _ in range(2))
    many, other = fastsel.random(pool_of(50), budget=20, seed=1), fastsel.random(pool_of(50), budget=5, seed=2)
    assert few.indices.tolist() == again.indices.tolist() == many.indices[:5].tolist()
    assert few.indices.tolist() != other.indices.tolist()


def test_every_row_has_the_same_chance():
    """20 of 60 rows in each of 300 draws: 100 takes a row are expected, with a standard deviation of 8.2."""
    pool = fastsel.open_pool(pool_of(60))
    taken = sum(np.bincount(fastsel.random(pool, budget=20, seed=seed).indices, minlength=60) for seed in range(300))
    assert taken.sum() == 6000 and abs(taken - 100).max() < 5 * 8.2


def test_equal_rows_are_rows_of_their_own():
    selection = fastsel.random([{"instruction": "a", "output": "b"}] * 6, budget=3)
    assert len(set(selection.indices.tolist())) == 3


def test_no_eligible_row_and_refusals():
    assert fastsel.random(pool_of(2, empty={0, 1}), budget=1).short_by == 1
    with pytest.raises(UsageError, match="counts tokens"):
        fastsel.random(pool_of(2), budget="2Mtok")
