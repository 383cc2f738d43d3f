"""Ready scores: a sort of what the pool carries.

    row        0     1     2     3      4      5
    score    0.2   0.9   1.4   0.9    NaN   -0.5

highest first: 2, 1, 3, 0, 5 (1 before 3: equal scores, lower row first); lowest first: 5, 0, 1, 3, 2; not above 1:
1, 3, 0, 5. Row 4 has no number and is skipped.
"""

import numpy as np
import pytest

import fastsel
from fastsel.errors import FastselError, InputError, UsageError
from fastsel.io import STATUS, open_pool

SCORES = [0.2, 0.9, 1.4, 0.9, None, -0.5]


@pytest.fixture
def pool():
    rows = [
        {"instruction": f"Count to {i}.", "input": "", "output": "one two", "source": "ab"[i % 2], "s": {"x": score}}
        for i, score in enumerate(SCORES)
    ]
    return open_pool(rows, score_column="s.x")


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ({"budget": 3}, [2, 1, 3]),
        ({"budget": 1.0}, [2, 1, 3, 0, 5]),
        ({"budget": 2, "keep": "lowest"}, [5, 0]),
        ({"budget": 3, "drop_above": 1.0}, [1, 3, 0]),
        ({"budget": 2, "per": "source"}, [2, 1]),
        ({"budget": "50%"}, [2, 1, 3]),
    ],
)
def test_worked_example(pool, options, chosen):
    assert fastsel.scores(pool, **options).indices.tolist() == chosen


def test_a_row_without_a_number_keeps_no_score_and_says_so(pool):
    selection = fastsel.scores(pool, budget=1.0)
    assert np.isnan(selection.scores[4]) and selection.scores[:2].tolist() == [0.2, 0.9]
    assert selection.status[4] == STATUS.index("skipped")
    assert "s.x" in selection.reasons[4] or "score" in selection.reasons[4]
    assert selection.short_by == 1


def test_a_dropped_row_keeps_its_score_and_names_the_rule(pool):
    table = fastsel.scores(pool, budget=1, drop_above=1.0).table
    assert table["score"][2].as_py() == 1.4
    assert table["reason"][2].as_py() == "rule: score above 1"


def test_refuses_a_pool_without_scores_and_an_unknown_end(pool):
    rows = [{"instruction": "a", "output": "b"}]
    with pytest.raises(InputError, match="carries no scores: name their column with --score-column"):
        fastsel.scores(rows)
    with pytest.raises(UsageError, match="keep='top' is not known; it is highest or lowest"):
        fastsel.scores(pool, keep="top")
    with pytest.raises(FastselError, match="counts tokens"):
        fastsel.scores(pool, budget="2ktok")
