import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsel.kernels._runtime import native
from fastsel.kernels._runtime.dispatch import NoImplementationError
from fastsel.kernels._runtime.testing import assert_as_exact
from fastsel.kernels.topk_similarity import topk_similarity
from fastsel.kernels.topk_similarity.api import IMPLEMENTATIONS
from fastsel.kernels.topk_similarity.cases import CASES, Case, make_inputs

NEEDS_LIBRARY = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))
BOTH = [*([pytest.param("native", marks=NEEDS_LIBRARY)] if "native" in IMPLEMENTATIONS else []), "torch"]
ALL = [*BOTH, "reference"]
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}


def call(inputs, implementation):
    queries, points, k, metric, exclude, minimum = inputs
    return topk_similarity(
        queries, points, k, metric=metric, exclude=exclude, minimum=minimum, implementation=implementation
    )


def widened(inputs):
    return (inputs[0].double(), inputs[1].double(), *inputs[2:])


def assert_matches(got, inputs):
    """Values and minimum against the reference in float64; the indices through the similarities that they stand for."""
    truth, plain = call(widened(inputs), "reference"), call(inputs, "reference")
    queries, points, k, metric, *_ = inputs
    length = queries.shape[1]
    assert got.indices.dtype == torch.int64 and got.values.dtype == truth.values.to(plain.values.dtype).dtype
    if len(queries):
        assert_as_exact(got.values, truth.values, plain.values, reduction_length=length, what="values")
        assert_as_exact(got.minimum, truth.minimum, plain.minimum, reduction_length=length, what="minimum")
    clear = _clear_of_ties(truth.values)
    assert torch.equal(got.indices[clear], truth.indices[clear])
    assert clear.float().mean() >= 0.9 if clear.numel() else True


def _clear_of_ties(values):
    """Places whose similarity differs from the one before and the one after by more than rounding."""
    gaps = torch.cat([values, values[:, -1:]], 1).diff(dim=1).abs()
    before = torch.cat([torch.full_like(gaps[:, :1], math.inf), gaps[:, :-1]], 1)
    gaps[:, -1:] = math.inf  # the one after the last is not known: a tie there shows in the value, not in the number
    return (gaps.nan_to_num(math.inf) > 1e-9) & (before.nan_to_num(math.inf) > 1e-9)


def matches():
    for name in ("native", "torch"):
        for case in CASES.values():
            for dtype in ["float32"] if case.slow else DTYPES:
                if name in IMPLEMENTATIONS and (name, dtype) != ("native", "float64"):
                    marks = [NEEDS_LIBRARY] * (name == "native") + [pytest.mark.slow] * case.slow
                    yield pytest.param(name, case, DTYPES[dtype], id=f"{name}-{case.name}-{dtype}", marks=marks)


@pytest.mark.parametrize(("implementation", "case", "dtype"), list(matches()))
def test_matches_reference(implementation, case, dtype):
    inputs = make_inputs(case, dtype, "cpu")
    if case.slow:  # the reference keeps all similarities, in float64
        inputs = (inputs[0][:200], inputs[1], *inputs[2:4], None if inputs[4] is None else inputs[4][:200], inputs[5])
    assert_matches(call(inputs, implementation), inputs)


@pytest.mark.parametrize("implementation", BOTH)
@settings(max_examples=40, deadline=None)
@given(
    b=st.integers(0, 70), n=st.integers(0, 300), d=st.integers(1, 40), k=st.integers(1, 40),
    metric=st.sampled_from(["dot", "sqeuclidean"]), excludes=st.booleans(), levels=st.sampled_from([2, 5]),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_law_whole_numbers_are_exact_and_ties_go_to_the_lowest_point(
    implementation, b, n, d, k, metric, excludes, levels, seed
):
    """Small whole numbers: every similarity is exact, and many are equal."""
    generator = torch.Generator().manual_seed(seed)
    queries, points = (torch.randint(0, levels, (rows, d), generator=generator).float() for rows in (b, n))
    exclude = torch.randint(-1, max(n, 1), (b,), generator=generator) if excludes else None
    inputs = (queries, points, k, metric, exclude, True)
    got, truth = call(inputs, implementation), call(widened(inputs), "reference")
    assert torch.equal(got.values.double(), truth.values.round())  # the reference squares a root
    if metric == "dot":  # the common centre of distances is no whole number: which of many equal ones enter is open
        assert torch.equal(got.indices, truth.indices)
    torch.testing.assert_close(got.minimum.double(), truth.minimum, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("metric", ["dot", "sqeuclidean"])
@pytest.mark.parametrize("implementation", BOTH)
def test_law_equal_rows_tie_to_the_bit(implementation, metric):
    """Every point stands there three times, far apart: the first copies come first, each before the next."""
    generator = torch.Generator().manual_seed(1)
    once, queries = torch.randn(700, 37, generator=generator), torch.randn(50, 37, generator=generator)
    got = call((queries, once.repeat(3, 1), 9, metric, None, True), implementation)
    alone = call((queries, once, 3, metric, None, True), implementation)
    expected = (alone.indices[:, :, None] + torch.tensor([0, 700, 1400])).flatten(1)
    assert torch.equal(got.indices, expected)
    assert torch.equal(got.values, alone.values.repeat_interleave(3, 1))


@pytest.mark.parametrize("implementation", BOTH)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999), metric=st.sampled_from(["dot", "sqeuclidean"]))
def test_law_permuting_the_points_permutes_the_indices(implementation, seed, metric):
    case = Case("law", 20, 400, 16, 7, "", metric)
    queries, points, *rest = make_inputs(case, torch.float32, "cpu", seed)
    order = torch.randperm(400, generator=torch.Generator().manual_seed(seed))
    plain, moved = (call((queries, x, *rest), implementation) for x in (points, points[order]))
    assert torch.equal(plain.values, moved.values)
    assert torch.equal(plain.indices, order[moved.indices])


@pytest.mark.parametrize("metric", ["dot", "sqeuclidean"])
@pytest.mark.parametrize("implementation", BOTH)
def test_law_parts_of_the_points_merge_to_the_whole(implementation, metric):
    queries, points, k, *_ = make_inputs(Case("law", 30, 900, 24, 6, "", metric), torch.float32, "cpu")
    whole = call((queries, points, k, metric, None, True), implementation)
    parts = [call((queries, part, k, metric, None, True), implementation) for part in points.split(250)]
    values = torch.cat([part.values for part in parts], 1)
    indices = torch.cat([part.indices + 250 * i for i, part in enumerate(parts)], 1)
    best, order = values.sort(dim=1, descending=metric == "dot", stable=True)
    assert torch.equal(best[:, :k], whole.values) and torch.equal(indices.gather(1, order[:, :k]), whole.indices)
    minima = torch.stack([part.minimum for part in parts])
    least = minima.amin(0) if metric == "dot" else minima.amax(0)
    torch.testing.assert_close(least, whole.minimum, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ALL)
def test_law_excluding_a_point_is_leaving_it_out(implementation):
    queries, points, k, metric, exclude, _ = make_inputs(CASES["itself"], torch.float32, "cpu")
    exclude[7] = -1
    got = call((queries, points, k, metric, exclude, False), implementation)
    for i in (0, 7, 40, 129):
        others = [j for j in range(len(points)) if j != exclude[i]]
        alone = call((queries[i : i + 1], points[others], k, metric, None, False), implementation)
        assert got.indices[i].tolist() == [others[j] for j in alone.indices[0]]
        torch.testing.assert_close(got.values[i], alone.values[0], rtol=0, atol=1e-6)
    assert got.minimum is None


@pytest.mark.parametrize("implementation", ALL)
def test_law_same_input_same_bits(implementation):
    inputs = make_inputs(CASES["odd_squared"], torch.float32, "cpu")
    first = call(inputs, implementation)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(call(inputs, implementation), first, strict=True))


@NEEDS_LIBRARY
@pytest.mark.parametrize("metric", ["dot", "sqeuclidean"])
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_law_neither_threads_nor_other_queries_change_a_bit(threads, metric):
    """One thread takes all points in one range, several split them; a part of the queries makes other blocks."""
    inputs = make_inputs(Case("law", 70, 3000, 20, 6, "", metric), torch.float32, "cpu")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = call(inputs, "native")
        torch.set_num_threads(threads)
        got, part = call(inputs, "native"), call((inputs[0][33:40], *inputs[1:]), "native")
    finally:
        torch.set_num_threads(before)
    for a, b, c in zip(got, expected, part, strict=True):
        assert torch.equal(a, b) and torch.equal(a[33:40], c)


@NEEDS_LIBRARY
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("metric", ["dot", "sqeuclidean"])
@pytest.mark.parametrize("kind", ["normal", "grid", "not finite"])
def test_law_a_search_of_points_among_themselves_is_any_other_search(kind, metric, threads):
    """Half of the products, the same bits. 1,037 points are 11 blocks at least, the last one short; grids have ties."""
    generator = torch.Generator().manual_seed(threads)
    points = torch.randn(1037, 5, generator=generator)
    if kind == "grid":
        points = torch.randint(-1, 2, (1037, 5), generator=generator).float()
    if kind == "not finite":
        points[500, 2], points[1036, 0], points[3, 1] = math.nan, math.inf, -math.inf
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for dtype in (torch.float32, torch.bfloat16):
            for exclude in (None, torch.arange(1037)):
                x = points.to(dtype)
                itself = call((x, x, 9, metric, exclude, False), "native")
                other = call((x, x.clone(), 9, metric, exclude, False), "native")
                assert torch.equal(itself.values, other.values)
                assert torch.equal(itself.indices, other.indices)
    finally:
        torch.set_num_threads(before)


@NEEDS_LIBRARY
@pytest.mark.parametrize(("n", "d", "k"), [(1000, 1, 1), (2500, 300, 11), (1152, 2050, 3), (1001, 8, 1200)])
def test_edges_points_among_themselves(n, d, k):
    """Whole blocks and short ones, long sums, more neighbours than points; rows that lie apart in memory."""
    wide = torch.randn(n, d + 3, generator=torch.Generator().manual_seed(n))
    x = wide[:, :d]
    for metric in ("dot", "sqeuclidean"):
        itself = call((x, x, k, metric, None, False), "native")
        other = call((x, x.clone(), k, metric, None, False), "native")
        assert torch.equal(itself.values, other.values) and torch.equal(itself.indices, other.indices)


@pytest.mark.parametrize("implementation", ALL)
def test_edges_hand_worked(implementation):
    """Points 0, 3, 4 on a line, query 1: distances squared 1, 4, 9; products 0, 3, 4."""
    points, query = torch.tensor([[0.0], [3.0], [4.0]]), torch.tensor([[1.0]])
    got = call((query, points, 2, "sqeuclidean", None, True), implementation)
    assert got.values.tolist() == [[1, 4]] and got.indices.tolist() == [[0, 1]] and got.minimum.tolist() == [9]
    got = call((query, points, 2, "dot", torch.tensor([2]), True), implementation)
    assert got.values.tolist() == [[3, 0]] and got.indices.tolist() == [[1, 0]] and got.minimum.tolist() == [0]


@pytest.mark.parametrize("implementation", ALL)
def test_edges_zero_rows_and_all_equal(implementation):
    got = call((torch.zeros(3, 4), torch.randn(9, 4), 4, "dot", None, True), implementation)
    assert got.indices.tolist() == [[0, 1, 2, 3]] * 3 and not got.values.any() and not got.minimum.any()
    got = call((torch.ones(2, 4), torch.ones(30, 4), 3, "sqeuclidean", torch.tensor([1, -1]), True), implementation)
    assert got.indices.tolist() == [[0, 2, 3], [0, 1, 2]] and not got.values.any() and not got.minimum.any()


@pytest.mark.parametrize("implementation", ALL)
def test_edges_fewer_points_than_neighbours(implementation):
    got = call((torch.ones(2, 3), torch.ones(1, 3), 2, "sqeuclidean", torch.tensor([0, -1]), True), implementation)
    assert got.indices.tolist() == [[-1, -1], [0, -1]]
    assert got.values.tolist() == [[math.inf, math.inf], [0, math.inf]]
    got = call((torch.ones(2, 3), torch.ones(0, 3), 1, "dot", None, True), implementation)
    assert got.values.tolist() == [[-math.inf]] * 2 and got.minimum.tolist() == [math.inf] * 2


@pytest.mark.parametrize("metric", ["dot", "sqeuclidean"])
@pytest.mark.parametrize("implementation", ALL)
def test_edges_a_point_with_nan_is_as_if_it_were_not_there(implementation, metric):
    queries, points, k, *_ = make_inputs(Case("nan", 20, 90, 8, 5, ""), torch.float32, "cpu")
    got = points.clone()
    got[[0, 41]] = math.nan
    kept = [j for j in range(90) if j not in (0, 41)]
    found = call((queries, got, k, metric, None, True), implementation)
    expected = call((queries, points[kept], k, metric, None, True), "reference")
    assert found.indices.tolist() == [[kept[j] for j in row] for row in expected.indices.tolist()]
    torch.testing.assert_close(found.minimum, expected.minimum, rtol=1e-5, atol=1e-5)
    queries[3, 1] = math.nan
    found = call((queries, points, k, metric, None, True), implementation)
    assert found.indices[3].tolist() == [-1] * k and found.indices[4].min() >= 0
    assert found.minimum[3] == (math.inf if metric == "dot" else -math.inf)


@pytest.mark.parametrize("implementation", ALL)
def test_edges_any_strides(implementation):
    queries, points, *rest = make_inputs(CASES["tiny"], torch.float32, "cpu")
    wide = torch.full((14, 10), math.nan)
    wide[::2, ::2] = points
    plain, strided = (
        call((q, p, *rest), implementation) for q, p in ((queries, points), (queries.T.contiguous().T, wide[::2, ::2]))
    )
    assert torch.equal(plain.indices, strided.indices)
    torch.testing.assert_close(plain.values, strided.values)


@pytest.mark.parametrize("implementation", BOTH)
def test_edges_a_large_common_mean_does_not_hide_the_distances(implementation):
    """Squared lengths of 43,000 and squared distances of 100: expanded without a centre, their error would be 0.01."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(900, 48, generator=generator) + 30
    inputs = (points[:40], points, 10, "sqeuclidean", torch.arange(40), True)
    assert_matches(call(inputs, implementation), inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": torch.zeros(3)}, "queries must have shape"),
        ({"points": torch.zeros(3, 5)}, r"points must have shape \[n, 4\], got \[3, 5\]"),
        ({"points": torch.zeros(3, 4, dtype=torch.float64)}, "points must be float32"),
        ({"queries": torch.zeros(2, 4, dtype=torch.int64)}, "queries must be float32"),
        ({"queries": torch.zeros(2, 0), "points": torch.zeros(3, 0)}, "at least one column"),
        ({"k": 0}, "k must be a whole number of at least 1, got 0"),
        ({"k": 2.0}, "k must be a whole number"),
        ({"metric": "cosine"}, "metric must be one of dot, sqeuclidean; got 'cosine'"),
        ({"exclude": torch.zeros(3, dtype=torch.int64)}, r"exclude must have shape \[2\]"),
        ({"exclude": torch.zeros(2)}, "exclude must be int64"),
        ({"implementation": "cuda"}, "implementation='cuda' is not known here"),
    ],
)
def test_refuses(change, message):
    inputs = {"queries": torch.zeros(2, 4), "points": torch.zeros(3, 4), "k": 2} | change
    with pytest.raises(ValueError, match=message):
        topk_similarity(**inputs)


def test_refuses_to_run_triton_on_a_cpu():
    with pytest.raises(NoImplementationError, match="triton: needs"):
        topk_similarity(torch.zeros(2, 4), torch.zeros(3, 4), 1, implementation="triton")
