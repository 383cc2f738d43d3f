"""repr_filter against a float64 loop over rows, and against what DEITA's own filter kept."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsel.errors import UsageError
from fastsel.selectors import repr_filter

GOLDEN = json.loads((Path(__file__).parent / "golden" / "repr_filter.json").read_text())


def naive(x, threshold, *, order=None, initial=(), k=None):
    x = np.asarray(x, np.float64)
    lengths = np.linalg.norm(x, axis=1)
    unit = x / np.where(lengths == 0, 1, lengths)[:, None]
    kept, rows, gains = list(initial), [], []
    for row in range(len(x)) if order is None else order:
        if row in initial:
            continue
        cosines = unit[kept] @ unit[row]
        if len(rows) == k:
            break
        if not kept or cosines.max() <= threshold + 1e-12:
            gains.append(1 - cosines.max() if kept else np.inf)
            kept.append(row)
            rows.append(row)
    return np.array(rows, np.int64), np.array(gains)


def assert_equal(got, expected):
    assert got[0].dtype == np.int64 and got[1].dtype == np.float64
    np.testing.assert_array_equal(got[0], expected[0])
    np.testing.assert_allclose(got[1], expected[1], rtol=0, atol=3e-6)


def clouds(n=600, d=12, centres=30, spread=0.3, seed=0):
    generator = np.random.default_rng(seed)
    middles = generator.standard_normal((centres, d))
    return middles[generator.integers(0, centres, n)] + spread * generator.standard_normal((n, d))


@pytest.fixture(params=[1024, 64, 7], ids=["blocks of 1024", "of 64", "of 7"])
def small_blocks(request, monkeypatch):
    monkeypatch.setitem(repr_filter.__globals__, "BLOCK_ROWS", request.param)
    monkeypatch.setitem(repr_filter.__globals__, "KEPT_AT_A_TIME", max(5, request.param // 2))


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"threshold {case['threshold']}")
def test_keeps_what_the_authors_filter_keeps(case):
    seed, n, d, centres, spread = case["data"]
    x = clouds(n, d, centres, spread, seed).astype(np.float32)
    k = None if case["data_size"] < 0 else case["data_size"]
    assert repr_filter(x, k, threshold=case["threshold"])[0].tolist() == case["kept"]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("threshold", [-0.2, 0.3, 0.9, 0.97])
def test_matches_reference(threshold):
    x = clouds()
    assert_equal(repr_filter(x, threshold=threshold), naive(x, threshold))
    assert_equal(repr_filter(x.astype(np.float32), threshold=threshold), naive(x.astype(np.float32), threshold))


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(0, 40), d=st.integers(1, 4), levels=st.integers(1, 3), seed=st.integers(0, 999),
    threshold=st.sampled_from([-1.0, 0.0, 0.5, 0.70710678118654752, 1.0]),
)  # fmt: skip
def test_law_any_shape_with_cosines_equal_to_the_threshold(n, d, levels, seed, threshold):
    x = np.random.default_rng(seed).integers(-levels, levels + 1, (n, d)).astype(float)
    assert_equal(repr_filter(x, threshold=threshold), naive(x, threshold))


def test_law_a_cosine_that_float32_cannot_place_is_decided_in_float64():
    """Two rows whose cosine lies 1e-9 above or below the threshold."""
    for offset, count in ((1e-9, 1), (-1e-9, 2)):
        angle = np.arccos(0.9 + offset)
        x = np.array([[1.0, 0.0], [np.cos(angle), np.sin(angle)]])
        assert len(repr_filter(x)[0]) == count
        # The same between blocks, where float32 looks first.
        far = np.array([[0.0, -1.0]])
        rows = repr_filter(np.concatenate([x[:1], np.repeat(far, 1100, axis=0), x[1:]]))[0]
        assert len(rows) == count + 1


@pytest.mark.usefixtures("small_blocks")
def test_law_the_first_are_the_selection_for_fewer_and_initial_continues():
    x = clouds()
    rows, gains = repr_filter(x, threshold=0.8)
    for j in (0, 1, 20, len(rows)):
        assert_equal(repr_filter(x, j, threshold=0.8), (rows[:j], gains[:j]))
    assert_equal(repr_filter(x, threshold=0.8, initial=rows[:10]), (rows[10:], gains[10:]))
    assert_equal(repr_filter(x, threshold=0.8, initial=[500, 3]), naive(x, 0.8, initial=[500, 3]))


@pytest.mark.usefixtures("small_blocks")
def test_law_an_order_or_scores_say_who_comes_first():
    x = clouds()
    order = np.random.default_rng(1).permutation(600)[:400]
    assert_equal(repr_filter(x, threshold=0.8, order=order), naive(x, 0.8, order=order.tolist()))
    scores = np.random.default_rng(1).integers(0, 5, 600).astype(float)  # ties: the lowest row
    by_score = sorted(range(600), key=lambda row: (-scores[row], row))
    assert_equal(repr_filter(x, threshold=0.8, scores=scores), naive(x, 0.8, order=by_score))


def test_law_no_two_kept_rows_are_too_similar_and_each_dropped_one_has_a_reason():
    x = clouds()
    rows, _ = repr_filter(x, threshold=0.8)
    unit = x / np.linalg.norm(x, axis=1)[:, None]
    cosines = unit @ unit[rows].T
    assert (np.triu(cosines[rows], 1) <= 0.8 + 1e-12).all()
    for row in set(range(600)) - set(rows.tolist()):
        assert cosines[row][rows < row].max() > 0.8


@pytest.mark.parametrize("threads", [1, 3])
def test_law_threads_change_nothing(threads):
    before = torch.get_num_threads()
    expected = repr_filter(clouds())
    try:
        torch.set_num_threads(threads)
        assert_equal(repr_filter(clouds()), expected)
    finally:
        torch.set_num_threads(before)


def test_a_mapped_file_and_other_arrays_give_the_same(tmp_path, monkeypatch):
    x = clouds().astype(np.float32)
    expected = repr_filter(x, threshold=0.8)
    assert_equal(repr_filter(torch.from_numpy(x), threshold=0.8), expected)
    np.save(tmp_path / "x.npy", x)
    monkeypatch.setattr("fastsel.selectors.rows.Rows.whole", lambda self: pytest.fail("copied as a whole"))
    assert_equal(repr_filter(np.load(tmp_path / "x.npy", mmap_mode="r"), threshold=0.8), expected)


def test_edges_hand_worked():
    """Cosines to (1, 0): 0.8 is not above 0.8 and stays; 0.6 to that row; (2, 0) is a copy and goes; zeros have 0."""
    x = np.array([[1.0, 0], [0.8, 0.6], [2, 0], [0, 0], [0, 1]])
    rows, gains = repr_filter(x, threshold=0.8)
    assert rows.tolist() == [0, 1, 3, 4]
    np.testing.assert_allclose(gains, [np.inf, 0.2, 1.0, 0.4], atol=1e-12)


def test_edges_nothing_to_choose():
    assert [len(part) for part in repr_filter(np.zeros((0, 3)))] == [0, 0]
    assert [len(part) for part in repr_filter(np.ones((4, 3)), 0)] == [0, 0]
    assert repr_filter(np.zeros((4, 3)), threshold=0)[0].tolist() == [0, 1, 2, 3]
    assert repr_filter(np.ones((4, 3)), 9)[0].tolist() == [0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 1.5}, "threshold must be a cosine from -1 to 1, got 1.5"),
        ({"order": [0, 1], "scores": np.ones(9)}, "give an order or scores, not both"),
        ({"order": [0, 9]}, "order: there is no row 9"),
        ({"order": [0, 0]}, "order: row 0 stands there twice"),
        ({"scores": np.ones(3)}, r"scores must be \[9\]"),
        ({"k": -1}, "k=-1 must not be negative"),
    ],
)
def test_refuses_options_that_make_no_sense(options, message):
    with pytest.raises(UsageError, match=message):
        repr_filter(np.ones((9, 2)), **options)


def test_refuses_rows_that_are_not_finite_by_number():
    x = np.ones((50, 3))
    x[37, 1] = np.nan
    with pytest.raises(UsageError, match="row 37 holds NaN or infinity"):
        repr_filter(x)
