"""Columns of scores take turns, or each takes a budget."""

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from fastsel.errors import UsageError
from fastsel.selectors.score_turns import score_turns

MATRICES = hnp.arrays(
    np.float64, st.tuples(st.integers(0, 12), st.integers(1, 4)), elements=st.integers(0, 5).map(float)
)


def test_worked_by_hand():
    """Column 0 likes 2 (9), 0 (5), 1 (1), 3 (0); column 1 likes 2 (8), 3 (7), 1 (6), 0 (0).

    Turns: 0 takes 2; 1's best is 2, taken, so 3; 0 takes 0; 1 takes 1. A union of two each: {2, 0} and {2, 3}.
    """
    scores = np.array([[5, 0], [1, 6], [9, 8], [0, 7]])
    assert score_turns(scores).tolist() == [2, 3, 0, 1]
    first_two = lambda ranked: ranked[:2]  # noqa: E731
    assert score_turns(scores, take=first_two).tolist() == [2, 3]
    assert score_turns(scores, take=first_two, combine="union").tolist() == [2, 3, 0]


@given(MATRICES)
def test_law_one_column_is_a_ranking_and_turns_are_a_permutation(scores):
    assert sorted(score_turns(scores).tolist()) == list(range(len(scores)))
    single = score_turns(scores[:, :1])
    np.testing.assert_array_equal(single, np.lexsort((np.arange(len(scores)), -scores[:, 0])))


@given(MATRICES, st.integers(1, 5))
def test_law_union_is_what_each_column_takes_alone(scores, k):
    take = lambda ranked: ranked[:k]  # noqa: E731
    alone = {int(row) for column in range(scores.shape[1]) for row in score_turns(scores[:, [column]], take=take)}
    assert set(score_turns(scores, take=take, combine="union").tolist()) == alone


def test_edges_rows_without_a_score_or_not_eligible_are_left_out():
    scores = np.array([[1.0, 2.0], [np.nan, 5.0], [3.0, 3.0]])
    assert score_turns(scores).tolist() == [2, 0]
    assert score_turns(scores, np.array([True, True, False])).tolist() == [0]
    assert score_turns(np.zeros((0, 2))).tolist() == []


def test_refuses_what_is_no_matrix_or_no_way():
    with pytest.raises(UsageError, match=r"\[rows, columns\]"):
        score_turns(np.zeros(3))
    with pytest.raises(UsageError, match="combine='sum' is not known; it is one of: round_robin, union"):
        score_turns(np.zeros((3, 1)), combine="sum")
