"""A greedy choice within rows, tokens and quotas."""

import numpy as np
import pytest

from fastsel.budget import Budget, Limits
from fastsel.selectors.under_budget import pick_under


def farthest(x, k, *, initial):
    """Farthest first on a line, from row 0 when nothing is chosen; gains are the distances."""
    chosen, picks, gains = list(initial), [], []
    for _ in range(k):
        distance = np.min([np.abs(x[:, 0] - x[c, 0]) for c in chosen], axis=0) if chosen else 1.0 * (x[:, 0] == x[0, 0])
        distance = np.where(np.isin(np.arange(len(x)), chosen), -1, distance)
        picks.append(int(distance.argmax()))
        gains.append(float(distance.max()))
        chosen.append(picks[-1])
    return np.array(picks, np.int64), np.array(gains)


X = np.array([[0.0], [10.0], [4.0], [7.0], [1.0]], np.float32)  # farthest first: rows 0, 1, 2, 3, 4
ROWS = np.array([0, 2, 3, 5, 6])


def limits(limits_, codes=None, sizes=None):
    names = [str(i) for i in range(len(limits_))]
    codes = np.zeros(7, np.int32) if codes is None else np.array(codes, np.int32)
    return Limits(names, codes, limits_, None if sizes is None else np.array(sizes))


@pytest.mark.parametrize(("k", "expected"), [(1, [0]), (3, [0, 2, 3]), (9, [0, 2, 3, 5, 6])])
def test_rows(k, expected):
    picks, gains = pick_under(limits([k]), ROWS, X, farthest)
    assert picks.tolist() == expected and len(gains) == len(picks)
    assert gains[:3].tolist() == [1.0, 10.0, 4.0][: len(gains)]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(4, []), (5, [0]), (11, [0, 2]), (13, [0, 2]), (14, [0, 2, 3]), (1000, [0, 2, 3, 5, 6])],
)
def test_tokens_stop_before_the_first_row_that_exceeds(tokens, expected):
    """Rows 0, 2, 3, 5, 6 have 5, 6, 3, 1 and 1 tokens: row 5 would fit into what 13 tokens leave, but comes later."""
    picks, _ = pick_under(limits([tokens], sizes=[5, 99, 6, 3, 99, 1, 1]), ROWS, X, farthest)
    assert picks.tolist() == expected


def test_more_picks_are_asked_for_until_the_tokens_are_used():
    asked = []

    def select(x, k, *, initial):
        asked.append(k)
        return np.arange(k), np.ones(k)

    sizes = np.r_[np.ones(500), np.full(500, 1000)].astype(int)
    picks, _ = pick_under(
        Limits(["all"], np.zeros(1000, np.int32), [600], sizes), np.arange(1000), np.zeros((1000, 1)), select
    )
    assert picks.tolist() == list(range(500))
    assert asked[0] == 9 and len(asked) == 7


def test_quotas_go_on_from_what_other_sources_chose():
    """Group 1 (rows 2, 5: 10 and 7) is filled first: row 2 lies first in it; then group 0 (0, 4, 1): farthest is 0."""
    picks, gains = pick_under(limits([1, 2], codes=[0, 0, 1, 0, 0, 1, 0]), ROWS, X, farthest)
    assert picks.tolist() == [2, 5, 0]
    assert gains.tolist() == [1.0, 3.0, 7.0]


def test_a_source_without_rows_or_without_quota_is_passed_over():
    picks, _ = pick_under(limits([0, 3, 2], codes=[0, 0, 1, 0, 0, 1, 0]), ROWS, X, farthest)
    assert picks.tolist() == [2, 5]
    assert Budget.parse(5).limit(7) == 5
