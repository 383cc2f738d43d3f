import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsel.kernels._runtime import native
from fastsel.kernels._runtime.dispatch import NoImplementationError
from fastsel.kernels._runtime.testing import assert_as_exact
from fastsel.kernels.k_center import FARTHEST_BLOCK, cpu_native, k_center
from fastsel.kernels.k_center.cases import CASES, Case, make_inputs

NEEDS_LIBRARY = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))
BOTH = [pytest.param("native", marks=NEEDS_LIBRARY), "torch"]
ALL = [*BOTH, "reference"]
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
# 300 points are three blocks, the last with a tail; 31 centres are three tiles with a tail.
LAW = Case("law", n=300, d=20, b=31, why="several blocks and tiles, all with tails")


def call(inputs, implementation):
    points, centres, nearest, rows, point_sqnorms, centre_sqnorms = inputs
    return k_center(
        points, centres, nearest, rows=rows, point_sqnorms=point_sqnorms, centre_sqnorms=centre_sqnorms,
        implementation=implementation,
    )  # fmt: skip


def in_float64(inputs):
    return tuple(x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs)


def assert_matches(got, inputs):
    truth, plain = call(in_float64(inputs), "reference"), call(inputs, "reference")
    assert_as_exact(got.nearest, truth.nearest, plain.nearest, reduction_length=inputs[0].shape[1], what="nearest")
    assert got.farthest.dtype == torch.int64
    assert_farthest(got)


def assert_farthest(got):
    """By the values that came with it: the first of the largest in each block."""
    values = got.nearest.numpy()
    starts = range(0, len(values), FARTHEST_BLOCK)
    assert got.farthest.tolist() == [start + int(values[start : start + FARTHEST_BLOCK].argmax()) for start in starts]


def matches():
    for name in ("native", "torch"):
        for case in CASES.values():
            for dtype in ["float32"] if case.slow else DTYPES:
                if (name, dtype) != ("native", "float64"):  # native refuses float64
                    marks = [NEEDS_LIBRARY] * (name == "native") + [pytest.mark.slow] * case.slow
                    yield pytest.param(name, case, DTYPES[dtype], id=f"{name}-{case.name}-{dtype}", marks=marks)


@pytest.mark.parametrize(("implementation", "case", "dtype"), list(matches()))
def test_matches_reference(implementation, case, dtype):
    inputs = make_inputs(case, dtype, "cpu")
    assert_matches(call(inputs, implementation), inputs)


@pytest.mark.parametrize("implementation", ALL)
def test_matches_distances_of_a_plain_loop(implementation):
    """Not through the formula: differences of rows in float64, one pair after the other."""
    points, centres, nearest, rows, *_ = make_inputs(CASES["odd"], torch.float32, "cpu")
    expected = [
        min(float(nearest[i]), min(float(((p.double() - c.double()) ** 2).sum()) for c in centres))
        for i, p in enumerate(points)
    ]
    got = k_center(points, centres, nearest, implementation=implementation)
    np.testing.assert_allclose(got.nearest.numpy(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("implementation", BOTH)
@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(0, 300), d=st.integers(1, 40), b=st.integers(1, 60), named=st.booleans(), begun=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_law_any_shape_and_options(implementation, n, d, b, named, begun, seed):
    inputs = make_inputs(Case("drawn", n, d, b, "", n // 2 if named else None, begun), torch.float32, "cpu", seed)
    assert_matches(call(inputs, implementation), inputs)


@pytest.mark.parametrize("implementation", ALL)
def test_law_blocks_of_centres_one_after_the_other_are_all_at_once(implementation):
    points, centres, nearest, _, point_sqnorms, centre_sqnorms = make_inputs(LAW, torch.float32, "cpu")
    whole = call((points, centres, nearest, None, point_sqnorms, centre_sqnorms), implementation)
    for start in range(0, LAW.b, 12):
        part = slice(start, start + 12)
        nearest = call((points, centres[part], nearest, None, point_sqnorms, centre_sqnorms[part]), implementation)[0]
    torch.testing.assert_close(nearest, whole.nearest, rtol=0, atol=1e-6)
    if implementation == "native":
        assert torch.equal(nearest, whole.nearest)


@pytest.mark.parametrize("implementation", ALL)
def test_law_rows_are_those_rows(implementation):
    points, centres, nearest, _, *sqnorms = make_inputs(LAW, torch.float32, "cpu")
    whole = call((points, centres, nearest, None, *sqnorms), implementation)
    for rows in (torch.tensor([299, 0, 5, 5]), torch.randperm(300)[:200], torch.arange(300)):
        part = call((points, centres, nearest[rows], rows, *sqnorms), implementation)
        torch.testing.assert_close(part.nearest, whole.nearest[rows], rtol=0, atol=1e-6)
        assert_farthest(part)
        if implementation == "native":
            assert torch.equal(part.nearest, whole.nearest[rows])


@pytest.mark.parametrize("implementation", ALL)
def test_law_an_order_of_centres_changes_nothing_but_the_last_bits(implementation):
    points, centres, nearest, _, point_sqnorms, centre_sqnorms = make_inputs(LAW, torch.float32, "cpu")
    order = torch.randperm(LAW.b)
    a = call((points, centres, nearest, None, point_sqnorms, centre_sqnorms), implementation)
    b = call((points, centres[order], nearest, None, point_sqnorms, centre_sqnorms[order]), implementation)
    torch.testing.assert_close(a.nearest, b.nearest, rtol=0, atol=1e-6)


@NEEDS_LIBRARY
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_law_the_number_of_threads_changes_no_bit(threads):
    inputs = make_inputs(CASES["some_rows"], torch.float32, "cpu")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = call(inputs, "native")
        torch.set_num_threads(threads)
        got = call(inputs, "native")
    finally:
        torch.set_num_threads(before)
    assert torch.equal(got.nearest, expected.nearest) and torch.equal(got.farthest, expected.farthest)


@pytest.mark.parametrize("implementation", ALL)
def test_edges_hand_worked(implementation):
    """On a line, points 0, 1, 4, 9 and centres 1, 8: squares min(1, 64), 0, min(9, 16), min(64, 1); 0.5 was there."""
    points = torch.tensor([[0.0], [1.0], [4.0], [9.0]])
    nearest = torch.tensor([0.5, 3.0, 100.0, 100.0])
    got = k_center(points, torch.tensor([[1.0], [8.0]]), nearest, implementation=implementation)
    assert got.nearest.tolist() == [0.5, 0.0, 9.0, 1.0]
    assert got.farthest.tolist() == [2]
    assert nearest.tolist() == [0.5, 3.0, 100.0, 100.0]  # not written to


@pytest.mark.parametrize("implementation", ALL)
def test_edges_given_lengths_make_rows_of_zeros_orthogonal(implementation):
    """Unit rows and lengths of 1: half a square is 1 - cos, and 1 for a row of zeros, from both sides."""
    points = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.6, 0.8]])
    for centre, expected in ((points[:1], [0.0, 1.0, 0.4]), (points[1:2], [1.0, 1.0, 1.0])):
        got = k_center(
            points, centre, point_sqnorms=torch.ones(3), centre_sqnorms=torch.ones(1), implementation=implementation
        )
        np.testing.assert_allclose(got.nearest.numpy() / 2, expected, atol=1e-6)


@pytest.mark.parametrize("implementation", ALL)
def test_edges_copies_are_near_zero_and_never_negative(implementation):
    points = torch.randn(200, 33) * 100
    got = k_center(points, points[::2].clone(), implementation=implementation).nearest
    assert (got >= 0).all()
    assert (got[::2] <= 1e-5 * points.square().sum(1)[::2]).all()


@pytest.mark.parametrize("implementation", ALL)
def test_edges_ties_take_the_lowest_index(implementation):
    points = torch.zeros(300, 4)
    points[[7, 100, 130, 131, 299]] = 1.0
    got = k_center(points, torch.zeros(1, 4), implementation=implementation)
    assert got.farthest.tolist() == [7, 130, 299]
    assert k_center(torch.ones(260, 4), torch.ones(2, 4), implementation=implementation).farthest.tolist() == [
        0,
        128,
        256,
    ]


@pytest.mark.parametrize("implementation", ALL)
def test_edges_any_strides(implementation):
    points, centres, nearest, _, *sqnorms = make_inputs(LAW, torch.float32, "cpu")
    expected = call((points, centres, nearest, None, *sqnorms), implementation).nearest
    wide = torch.randn(600, 40)[::2, ::2].copy_(points)
    turned = centres.T.contiguous().T
    spread = torch.randn(600)[::2].copy_(nearest)
    assert not any(x.is_contiguous() for x in (wide, turned, spread))
    got = call((wide, turned, spread, None, *sqnorms), implementation).nearest
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"points": torch.ones(3)}, "points must have shape"),
        ({"points": torch.ones(3, 2, dtype=torch.int64)}, "points must be float32"),
        ({"centres": torch.ones(2, 3)}, r"centres must have shape \[b, 2\], got \[2, 3\]"),
        ({"centres": torch.ones(2, 2, dtype=torch.float64)}, "centres must be float32, got float64"),
        ({"centres": torch.ones(0, 2)}, "centres must have at least one row"),
        ({"nearest": torch.ones(4)}, r"nearest must have shape \[3\], got \[4\]"),
        ({"nearest": torch.ones(3, dtype=torch.float64)}, "nearest must be float32"),
        ({"rows": torch.tensor([0, 3])}, "rows must be 0 to 2, got 0 to 3"),
        ({"rows": torch.tensor([-1, 2])}, "rows must be 0 to 2, got -1 to 2"),
        ({"point_sqnorms": torch.ones(2)}, r"point_sqnorms must have shape \[3\]"),
        ({"centre_sqnorms": torch.ones(3)}, r"centre_sqnorms must have shape \[2\]"),
        ({"implementation": "cuda"}, "implementation='cuda' is not known"),
    ],
)
def test_refuses_what_does_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        k_center(**{"points": torch.ones(3, 2), "centres": torch.ones(2, 2), **change})


def test_refuses_float64_in_native_code_and_takes_it_in_torch():
    points = torch.randn(9, 4, dtype=torch.float64)
    with pytest.raises(NoImplementationError, match=r"native: takes float32, bfloat16 and float16, got float64"):
        k_center(points, points[:2], implementation="native")
    assert k_center(points, points[:2]).nearest.dtype == torch.float64


@NEEDS_LIBRARY
def test_auto_runs_the_compiled_library(caplog):
    with caplog.at_level("DEBUG", logger="fastsel.kernels"):
        k_center(torch.ones(3, 2), torch.ones(2, 2))
    assert caplog.messages == [cpu_native.__name__]


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ALL)
def test_edges_rows_beyond_two_to_the_31(implementation, tmp_path):
    far = 2**30  # elements between rows: row 2 begins at 2^31
    storage = torch.from_file(str(tmp_path / "sparse"), shared=True, size=2 * far + 16, dtype=torch.float32)
    points = storage.as_strided((3, 16), (far, 1))
    points.copy_(torch.randn(3, 16))
    got = k_center(points, points[:1], implementation=implementation)
    expected = k_center(points.contiguous(), points[:1].contiguous(), implementation=implementation)
    torch.testing.assert_close(got.nearest, expected.nearest)
