"""The length baseline: characters of the answers."""

import numpy as np
import pytest

import fastsel
from fastsel.errors import UsageError


def test_worked_example():
    """Answers of 2, 5, 0 (unusable), 5 and 3 characters: two of five are rows 1 and 3, the lowest first."""
    rows = [{"instruction": "say", "output": answer} for answer in ("ab", "abcde", "", "通り🙂!!", "abc")]
    selection = fastsel.length(rows, budget=2)
    assert selection.indices.tolist() == [1, 3]
    np.testing.assert_array_equal(selection.scores, [2, 5, np.nan, 5, 3])
    assert selection.metrics["answer_characters"] is not None and 2 in selection.reasons


def test_a_conversation_counts_all_its_answers():
    chat = [("user", "long question"), ("assistant", "ab"), ("user", "q"), ("assistant", "cde")]
    rows = [{"messages": [{"role": role, "content": content} for role, content in chat]}]
    assert fastsel.length(rows, budget=1).scores.tolist() == [5]


def test_no_eligible_row_and_refusals():
    assert fastsel.length([{"instruction": "say", "output": ""}], budget=1).short_by == 1
    with pytest.raises(UsageError, match="counts tokens"):
        fastsel.length([{"instruction": "say", "output": "a"}], budget="1ktok")
