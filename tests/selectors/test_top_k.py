import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastsel.errors import UsageError
from fastsel.selectors import top_k


def test_worked_example():
    """Scores 3, NaN, 5, 5, 1: the two 5s come first, the lower row before the higher; NaN is never taken."""
    indices, scores = top_k([3, np.nan, 5, 5, 1], 3)
    assert indices.dtype == np.int64 and indices.tolist() == [2, 3, 0] and scores.tolist() == [5, 5, 3]
    assert top_k([3, np.nan, 5, 5, 1], 9, largest=False)[0].tolist() == [4, 0, 2, 3]
    assert top_k([3, 4, 5], 2, eligible=[True, True, False])[0].tolist() == [1, 0]
    assert top_k([], 2)[0].tolist() == []


@given(st.lists(st.floats(allow_nan=True, width=16), max_size=30), st.integers(0, 40), st.booleans())
def test_law_equals_sorting_by_score_and_row(values, k, largest):
    sign = -1 if largest else 1
    expected = sorted((i for i, x in enumerate(values) if x == x), key=lambda i: (sign * values[i], i))[:k]
    indices, scores = top_k(values, k, largest=largest)
    assert indices.tolist() == expected
    assert scores.tolist() == [values[i] for i in expected]


def test_refuses_what_is_not_a_row_of_scores():
    with pytest.raises(UsageError, match=r"must be \[n\]"):
        top_k([[1.0, 2.0]], 1)
    with pytest.raises(UsageError, match="k=-1 must not be negative"):
        top_k([1.0], -1)
