import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsel.kernels._runtime import native
from fastsel.kernels._runtime.dispatch import NoImplementationError
from fastsel.kernels._runtime.testing import assert_as_exact
from fastsel.kernels.facility_location import (
    PackedCandidates,
    cpu_native,
    facility_location,
    pack_candidates,
    similarity_rows,
)
from fastsel.kernels.facility_location.cases import CASES, Case, make_inputs

NEEDS_LIBRARY = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))
BOTH = [pytest.param("native", marks=NEEDS_LIBRARY), "torch"]
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}


def in_float64(inputs):
    return tuple(x.double() if isinstance(x, torch.Tensor) else x for x in inputs)


def call(inputs, implementation):
    candidates, points, best, raised, weights, similarity, gamma = inputs
    return facility_location(
        candidates, points, best, raised=raised, weights=weights, similarity=similarity, gamma=gamma,
        implementation=implementation,
    )  # fmt: skip


def assert_matches(got, inputs):
    truth, plain = call(in_float64(inputs), "reference"), call(inputs, "reference")
    assert got.dtype == torch.float64
    assert_as_exact(got, truth, plain, reduction_length=max(inputs[0].shape[1], len(inputs[1])))


def matches():
    """Every implementation, case and dtype; the large cases in float32 only."""
    for name in ("native", "torch"):
        for case in CASES.values():
            for dtype in ["float32"] if case.slow or case.n * case.m > 10**6 else DTYPES:
                if (name, dtype) != ("native", "float64"):
                    marks = [NEEDS_LIBRARY] * (name == "native") + [pytest.mark.slow] * case.slow
                    yield pytest.param(name, case, DTYPES[dtype], id=f"{name}-{case.name}-{dtype}", marks=marks)


@pytest.mark.parametrize(("implementation", "case", "dtype"), list(matches()))
def test_matches_reference(implementation, case, dtype):
    inputs = make_inputs(case, dtype, "cpu")
    assert_matches(call(inputs, implementation), inputs)


LAW = Case("law", n=210, m=1100, d=24, why="several groups and blocks, all with tails", weights=True)


@pytest.mark.parametrize("implementation", BOTH)
@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(0, 130), m=st.integers(0, 130), d=st.integers(1, 40),
    best=st.sampled_from(["floor", "none", "chosen"]), raised=st.booleans(), weights=st.booleans(),
    itself=st.booleans(), seed=st.integers(0, 99), similarity=st.sampled_from(["dot", "rbf", "exp_distance"]),
)  # fmt: skip
def test_law_any_shape_and_options(implementation, n, m, d, best, raised, weights, itself, similarity, seed):
    case = Case("drawn", n, n if itself else m, d, "", best, raised, weights, similarity, 0.8, itself)
    inputs = make_inputs(case, torch.float32, "cpu", seed)
    # The distance of a row to itself is the root of a rounding error.
    tolerance = 1e-3 if similarity == "exp_distance" and itself else 2e-5
    truth = call(in_float64(inputs), "reference")
    torch.testing.assert_close(call(inputs, implementation), truth, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("implementation", BOTH)
@pytest.mark.parametrize("best", ["chosen", "none"])
def test_law_gains_minus_what_a_pick_takes_are_the_gains_after_it(implementation, best):
    inputs = make_inputs(LAW._replace(best=best, raised=True), torch.float32, "cpu")
    candidates, points, before, raised, weights, *rest = inputs
    first = call((candidates, points, before, None, weights, *rest), implementation)
    after = call((candidates, points, raised, None, weights, *rest), implementation)
    torch.testing.assert_close(first - call(inputs, implementation), after, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("implementation", BOTH)
def test_law_points_that_did_not_move_count_for_nothing(implementation):
    """Exactly: what is 0 must not drift."""
    candidates, points, best, _, weights, *rest = make_inputs(LAW, torch.float32, "cpu")
    assert (call((candidates, points, best, best, weights, *rest), implementation) == 0).all()
    above = torch.full_like(best, 2.0)
    assert (call((candidates, points, above, None, weights, *rest), implementation) == 0).all()


@NEEDS_LIBRARY
@pytest.mark.parametrize("case", ["odd_raised", "itself", "itself_weighted"])
def test_law_packing_and_threads_change_no_bit(case):
    case = CASES[case]._replace(n=700, m=700) if CASES[case].itself else LAW._replace(raised=True)
    inputs = make_inputs(case, torch.float32, "cpu")
    expected, before = call(inputs, "native"), torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(call(inputs, "native"), expected)
            packed = pack_candidates(inputs[0])
            assert isinstance(packed, PackedCandidates)
            assert torch.equal(call((packed, *inputs[1:]), "native"), expected)
    finally:
        torch.set_num_threads(before)


@NEEDS_LIBRARY
@pytest.mark.skipif(native.instruction_set() != "avx512vnni", reason="nothing is rounded to bytes here")
@pytest.mark.parametrize("case", ["tiny", "odd", "odd_raised", "wide", "no_floor", "itself_weighted", "no_points"])
def test_law_bytes_come_as_close_as_their_rounding(case):
    """Each row rounded to 127 steps of its largest number: the same gains as from rows rounded so beforehand."""

    def rounded(x):
        scale = x.float().abs().amax(1, keepdim=True) / 127
        return torch.trunc(x / scale + 0.5 * x.sign()) * scale

    inputs = make_inputs(CASES[case], torch.float32, "cpu")
    candidates, points, *rest = inputs
    packed = pack_candidates(candidates, in_bytes=True)
    got = call((packed, points, *rest), "native")
    expected = call((rounded(candidates).double(), rounded(points).double(), *in_float64(tuple(rest))), "reference")
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5)
    with pytest.raises(NoImplementationError, match="packed in bytes with similarity 'dot' only, got 'rbf'"):
        call((packed, points, *rest[:3], "rbf", 1.0), "native")


@NEEDS_LIBRARY
def test_law_slabs_and_few_places_change_nothing(monkeypatch):
    inputs = make_inputs(LAW, torch.float32, "cpu")
    expected = call(inputs, "native")
    monkeypatch.setattr(cpu_native, "SLAB_BYTES", 4 * 24 * 96)
    assert torch.equal(call(inputs, "native"), expected)


@NEEDS_LIBRARY
@pytest.mark.parametrize("similarity", ["dot", "rbf", "exp_distance"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_similarity_rows_in_float64(dtype, similarity, monkeypatch):
    """Both forms against the formulas; a row's bits do not depend on its neighbours."""
    points = torch.randn(103, 37).to(dtype)
    points[5] = 0
    rows, lengths = points[:7].double(), torch.linalg.vector_norm(points.double(), dim=1)
    squared = (rows[:, None] - points.double()).square().sum(2)
    unit = torch.where(lengths > 0, (rows @ points.double().T) / lengths, 0.0)
    truth = {"dot": unit, "rbf": (-0.1 * squared).exp(), "exp_distance": (-0.1 * squared.sqrt()).exp()}[similarity]
    options = {"similarity": similarity, "gamma": 0.1, "lengths": lengths if similarity == "dot" else None}
    got = similarity_rows(rows, points, **options)
    torch.testing.assert_close(got, truth, rtol=1e-13, atol=1e-13)
    assert torch.equal(similarity_rows(rows[3:4], points, **options), got[3:4])
    assert similarity_rows(rows[:0], points, **options).shape == (0, 103)
    monkeypatch.setattr(native, "unavailable", lambda: "taken away by the test")
    torch.testing.assert_close(similarity_rows(rows, points, **options), truth, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("implementation", BOTH)
def test_edges_strides(implementation):
    inputs = make_inputs(LAW, torch.float32, "cpu")
    candidates, points = inputs[0].T.contiguous().T, torch.randn(1100, 50)[:, ::2][:, :24]
    torch.testing.assert_close(
        call((candidates, points, *inputs[2:]), implementation),
        call((candidates.contiguous(), points.contiguous(), *inputs[2:]), implementation), rtol=1e-6, atol=1e-6,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"candidates": torch.zeros(33)}, r"candidates must have shape \[n, d\], got \[33\]"),
        ({"candidates": torch.zeros(3, 5, dtype=torch.int64)}, "candidates must be float32 .* got int64"),
        ({"candidates": torch.zeros(3, 0)}, "at least one column"),
        ({"points": torch.zeros(7, 4)}, r"points must have shape \[m, 5\], got \[7, 4\]"),
        ({"points": torch.zeros(7, 5, device="meta")}, "points must be on cpu, got meta"),
        ({"best": torch.zeros(6)}, r"best must have shape \[7\], got \[6\]"),
        ({"raised": torch.zeros(6)}, r"raised must have shape \[7\], got \[6\]"),
        ({"weights": torch.zeros(7, dtype=torch.float64)}, "weights must be float32, got float64"),
        ({"similarity": "cosine"}, "similarity must be one of dot, rbf, exp_distance; got 'cosine'"),
        ({"gamma": 0.0}, "gamma must be positive and finite, got 0.0"),
        ({"implementation": "cuda"}, "implementation='cuda' is not known here"),
    ],
    ids=str,
)
def test_refuses_wrong_inputs(changes, message):
    candidates, points, best, *_ = make_inputs(CASES["tiny"], torch.float32, "cpu")
    with pytest.raises(ValueError, match=message):
        facility_location(**({"candidates": candidates, "points": points, "best": best} | changes))


def test_refuses_in_native_what_it_cannot_compute():
    inputs = make_inputs(CASES["tiny"], torch.float64, "cpu")
    assert cpu_native.unsupported(*inputs) == "takes float32, bfloat16 and float16, got float64"
    assert pack_candidates(inputs[0]) is inputs[0]
    on_meta = tuple(x.to("meta") if isinstance(x, torch.Tensor) else x for x in inputs)
    assert cpu_native.unsupported(*on_meta) == "runs on the CPU, the tensors are on meta"


@NEEDS_LIBRARY
def test_refuses_packed_candidates_in_torch():
    candidates, points, best, *_ = make_inputs(CASES["tiny"], torch.float32, "cpu")
    with pytest.raises(ValueError, match="implementation='torch' is not known here; it is one of: auto, native"):
        facility_location(pack_candidates(candidates), points, best, implementation="torch")
