"""Targets taking turns, and similarity to targets, against plain float64."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsel.errors import UsageError
from fastsel.selectors import neighbours
from fastsel.selectors.round_robin import round_robin
from fastsel.selectors.rows import Rows
from fastsel.selectors.target_similarity import target_similarity


def unit(x):
    x = np.asarray(x, np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-300)


def naive(x, k, targets, groups=None, initial=()):
    """The whole matrix, and every turn an argmax over it."""
    similarity = unit(targets) @ unit(x).T
    if groups is not None:
        similarity = np.stack([similarity[np.asarray(groups) == g].max(0) for g in range(max(groups) + 1)])
    similarity[:, list(initial)] = -np.inf
    picks, gains = [], []
    for turn in range(min(k, len(x) - len(initial))):
        row = similarity[turn % len(similarity)]
        picks.append(int(row.argmax()))
        gains.append(row[picks[-1]])
        similarity[:, picks[-1]] = -np.inf
    return picks, gains


def integers(seed, n, d):
    return np.random.default_rng(seed).integers(-3, 4, (n, d)).astype(np.float32)


@pytest.mark.parametrize("implementation", ["native", "torch", "reference"])
@pytest.mark.parametrize("groups", [None, [0, 1, 1, 0, 2]])
def test_matches_reference(groups, implementation):
    draw = np.random.default_rng(3)
    x, targets = draw.standard_normal((90, 7)), draw.standard_normal((5, 7))
    picks, gains = round_robin(x, 60, targets=targets, groups=groups, initial=[4, 9], implementation=implementation)
    expected, cosines = naive(x, 60, targets, groups, [4, 9])
    assert picks.tolist() == expected and gains == pytest.approx(cosines, abs=2e-6)
    assert (picks.dtype, gains.dtype) == (np.int64, np.float64)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 6), st.integers(1, 50), st.booleans())
def test_law_gains_are_those_of_the_naive_turns(seed, n, m, k, grouped):
    """Small integers tie often: which of two equal rows is taken may then differ by rounding, what it is worth not."""
    x, targets = integers(seed, n, 3), integers(seed + 1, m, 3)
    groups = [i % max(1, m // 2) for i in range(m)] if grouped else None
    picks, gains = round_robin(x, k, targets=targets, groups=groups)
    assert len(set(picks.tolist())) == len(picks) == min(k, n)
    whole, _ = round_robin(x, n, targets=targets, groups=groups)
    assert whole[: len(picks)].tolist() == picks.tolist()  # the first j are the selection for j
    similarity = unit(targets) @ unit(x).T
    if groups is not None:
        similarity = np.stack([similarity[np.asarray(groups) == g].max(0) for g in range(max(groups) + 1)])
    free = np.ones(n, bool)
    for turn, (row, gain) in enumerate(zip(picks, gains, strict=True)):
        of_turn = similarity[turn % len(similarity)]
        assert gain == pytest.approx(of_turn[row], abs=2e-6) and gain >= of_turn[free].max() - 2e-6
        free[row] = False


def test_one_target_that_everybody_likes_gets_a_long_list():
    """Two equal targets: each one's list must be read far past its first length."""
    x = np.random.default_rng(0).standard_normal((200, 4))
    picks, _ = round_robin(x, 150, targets=np.stack([x[0], x[0]]))
    assert picks.tolist() == naive(x, 150, np.stack([x[0], x[0]]))[0]


def test_edges_ties_among_many_rows_go_to_the_lowest():
    """Three rows in 1,000 copies, mixed: a sort that keeps no order would show."""
    x = np.eye(3)[np.arange(3000) * 7 % 3] + [1, 0, 0]
    picks, _ = round_robin(x, 3000, targets=[[1.0, 1.0, 0.1]], groups=[0])
    kind = np.arange(3000) * 7 % 3
    assert picks.tolist() == [*np.flatnonzero(kind == 1), *np.flatnonzero(kind == 0), *np.flatnonzero(kind == 2)]


def test_edges_a_mapped_matrix_is_read_in_blocks(tmp_path, monkeypatch):
    whole_of = Rows.whole

    def unless_mapped(rows):
        assert not rows.is_mapped
        return whole_of(rows)

    draw = np.random.default_rng(7)  # no ties: parts of a product may round differently
    x, targets = draw.standard_normal((300, 5)), draw.standard_normal((4, 5))
    np.save(tmp_path / "x.npy", x)
    monkeypatch.setattr(neighbours, "MAPPED_POINTS", 64)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    for groups in (None, [0, 1, 1, 0]):
        whole, gains = round_robin(x, 40, targets=targets, groups=groups)
        with monkeypatch.context() as patch:
            patch.setattr(Rows, "whole", unless_mapped)
            picks, again = round_robin(mapped, 40, targets=targets, groups=groups)
        assert picks.tolist() == whole.tolist() and again == pytest.approx(gains, abs=1e-6)


def test_edges():
    x = np.eye(3)
    assert round_robin(x, 0, targets=x)[0].tolist() == []
    assert round_robin(x, 5, targets=x[:1], initial=[0, 1, 2])[0].tolist() == []
    assert round_robin(np.zeros((4, 3)), 9, targets=x)[0].tolist() == [0, 1, 2, 3]  # all tie: the lowest first
    assert round_robin(np.zeros((100, 3)), 50, targets=x, groups=[0, 1, 1])[0].tolist() == list(range(50))
    assert target_similarity(np.zeros((0, 3)), x).shape == (0,)
    assert target_similarity(np.zeros((2, 3)), x).tolist() == [0, 0]


@pytest.mark.parametrize("mean", [False, True])
def test_similarity_matches_reference(mean):
    draw = np.random.default_rng(5)
    x, targets, groups = draw.standard_normal((50, 6)), draw.standard_normal((7, 6)), [0, 1, 2, 1, 0, 0, 2]
    cosines = unit(x) @ unit(targets).T
    if mean:
        expected = np.stack([cosines[:, np.array(groups) == g].mean(1) for g in range(3)]).max(0)
    else:
        expected = cosines.max(1)
    assert target_similarity(x, targets, groups=groups, mean=mean) == pytest.approx(expected, abs=2e-6)
    alone = target_similarity(x, targets, mean=mean)
    assert alone == pytest.approx(cosines.mean(1) if mean else cosines.max(1), abs=2e-6)


def test_refuses():
    x = np.eye(3)
    for call in (round_robin, target_similarity):
        options = {"k": 2} if call is round_robin else {"mean": True}
        with pytest.raises(UsageError, match=r"targets must be one or more rows of 3 numbers, got \[1, 2\]"):
            call(x, targets=np.ones((1, 2)), **options)
        with pytest.raises(UsageError, match=r"targets must be one or more rows of 3 numbers, got \[0, 3\]"):
            call(x, targets=np.ones((0, 3)), **options)
        with pytest.raises(UsageError, match="targets: row 1 holds NaN"):
            call(x, targets=np.array([[1, 1, 1], [1, np.nan, 1]]), **options)
        for groups in ([0], [0, 2, 2], [0.0, 1.0, 1.0], [-1, 0, 1]):
            with pytest.raises(UsageError, match="groups must be a whole number for each of 3 targets"):
                call(x, targets=x, groups=groups, **options)
    with pytest.raises(UsageError, match="initial: there is no row 3"):
        round_robin(x, 2, targets=x, initial=[3])
