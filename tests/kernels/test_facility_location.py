import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsel.kernels._runtime import native
from fastsel.kernels._runtime.dispatch import NoImplementationError
from fastsel.kernels._runtime.testing import assert_as_exact
from fastsel.kernels.facility_location import (
    PackedCandidates,
    Shortlists,
    cpu_native,
    facility_location,
    pack_candidates,
    similarities_above,
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
    truth = call(in_float64(inputs), "reference")
    allowed = 2e-5 * (1 + truth.abs())
    if similarity == "exp_distance" and n and m:
        allowed += rounded_distances(*in_float64(inputs)[:2]) * max(1.0, 0.0 if inputs[4] is None else inputs[4].max())
    assert ((call(inputs, implementation) - truth).abs() <= allowed).all()


def rounded_distances(candidates, points):
    """What distances err by in float32, [n], summed over the points: that of rows near each other is the root of what
    rounding left of |a|^2 + |b|^2 - 2 a.b.
    """
    squares = candidates.square().sum(1)[:, None] + points.square().sum(1)
    error = 4 * 2.0**-23 * squares
    return (error / torch.cdist(candidates, points).clamp(min=1e-300).maximum(error.sqrt())).sum(1)


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


def dense(pairs, m):
    """[b, m] with what pairs hold, NaN elsewhere."""
    b = len(pairs.starts) - 1
    row = torch.repeat_interleave(torch.arange(b), pairs.starts.diff())
    values = torch.full((b, m), torch.nan, dtype=torch.float64)
    values[row, pairs.points.long()] = pairs.similarities
    return values


@NEEDS_LIBRARY
@settings(max_examples=40, deadline=None)
@given(
    b=st.integers(0, 70), m=st.integers(1, 300), d=st.integers(1, 70), in_bytes=st.booleans(), unit=st.booleans(),
    dtype=st.sampled_from(list(DTYPES.values())), level=st.sampled_from([-torch.inf, -0.5, 0.0, 0.4]),
    scale=st.sampled_from([1e-30, 1.0, 1e12]), seed=st.integers(0, 99),
)  # fmt: skip
def test_law_no_pair_above_best_is_left_out(b, m, d, in_bytes, unit, dtype, level, scale, seed):
    """Whatever is rounded away: lengths that differ, one feature far above the rest, points that are zero."""
    generator = torch.Generator().manual_seed(seed)
    scale = 1.0 if dtype == torch.float16 else scale
    points = torch.randn(m, d, generator=generator) * torch.rand(m, 1, generator=generator) * scale
    points[:, 0] *= 50
    points[m // 2] = 0
    points = points.to(dtype)
    rows = torch.randn(b, d, generator=generator, dtype=torch.float64)
    rows = torch.nn.functional.normalize(rows, dim=1) if unit else rows * 3
    lengths = torch.linalg.vector_norm(points.double(), dim=1)
    read = points.double() / lengths.where(lengths > 0, 1.0)[:, None] if unit else points
    packed = pack_candidates(read.float(), in_bytes=in_bytes)
    options = {"lengths": lengths if unit else None}
    truth = similarity_rows(rows, points, **options)
    # Half of the points have a best similarity that some row equals, or just exceeds.
    best = torch.full((m,), level * (1.0 if unit else scale), dtype=torch.float64)
    if b:
        best[::2] = truth[seed % b, ::2] * (1 - 1e-7)
    got = similarities_above(rows, points, best, packed=packed, **options)
    values = dense(got, m)
    assert not (values.isnan() & (truth > best + 1e-12 * truth.abs())).any()
    torch.testing.assert_close(torch.where(values.isnan(), truth, values), truth, rtol=1e-11, atol=1e-11 * scale)
    for i in range(b):
        points_of_row = got.points[got.starts[i] : got.starts[i + 1]]
        assert (points_of_row.diff() > 0).all()
    without = dense(similarities_above(rows, points, best, **options), m)
    assert torch.equal(without.isnan(), ~(truth > best))


@NEEDS_LIBRARY
def test_law_few_pairs_are_made_and_threads_and_other_rows_change_no_bit():
    inputs = make_inputs(CASES["update"]._replace(n=900, m=900, itself=True), torch.float32, "cpu")
    points = inputs[0]
    rows, best = points[:40].double(), similarity_rows(points[100:200].double(), points).amax(0)
    before = torch.get_num_threads()
    try:
        for in_bytes in (False, True):
            packed, found = pack_candidates(points, in_bytes=in_bytes), []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found.append(similarities_above(rows, points, best, packed=packed))
            assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
            needed = int((similarity_rows(rows, points) > best).sum())
            assert needed <= len(found[0].points) <= 3 * needed
            alone = similarities_above(rows[7:8], points, best, packed=packed)
            over = slice(int(found[0].starts[7]), int(found[0].starts[8]))
            assert torch.equal(alone.points, found[0].points[over])
            assert torch.equal(alone.similarities, found[0].similarities[over])
    finally:
        torch.set_num_threads(before)


@NEEDS_LIBRARY
@pytest.mark.parametrize("in_bytes", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("most_bytes", [1 << 20, 1500])
def test_law_shortlists_take_what_passing_the_points_would(in_bytes, weighted, most_bytes):
    """Ten picks: every point is passed at most until it has a list, and losses are those of the kernel."""
    n, m, d = 700, 333, 48
    generator = torch.Generator().manual_seed(1)
    rows = torch.nn.functional.normalize(torch.randn(n, d, generator=generator), dim=1)
    points = torch.nn.functional.normalize(torch.randn(m, d, generator=generator), dim=1)
    weights = torch.rand(m, generator=generator) if weighted else None
    packed = pack_candidates(rows, in_bytes=in_bytes)
    lists = Shortlists(packed, m, weights=weights, most_bytes=most_bytes)
    best = torch.zeros(m)
    gains = facility_location(packed, points, best, weights=weights)
    listed_before = 0
    for pick in range(12):
        raised = torch.maximum(best, points @ rows[50 * pick])
        moved = (raised > best).nonzero()[:, 0]
        is_listed = lists.sizes[moved] >= 0
        if is_listed.any():
            lists.take(gains, moved[is_listed], best[moved[is_listed]], raised[moved[is_listed]])
        others = moved[~is_listed]
        if len(others):
            gains -= lists.note(points[others], others, best[others], raised[others])
        best = raised
        expected = facility_location(packed, points, best, weights=weights)
        torch.testing.assert_close(gains, expected, rtol=1e-5, atol=1e-5)
        listed = int((lists.sizes >= 0).sum())
        assert listed >= listed_before
        listed_before = listed
    assert listed_before > (200 if most_bytes > 1500 else 0)
    assert int(lists.sizes.clamp(min=0).sum()) * 8 <= most_bytes


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
