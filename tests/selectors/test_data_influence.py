"""data_influence against the formula row by row in float64, and against the authors' engines."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsel.errors import UsageError
from fastsel.selectors import data_influence
from fastsel.selectors.data_influence import influences

CASES = json.loads((Path(__file__).parent / "golden" / "data_influence.json").read_text())
COLUMNS = {"q.lora_A": (0, 24), "q.lora_B": (24, 42), "v.lora_A": (42, 72)}


def data(seed, n, m, scale):
    """As golden/record_data_influence.py makes them."""
    generator = np.random.default_rng(seed)
    sizes = [end - first for first, end in COLUMNS.values()]
    by_layer = np.repeat(np.geomspace(1, 10, len(sizes)), sizes) * scale
    shared = generator.standard_normal(sum(sizes))
    rows = (generator.standard_normal((n, sum(sizes))) + shared) * by_layer
    target = (generator.standard_normal((m, sum(sizes))) + shared) * by_layer
    return rows.astype(np.float32), target.astype(np.float32)


def naive(train, target, columns, damping=0.1):
    """The formula, one training row after another."""
    train, v = np.asarray(train, np.float64), np.asarray(target, np.float64).mean(0)
    found = np.zeros(len(train))
    for first, end in columns.values():
        g_nl, v_l = train[:, first:end], v[first:end]
        damp = damping * (g_nl**2).mean()
        if damp == 0:
            continue
        h = np.zeros(end - first)
        for g in g_nl:
            h += (v_l - (v_l @ g) / (damp + g @ g) * g) / (len(train) * damp)
        found -= g_nl @ h
    return found


def test_worked_example():
    """Rows (2, 0), (0, 2) and (1, 1), target (1, 0), damping 1/2: lambda = 1/2 * 10/6 = 5/6.

    <v, g> = 2, 0, 1 and |g|^2 = 4, 4, 2: the mean of v - <v, g> / (lambda + |g|^2) g over the rows is
    (1, 0) - (12/29 (2, 0) + 6/17 (1, 1)) / 3, and h is 6/5 of that.
    """
    train, target = np.array([[2.0, 0], [0, 2], [1, 1]]), [[1.0, 0]]
    h = 6 / 5 * np.array([1 - (24 / 29 + 6 / 17) / 3, -6 / 17 / 3])
    np.testing.assert_allclose(influences(train, target, damping=0.5), -train @ h, rtol=1e-14)
    indices, gains = data_influence(train, target, 2, damping=0.5)
    assert indices.tolist() == [0, 2] and gains == pytest.approx((train @ h)[[0, 2]])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_the_authors_influences(case):
    """To 1e-5 of the largest, which is what their float32 allows; and the same half in the same order."""
    train, target = data(*case["data"])
    mean, each = np.array(case["mean"]), np.array(case["each"])
    found = influences(train, target, columns=COLUMNS)
    np.testing.assert_allclose(found, mean, atol=1e-5 * np.abs(mean).max())
    np.testing.assert_allclose(
        influences(train, target, columns=COLUMNS, each=True), each, atol=1e-5 * np.abs(each).max()
    )
    half = data_influence(train, target, len(train) // 2, columns=COLUMNS)[0]
    assert half.tolist() == np.argsort(mean, kind="stable")[: len(train) // 2].tolist()


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 12), m=st.integers(1, 4), seed=st.integers(0, 999), damping=st.sampled_from([0.01, 0.1, 3.0]),
    size=st.integers(1, 5), is_still=st.booleans(),
)  # fmt: skip
def test_law_equals_the_formula_in_any_blocks(n, m, seed, damping, size, is_still):
    train, target = data(seed, n, m, 1.0)
    if is_still:
        train[:, 24:42] = 0  # a layer that nothing moves
    expected = naive(train, target, COLUMNS, damping)

    def blocks():
        return (train[start : start + size] for start in range(0, n, size))

    for given_train in (train, torch.from_numpy(train), blocks):
        found = influences(given_train, target, columns=COLUMNS, damping=damping)
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max(initial=0))
    each = influences(train, target, columns=COLUMNS, damping=damping, each=True)
    assert each.shape == (m, n)
    np.testing.assert_allclose(each.mean(0), expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max(initial=0))


def test_layers_are_chosen_and_add_up():
    train, target = data(0, 20, 3, 1.0)
    parts = [influences(train, target, columns=COLUMNS, layers=[name]) for name in COLUMNS]
    np.testing.assert_allclose(sum(parts), influences(train, target, columns=COLUMNS), rtol=1e-12)
    whole = influences(train, target)
    np.testing.assert_allclose(whole, naive(train, target, {"all": (0, 72)}), rtol=1e-9)


def test_law_threads_mapped_files_and_scale(tmp_path, monkeypatch):
    train, target = data(0, 50, 3, 1.0)
    expected = influences(train, target, columns=COLUMNS)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert influences(train, target, columns=COLUMNS).tolist() == expected.tolist()
    finally:
        torch.set_num_threads(before)
    np.save(tmp_path / "g.npy", train)
    mapped = np.load(tmp_path / "g.npy", mmap_mode="r")
    assert influences(mapped, target, columns=COLUMNS).tolist() == expected.tolist()
    # lambda grows as gradients squared do: twice the gradients leave the influence where it is.
    np.testing.assert_allclose(influences(2 * train, 2 * target, columns=COLUMNS), expected, rtol=1e-12)


def test_law_fewer_rows_are_the_first_and_initial_is_left_out():
    train, target = data(0, 50, 3, 1.0)
    indices, gains = data_influence(train, target, 99, columns=COLUMNS)
    assert sorted(indices.tolist()) == list(range(50)) and (np.diff(gains) <= 0).all()
    assert indices.dtype == np.int64 and gains.dtype == np.float64
    assert data_influence(train, target, 7, columns=COLUMNS)[0].tolist() == indices[:7].tolist()
    rest = data_influence(train, target, 99, columns=COLUMNS, initial=indices[:7])
    assert rest[0].tolist() == indices[7:].tolist() and rest[1].tolist() == gains[7:].tolist()


def test_edges_no_rows_copies_and_zeros():
    train, target = data(0, 6, 3, 1.0)
    assert influences(train[:0], target).shape == (0,) and influences(train[:0], target, each=True).shape == (3, 0)
    assert influences(np.zeros((4, 72)), target).tolist() == [0] * 4
    assert data_influence(np.zeros((4, 72)), target, 3)[0].tolist() == [0, 1, 2]
    twice = influences(np.concatenate([train, train]), target)
    assert twice[:6].tolist() == twice[6:].tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": 0}, "damping must be a number above 0, got 0"),
        ({"target": np.zeros((0, 4))}, "target has no rows"),
        ({"target": np.zeros((1, 5))}, r"train has blocks \[6, 4\], the target has 5 columns"),
        ({"layers": ["a"]}, "layers= names layers of columns=, which is missing"),
        ({"columns": {"a": (0, 2)}, "layers": ["b"]}, "there is no layer b; the layers are: a"),
        ({"columns": {"a": (0, 2)}, "layers": []}, "layers must name at least one layer"),
        ({"columns": {"a": (0, 5)}}, "layer a has columns 0 to 5, the gradients have 4"),
        ({"train": np.full((2, 4), np.nan)}, "train: row 0 holds NaN or infinity"),
        ({"train": lambda: iter([np.ones((2, 4)), np.full((2, 4), np.inf)])}, "train: row 2 holds NaN or infinity"),
        ({"k": -1}, "k=-1 must not be negative"),
        ({"initial": [6]}, "initial: there is no row 6, the matrix has 6"),
    ],
)
def test_refuses(options, message):
    given_options = {"train": np.eye(6, 4), "target": np.ones((1, 4)), "k": 2, **options}
    with pytest.raises(UsageError, match=message):
        data_influence(**given_options)
