"""graph_walk against a float64 walk over sorted lists of all rows, and against the authors' sequences."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastsel.errors import UsageError
from fastsel.selectors import columns, graph_walk
from fastsel.selectors.graph_walk import walk_components
from fastsel.selectors.principal_components import principal_components
from fastsel.selectors.rows import Rows

CASES = json.loads((Path(__file__).parent / "golden" / "graph_walk.json").read_text())
ZERO = 1e-12


def data(seed, n, d, m, strength):
    """As golden/record_graph_walk.py makes them."""
    generator = np.random.default_rng(seed)
    shared = strength * generator.standard_normal(d)
    rows = generator.standard_normal((n, d)) * generator.uniform(0.5, 2, (n, 1)) + shared
    target = generator.standard_normal((m, d)) * np.linspace(2, 0.1, d) + shared
    return rows.astype(np.float32), target.astype(np.float32)


def at_unit_length(x):
    x = np.asarray(x, np.float64)
    lengths = np.linalg.norm(x, axis=1, keepdims=True)
    return np.divide(x, lengths, out=np.zeros_like(x), where=lengths > 0)


def best(values):
    """The lowest of the rows whose value is the greatest, within 1e-12."""
    return int(np.flatnonzero(values >= values.max() - ZERO)[0])


def naive(x, budgets, components, consistency=0.8, restarts=True, taken=()):
    """One row after another, conditions spelled out; returns rows, gains, components and numbers of walks."""
    unit, taken, found, n_walks = at_unit_length(x), list(taken), [], -1
    for i, budget in enumerate(budgets):
        chosen = 0
        while chosen < budget and len(taken) < len(unit):
            walk, n_walks = [], n_walks + 1
            while chosen < budget:
                free = np.setdiff1d(np.arange(len(unit)), taken)
                total = unit[walk].sum(0)
                if walk:
                    length = np.linalg.norm(total)
                    old = abs(total @ components[i]) / length if length > 1e-10 else 0.0
                    allowed = []
                    for j in free:
                        new = total + unit[j]
                        length = np.linalg.norm(new)
                        along = abs(new @ components[i]) / length if length > 1e-10 else 0.0
                        if (unit[walk] @ unit[j]).min() >= -ZERO and along >= consistency * old * (1 - ZERO):
                            allowed.append(j)
                    free, beside = np.array(allowed, int), unit[walk[-1]]
                else:
                    beside = components[i]
                if not len(free):
                    break
                row = int(free[best(unit[free] @ beside)])
                found.append((row, unit[row] @ beside, i, n_walks))
                walk.append(row), taken.append(row)
                chosen += 1
            if not restarts:
                break
    return tuple(np.array(column) for column in zip(*found, strict=True)) if found else ((), (), (), ())


def split(k, weights, is_official):
    exact = k * np.asarray(weights)
    shares = np.floor(exact).astype(int)
    order = np.argsort(exact - shares)[::-1] if is_official else np.argsort(shares - exact, kind="stable")
    shares[order[: k - shares.sum()]] += 1
    return shares


def walked(x, k, target=None, **options):
    defaults = {
        "components": None, "weights": None, "variance": 0.5, "consistency": 0.8, "rule": "restart", "sign": None,
        "initial": None,
    }  # fmt: skip
    return walk_components(Rows(x, unit=True), k, target, **{**defaults, **options})


def assert_is_naive(x, k, components, weights, taken=(), **options):
    got = walked(x, k, components=components, weights=weights, initial=list(taken), **options)
    unit = at_unit_length(components)
    restarts = options.pop("rule", "restart") == "restart"
    shares = split(min(k, len(x) - len(taken)), np.asarray(weights) / np.sum(weights), not restarts)
    expected = naive(x, shares, unit, restarts=restarts, taken=taken, **options)
    assert got.indices.tolist() == list(expected[0])
    np.testing.assert_allclose(got.gains, expected[1], rtol=1e-9, atol=1e-12)
    assert got.component.tolist() == list(expected[2]) and got.walk.tolist() == list(expected[3])
    assert got.indices.dtype == np.int64 and got.gains.dtype == np.float64
    return got


def test_worked_example():
    """Rows at 0, 50, 80, 140 and -30 degrees; the component at 10 degrees, all five rows.

    Nearest it is row 0 (10 degrees off). Of the others, row 4 is 30 degrees from row 0, row 1 is 50: row 4, and the sum
    lies at -15 degrees, 25 from the component: cos 25 = 0.906 >= 0.8 cos 10 = 0.788. Row 1 is 80 degrees from row 4:
    no conflict, while rows 2 and 3 are 110 and 170 away from it. Then none is left that (a) allows. Officially the walk
    ends there; else a new one starts at row 2, 70 degrees off. Row 3 agrees with it, but would bring the sum 100
    degrees off: |cos 100| = 0.174 < 0.8 cos 70 = 0.274. So it starts a third walk, 130 degrees off.
    """
    angles = np.deg2rad([0, 50, 80, 140, -30])
    x = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    component = [[np.cos(np.deg2rad(10)), np.sin(np.deg2rad(10))]]
    indices, gains = graph_walk(x, 5, components=component, rule="official")
    assert indices.tolist() == [0, 4, 1]
    assert gains == pytest.approx(np.cos(np.deg2rad([10, 30, 80])))
    found = walked(x, 5, components=component)
    assert found.indices.tolist() == [0, 4, 1, 2, 3]
    assert found.gains == pytest.approx(np.cos(np.deg2rad([10, 30, 80, 70, 130])))
    assert found.walk.tolist() == [0, 0, 0, 1, 2] and found.component.tolist() == [0] * 5


@pytest.mark.parametrize("rule", ["restart", "official"])
@pytest.mark.parametrize("consistency", [0.0, 0.8, 1.0])
@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_matches_the_naive_walk(strength, consistency, rule):
    x, target = data(0, 200, 24, 3, strength)
    assert_is_naive(x, 40, target, [3.0, 2.0, 1.0], rule=rule, consistency=consistency)


@pytest.mark.slow
@pytest.mark.parametrize("strength", [0.0, 0.5])
def test_matches_the_naive_walk_on_a_larger_pool(strength):
    x, target = data(0, 1500, 96, 4, strength)
    assert_is_naive(x, 300, target, [4.0, 3.0, 2.0, 1.0])


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 40), d=st.integers(1, 6), k=st.integers(0, 45), q=st.integers(1, 4), seed=st.integers(0, 999),
    rule=st.sampled_from(["restart", "official"]), consistency=st.sampled_from([0.0, 0.5, 0.8, 1.0]),
    is_grid=st.booleans(), n_taken=st.integers(0, 3),
)  # fmt: skip
# Rows on a line, rows of zeros, and a first pick of zeros, whose sum has no direction.
@example(n=20, d=1, k=20, q=2, seed=0, rule="restart", consistency=0.8, is_grid=True, n_taken=0)
@example(n=5, d=1, k=5, q=1, seed=4, rule="official", consistency=1.0, is_grid=True, n_taken=0)
def test_law_equals_the_naive_walk(n, d, k, q, seed, rule, consistency, is_grid, n_taken):
    """Grids of few values have copies, ties, cosines of 0 and zero rows."""
    generator = np.random.default_rng(seed)
    x = generator.integers(-1, 2, (n, d)).astype(float) if is_grid else generator.standard_normal((n, d))
    components = generator.integers(-1, 2, (q, d)) + 0.25 if is_grid else generator.standard_normal((q, d))
    taken = generator.permutation(n)[: min(n_taken, n)].tolist()
    assert_is_naive(x, k, components, np.arange(q, 0, -1.0), taken, rule=rule, consistency=consistency)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_the_authors_sequences(case):
    x, target = data(*case["data"])
    indices, _ = graph_walk(x, case["k"], target, rule="official", consistency=case["consistency"])
    assert indices.tolist() == case["indices"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_components_are_scikit_learns(case):
    _, target = data(*case["data"])
    components, shares = principal_components(Rows(target), sign="sklearn")
    np.testing.assert_allclose(shares / shares.sum(), case["weights"], rtol=1e-5)
    assert np.abs(components).argmax(1).tolist() == case["largest"]
    assert (np.take_along_axis(components, np.abs(components).argmax(1)[:, None], 1) > 0).all()


@pytest.mark.parametrize(("m", "d"), [(9, 30), (60, 12)])
def test_components_match_a_singular_value_decomposition(m, d, monkeypatch):
    monkeypatch.setattr("fastsel.selectors.principal_components.BLOCK_ROWS", 7)
    x = np.random.default_rng(0).standard_normal((m, d)) * np.linspace(3, 1, d) + 5
    _, values, vectors = np.linalg.svd(x - x.mean(0), full_matrices=False)
    expected = values**2 / (values**2).sum()
    components, shares = principal_components(Rows(x), variance=0.6)
    assert shares.sum() > 0.6 >= shares[:-1].sum()
    np.testing.assert_allclose(shares, expected[: len(shares)], rtol=1e-9)
    np.testing.assert_allclose(np.abs((components * vectors[: len(shares)]).sum(1)), 1, rtol=1e-9)
    assert (components @ x.mean(0) >= 0).all()
    for row in principal_components(Rows(x), variance=0.6, sign="sklearn")[0]:
        assert row[np.abs(row).argmax()] > 0


def test_law_signs_of_the_target_do_not_depend_on_the_library():
    """The mean decides: turning every row of the target around turns the components with it."""
    _, target = data(5, 10, 16, 8, 1.0)
    there, back = principal_components(Rows(target))[0], principal_components(Rows(-target))[0]
    np.testing.assert_allclose(there, -back, atol=1e-12)
    # A mean of 0 says nothing: then the largest entry does.
    centred = np.array([[3.0, 1.0], [-3.0, -1.0]])
    assert (principal_components(Rows(centred))[0] > 0).all()


def test_law_threads_types_and_scale(monkeypatch):
    x, target = data(1, 400, 48, 20, 0.3)
    expected, gains = graph_walk(x, 80, target)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            again, again_gains = graph_walk(x, 80, target)
            assert again.tolist() == expected.tolist() and again_gains.tolist() == gains.tolist()
    finally:
        torch.set_num_threads(before)
    scale = np.exp2(np.random.default_rng(0).integers(-20, 20, (400, 1))).astype(np.float32)
    for same in (torch.from_numpy(x), x.astype(np.float64), np.asfortranarray(x), x * scale, x * 1e-25):
        assert graph_walk(same, 80, target)[0].tolist() == expected.tolist()
    half = torch.from_numpy(x).half()
    assert graph_walk(half, 80, target)[0].tolist() == graph_walk(half.double(), 80, target)[0].tolist()


def test_law_columns_fetched_ahead_change_nothing(monkeypatch):
    x, target = data(1, 400, 48, 20, 0.3)
    expected, gains = graph_walk(x, 80, target)
    for few, many in ((1, 1), (16, 64)):
        monkeypatch.setattr(columns, "COLUMNS", (few, many))
        again, again_gains = graph_walk(x, 80, target)
        assert again.tolist() == expected.tolist() and again_gains.tolist() == gains.tolist()
    monkeypatch.setattr(columns, "FEW", 2.0)
    monkeypatch.setattr(columns, "BLOCK_VALUES", 500)
    assert graph_walk(x, 80, target)[0].tolist() == expected.tolist()


def test_law_rows_given_before_are_left_alone():
    x, target = data(2, 200, 24, 9, 0.5)
    indices, _ = graph_walk(x, 190, target, initial=[3, 150, 7])
    assert len(indices) == 190 and not set(indices.tolist()) & {3, 150, 7}


def test_a_mapped_file_is_read_in_blocks(tmp_path, monkeypatch):
    x, target = data(1, 500, 48, 20, 0.3)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "half.npy", x.astype(np.float16))
    monkeypatch.setattr(Rows, "whole", lambda rows: pytest.fail("copied whole"))
    monkeypatch.setattr(columns, "BLOCK_VALUES", 5000)
    monkeypatch.setattr("fastsel.selectors.rows.BLOCK_ROWS", 128)
    got = graph_walk(np.load(tmp_path / "x.npy", mmap_mode="r"), 60, target)[0].tolist()
    half = graph_walk(np.load(tmp_path / "half.npy", mmap_mode="r"), 60, target)[0].tolist()
    monkeypatch.undo()
    assert got == graph_walk(x, 60, target)[0].tolist()
    assert half == graph_walk(x.astype(np.float16).astype(np.float32), 60, target)[0].tolist()


def test_edges_all_rows_copies_and_zeros():
    x, target = data(2, 40, 6, 9, 0.5)
    assert sorted(graph_walk(x, 99, target)[0].tolist()) == list(range(40))
    assert graph_walk(x, 0, target)[0].tolist() == [] and graph_walk(x[:0], 3, target)[0].tolist() == []
    assert graph_walk(x[:1], 3, target)[0].tolist() == [0]
    component = [[1.0, 0.0, 0.0]]
    assert graph_walk(np.ones((7, 3)), 7, components=component)[0].tolist() == list(range(7))
    indices, gains = graph_walk(np.zeros((4, 3)), 4, components=component)
    assert indices.tolist() == [0, 1, 2, 3] and gains.tolist() == [0, 0, 0, 0]
    # Copies of a pick are its nearest rows; rows across from it come on a walk of their own.
    x = np.repeat(np.array([[1.0, 0.2], [-1.0, 0.1]]), 3, axis=0)
    assert walked(x, 6, components=[[1.0, 0.0]]).walk.tolist() == [0, 0, 0, 1, 1, 1]


def test_edges_a_cosine_of_zero_is_no_conflict():
    """In float32 these rows are at cosines of about 1e-9 of either sign: (a) must not depend on them."""
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((40, 40)))[0]
    found = walked(basis, 40, components=basis[:1] + 0.1, consistency=0.0)
    assert found.walk.tolist() == [0] * 40


def test_edges_a_conflict_that_float32_cannot_see():
    """Cosines of 1e-9 of either sign with the first pick: a row below 0 starts a walk of its own."""
    x = np.array([[1, 0, 0], [-1e-9, 1, 0], [1e-9, 0, 1]])
    assert assert_is_naive(x, 3, x[:1], [1.0], consistency=0.0).walk.tolist() == [0, 0, 1]


def test_edges_rows_that_float32_cannot_tell_apart():
    """More of them than are decided at a time, their cosines with the first pick 1e-10 apart and in no order."""
    generator = np.random.default_rng(0)
    x = np.zeros((151, 151))
    x[:, 0] = 1
    x[np.arange(1, 151), np.arange(1, 151)] = 0.01 * (1 + 1e-6 * generator.permutation(150))
    assert_is_naive(x, 20, x[:1], [1.0])


def test_weights_share_out_the_rows():
    x, components = data(2, 100, 12, 3, 0.5)
    found = walked(x, 10, components=components, weights=[5, 0, 2])
    assert np.bincount(found.component).tolist() == [7, 0, 3]
    assert np.bincount(walked(x, 11, components=components).component).tolist() == [4, 4, 3]


def test_it_says_how_much_it_read(caplog):
    x, target = data(0, 500, 32, 12, 1.0)
    with caplog.at_level(logging.INFO, "fastsel"):
        graph_walk(x, 100, target)
    (record,) = [r for r in caplog.records if r.msg.startswith("graph_walk")]
    k, n, q, n_walks, n_passes = record.args
    assert (k, n) == (100, 500) and q >= 1 and n_walks >= q and n_passes <= 101


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": -1}, "k=-1 must not be negative"),
        ({"rule": "paper"}, "rule must be one of restart, official, got 'paper'"),
        ({"sign": "svd"}, "sign must be one of target, sklearn, got 'svd'"),
        ({"variance": 1.0}, "variance must be a share above 0 and below 1, got 1.0"),
        ({"consistency": -0.1}, "consistency must be a number of at least 0, got -0.1"),
        ({"target": None}, "give target= or components=, and not both"),
        ({"components": np.ones((1, 4))}, "give target= or components=, and not both"),
        ({"weights": [1.0]}, "weights= belongs to components="),
        ({"target": None, "components": np.ones((1, 4)), "sign": "target"}, "sign= belongs to target="),
        ({"target": None, "components": np.ones((1, 4)), "weights": [0.0]}, "weights must not all be 0"),
        ({"target": None, "components": np.ones((2, 4)), "weights": [1.0]}, r"weights must be \[2\]"),
        ({"target": np.ones((3, 5))}, "target has 5 columns, the rows have 4"),
        ({"target": np.full((3, 4), 0.1)}, "the 3 target rows do not differ"),
        ({"target": np.zeros((0, 4))}, "the 0 target rows do not differ"),
        ({"target": np.full((2, 4), np.nan)}, "target: row 0 holds NaN or infinity"),
        ({"initial": [9]}, "initial: there is no row 9, the matrix has 6"),
        ({"x": np.array([[0.0, 1, 2, 3], [0, np.inf, 0, 0]])}, "x: row 1 holds NaN or infinity"),
    ],
)
def test_refuses(options, message):
    given_options = {"x": np.eye(6, 4), "k": 2, "target": np.eye(3, 4), **options}
    with pytest.raises(UsageError, match=message):
        graph_walk(given_options.pop("x"), given_options.pop("k"), given_options.pop("target"), **given_options)
