import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsel.kernels._runtime import native
from fastsel.kernels._runtime.dispatch import NoImplementationError
from fastsel.kernels._runtime.testing import assert_as_exact
from fastsel.kernels.novelty import novelty, similarity_columns, torch_blocked
from fastsel.kernels.novelty.cases import CASES, Case, make_inputs

NEEDS_LIBRARY = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))
BOTH = [pytest.param("native", marks=NEEDS_LIBRARY), "torch"]
ALL = [*BOTH, "reference"]
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
RANKINGS = ["weighted", "distance", "order"]
# 300 rows are two blocks of the native code, 230 picks three groups with a tail.
LAW = Case("law", 300, 230, 20, "several blocks, tiles and groups, all with tails", s=2)


def in_float64(inputs):
    return tuple(x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs)


def call(inputs, implementation, rank_by=None):
    *tensors, ranking = inputs
    return novelty(*tensors, rank_by=rank_by or ranking, implementation=implementation)


def assert_matches(got, inputs, rank_by=None):
    truth, plain = call(in_float64(inputs), "reference", rank_by), call(inputs, "reference", rank_by)
    assert_as_exact(got, truth, plain, reduction_length=inputs[0].shape[1] + inputs[1].shape[0])


def matches():
    for name in ("native", "torch"):
        for case in CASES.values():
            for dtype in ["float32"] if case.slow else DTYPES:
                if (name, dtype) != ("native", "float64"):
                    marks = [NEEDS_LIBRARY] * (name == "native") + [pytest.mark.slow] * case.slow
                    yield pytest.param(name, case, DTYPES[dtype], id=f"{name}-{case.name}-{dtype}", marks=marks)


@pytest.mark.parametrize(("implementation", "case", "dtype"), list(matches()))
def test_matches_reference(implementation, case, dtype):
    inputs = make_inputs(case, dtype, "cpu")
    got = call(inputs, implementation)
    assert got.shape == (case.n, case.s)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_matches(got, inputs)


@pytest.mark.parametrize("implementation", BOTH)
@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(0, 70), t=st.integers(0, 120), d=st.integers(1, 40), s=st.integers(1, 3),
    rank_by=st.sampled_from(RANKINGS), densities=st.sampled_from(["row", "pick", "both", "none"]),
    alpha=st.sampled_from([0.0, 0.5, 1.0, 2.0]), seed=st.integers(0, 99),
)  # fmt: skip
def test_law_any_shape_and_options(implementation, n, t, d, s, rank_by, densities, alpha, seed):
    inputs = make_inputs(Case("drawn", n, t, d, "", rank_by, densities, alpha, s), torch.float32, "cpu", seed)
    truth = call(in_float64(inputs), "reference")
    # Distances that differ by less than a rounding may change places under "distance", values then do by up to 1.
    tolerance = 2e-3 if rank_by == "distance" else 3e-5
    torch.testing.assert_close(call(inputs, implementation).double(), truth, rtol=tolerance, atol=tolerance)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(0, 999), st.sampled_from([0.0, 0.5, 1.0, 3.0]), st.integers(0, 30))
def test_law_no_order_of_the_picks_gives_less_than_sorting_by_value(t, seed, alpha, more):
    """And so the score against more picks is at most the earlier score plus the append bound of the new ones."""
    rows, picks, weights, p, q, _ = make_inputs(
        Case("bound", 20, t + more, 8, "", alpha=alpha), torch.float64, "cpu", seed
    )
    before = novelty(rows, picks[:t], weights[:t], p, q[:t])
    after = novelty(rows, picks, weights, p, q)
    appended = novelty(rows, picks[t:], weights[t:], p, q[t:], rank_by="order")
    assert (after <= before + appended + 1e-9).all()
    assert (after <= novelty(rows, picks, weights, p, q, rank_by="order") + 1e-9).all()


@pytest.mark.parametrize("implementation", BOTH)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), rank_by=st.sampled_from(["weighted", "distance"]))
def test_law_permuting_the_picks_changes_nothing(implementation, seed, rank_by):
    rows, picks, weights, p, q, _ = make_inputs(LAW, torch.float32, "cpu", seed)
    order = torch.randperm(LAW.t, generator=torch.Generator().manual_seed(seed))
    a = call((rows, picks, weights, p, q, rank_by), implementation)
    b = call((rows, picks[order], weights, p, q[order], rank_by), implementation)
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@NEEDS_LIBRARY
@pytest.mark.parametrize("rank_by", RANKINGS)
@settings(max_examples=15, deadline=None)
@given(rows=st.lists(st.integers(0, LAW.n - 1), min_size=1, max_size=70), seed=st.integers(0, 99))
def test_law_a_rows_bits_do_not_depend_on_the_batch(rank_by, rows, seed):
    x, picks, weights, p, q, _ = make_inputs(LAW, torch.float32, "cpu", seed)
    whole = call((x, picks, weights, p, q, rank_by), "native")
    assert torch.equal(call((x[rows], picks, weights, p[rows], q, rank_by), "native"), whole[rows])


@NEEDS_LIBRARY
@pytest.mark.parametrize("rank_by", RANKINGS)
@pytest.mark.parametrize("threads", [2, 3, 7])
def test_law_the_number_of_threads_changes_no_bit(threads, rank_by):
    inputs = make_inputs(LAW, torch.float32, "cpu")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = call(inputs, "native", rank_by)
        torch.set_num_threads(threads)
        assert torch.equal(call(inputs, "native", rank_by), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("rank_by", RANKINGS)
@pytest.mark.parametrize("implementation", BOTH)
def test_law_sets_of_weights_share_one_sorting_and_nothing_else(implementation, rank_by):
    rows, picks, weights, p, q, _ = make_inputs(LAW, torch.float32, "cpu")
    together = call((rows, picks, weights, p, q, rank_by), implementation)
    for i in range(LAW.s):
        alone = call((rows, picks, weights[:, i], p, q, rank_by), implementation)
        assert alone.shape == (LAW.n,)
        torch.testing.assert_close(alone, together[:, i], rtol=2e-7, atol=2e-7)


@pytest.mark.parametrize("rank_by", RANKINGS)
def test_law_blocks_change_nothing(rank_by, monkeypatch):
    inputs = make_inputs(LAW, torch.float32, "cpu")
    whole = call(inputs, "torch", rank_by)
    monkeypatch.setattr(torch_blocked, "VALUES", 7 * LAW.t)
    monkeypatch.setattr(torch_blocked, "ORDER_ROWS", 11)
    torch.testing.assert_close(call(inputs, "torch", rank_by), whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("implementation", ALL)
def test_edges_hand_worked(implementation):
    """One row (1, 0); picks (0, 1), (1, 0), (0.6, 0.8) at distances 1, 0, 0.4; weights 1, 1/2, 1/3.

    Densities: row 1; picks 1, 3, 4, so c = 2, 4, 5 and A = 2, 0, 2. By A: 0, 2, 2 -> 0 + 2/2 + 2/3 = 5/3.
    The picks' densities alone: A = 1, 0, 1.6; by distance 0, 1.6, 1 -> 0.8 + 1/3; by A 0, 1, 1.6 -> 0.5 + 1.6/3;
    in order 1, 0, 1.6 -> 1 + 1.6/3.
    """
    rows, picks = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.6, 0.8]])
    weights = 1 / torch.arange(1, 4, dtype=torch.float64)
    p, q = torch.tensor([1.0], dtype=torch.float64), torch.tensor([1.0, 3.0, 4.0], dtype=torch.float64)
    options = {"implementation": implementation}
    assert novelty(rows, picks, weights, p, q, **options).item() == pytest.approx(5 / 3, abs=1e-6)
    for rank_by, expected in {"distance": 0.8 + 1 / 3, "weighted": 0.5 + 1.6 / 3, "order": 1 + 1.6 / 3}.items():
        got = novelty(rows, picks, weights, None, q, rank_by=rank_by, **options)
        assert got.item() == pytest.approx(expected, abs=1e-6), rank_by
    assert novelty(rows, picks, weights, p, **options).item() == pytest.approx(0.4 / 2 + 1 / 3, abs=1e-6)


@pytest.mark.parametrize("implementation", ALL)
def test_edges_equal_distances_go_by_value(implementation):
    """All picks are one point: under "distance" the lighter pick is the nearer one, whatever their order."""
    rows, picks = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]).repeat(3, 1)
    weights = torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64)
    for densities in ([3.0, 1.0, 2.0], [1.0, 2.0, 3.0], [2.0, 3.0, 1.0]):
        q = torch.tensor(densities, dtype=torch.float64)
        got = novelty(rows, picks, weights, None, q, rank_by="distance", implementation=implementation)
        assert got.item() == 4 * 1 + 2 * 2 + 1 * 3


@pytest.mark.parametrize("t", [1, 23, 24, 25, 26, 255, 256, 257, 700])
@NEEDS_LIBRARY
def test_edges_sorting_of_every_length_and_of_numbers_of_both_signs(t):
    """Rows of no particular length give distances below 0 and of many magnitudes; many are equal."""
    generator = torch.Generator().manual_seed(t)
    rows, picks = torch.randn(5, 6, generator=generator), torch.randn(t, 6, generator=generator)
    picks[::3] = picks[0].clone()
    picks[1::5] *= 1e-20
    weights = torch.arange(t, 0, -1, dtype=torch.float64)
    for rank_by in ("weighted", "distance"):
        inputs = (rows, picks, weights, None, None, rank_by)
        assert_matches(call(inputs, "native"), inputs)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("rank_by", RANKINGS)
@pytest.mark.parametrize("implementation", ALL)
def test_edges_a_row_that_is_not_finite_spoils_itself_alone(implementation, rank_by, value):
    inputs = make_inputs(LAW, torch.float32, "cpu")
    clean = call(inputs, implementation, rank_by)
    inputs[0][17, 3] = value
    got = call(inputs, implementation, rank_by)
    assert not torch.isfinite(got[17]).any()
    others = [i for i in range(LAW.n) if i != 17]
    torch.testing.assert_close(got[others], clean[others], rtol=0, atol=0 if implementation == "native" else 1e-6)


@pytest.mark.parametrize("rank_by", RANKINGS)
@pytest.mark.parametrize("implementation", BOTH)
def test_edges_strides(implementation, rank_by):
    rows, picks, weights, p, q, _ = make_inputs(LAW, torch.float32, "cpu")
    expected = call((rows, picks, weights, p, q, rank_by), implementation)
    wide = torch.zeros(2 * LAW.t, 2 * LAW.d)[::2, ::2].copy_(picks)
    wide_q = torch.zeros(2 * LAW.t, dtype=torch.float64)[::2].copy_(q)
    tall = weights.T.contiguous().T
    got = call((rows.T.contiguous().T, wide, tall, p, wide_q, rank_by), implementation)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------ columns of products


@pytest.mark.parametrize("c", [1, 2, 3, 5, 6, 7, 12, 13, 64])
@pytest.mark.parametrize(("n", "d"), [(1, 1), (3, 15), (4, 16), (41, 129), (1030, 384)])
@pytest.mark.parametrize("is_native", [pytest.param(True, marks=NEEDS_LIBRARY), False])
def test_columns_match_the_product(n, d, c, is_native, monkeypatch):
    """Every number of vectors in a last group, rows and features that fill no tile."""
    if not is_native:
        monkeypatch.setattr(native, "unavailable", lambda: "switched off")
    generator = torch.Generator().manual_seed(c)
    rows, vectors = (torch.randn(m, d, generator=generator) for m in (n, c))
    truth = vectors.double() @ rows.double().T
    got = similarity_columns(rows, vectors)
    assert got.is_contiguous()
    assert_as_exact(got, truth, (rows @ vectors.T).T, reduction_length=d)


@NEEDS_LIBRARY
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_law_a_product_in_a_column_depends_on_its_row_and_vector_only(threads):
    generator = torch.Generator().manual_seed(0)
    rows, vectors = torch.randn(137, 45, generator=generator), torch.randn(17, 45, generator=generator)
    expected = similarity_columns(rows, vectors)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(similarity_columns(rows, vectors), expected)
        assert torch.equal(similarity_columns(rows[5:131], vectors[3:]), expected[3:, 5:131])
        assert torch.equal(similarity_columns(rows, vectors[16:]), expected[16:])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("is_native", [pytest.param(True, marks=NEEDS_LIBRARY), False])
def test_edges_columns(is_native, monkeypatch):
    if not is_native:
        monkeypatch.setattr(native, "unavailable", lambda: "switched off")
    rows, vectors = torch.arange(6.0).reshape(3, 2), torch.tensor([[1.0, 0.0], [0.5, 2.0]])
    assert similarity_columns(rows, vectors).tolist() == [[0, 2, 4], [2, 7, 12]]
    assert similarity_columns(rows.T.contiguous().T, vectors.T.contiguous().T).tolist() == [[0, 2, 4], [2, 7, 12]]
    assert similarity_columns(rows[:0], vectors).shape == (2, 0)
    assert similarity_columns(rows, vectors[:0]).shape == (0, 3)
    rows[1, 0] = math.nan
    got = similarity_columns(rows, vectors)
    assert torch.isnan(got[:, 1]).all() and got[:, [0, 2]].tolist() == [[0, 4], [2, 12]]
    with pytest.raises(ValueError, match="rows must be float32"):
        similarity_columns(rows.double(), vectors)
    with pytest.raises(ValueError, match=r"vectors must have shape \[c, 2\]"):
        similarity_columns(rows, vectors[:, :1])


def test_refuses_what_does_not_match():
    rows, picks, weights, p, q, _ = make_inputs(CASES["tiny"], torch.float32, "cpu")
    for arguments, message in [
        ((rows[0], picks, weights), r"rows must have shape \[n, d\]"),
        ((rows, picks[:, 1:], weights), r"picks must have shape \[t, 7\]"),
        ((rows, picks.double(), weights), "picks must be float32"),
        ((rows, picks, weights[1:]), r"weights must have shape \[5, s\]"),
        ((rows, picks, weights.float()), "weights must be float64"),
        ((rows, picks, weights, p[1:]), r"row_density must have shape \[3\]"),
        ((rows, picks, weights, p, q.float()), "pick_density must be float64"),
        ((rows[:, :0], picks[:, :0], weights), "at least one column"),
    ]:
        with pytest.raises(ValueError, match=message):
            novelty(*arguments)
    with pytest.raises(ValueError, match="rank_by must be one of weighted, distance, order, got 'value'"):
        novelty(rows, picks, weights, rank_by="value")


def test_refuses_what_the_named_implementation_cannot_take():
    rows, picks, weights, *_ = make_inputs(CASES["tiny"], torch.float64, "cpu")
    with pytest.raises(NoImplementationError, match="native: takes float32, bfloat16 and float16, got float64"):
        novelty(rows, picks, weights, implementation="native")


@NEEDS_LIBRARY
@pytest.mark.parametrize("isa", ["plain", "avx2"])
def test_lesser_instruction_sets_agree(isa):
    if not native.INSTRUCTION_SETS[isa] <= native._cpu_flags():
        pytest.skip(f"this processor has no {isa}")
    code = """
import torch
from fastsel.kernels.novelty import novelty
from fastsel.kernels.novelty.cases import Case, make_inputs
for rank_by in ("weighted", "distance", "order"):
    *inputs, _ = make_inputs(Case("isa", 70, 200, 50, ""), torch.float32, "cpu")
    truth = novelty(*(x.double() for x in inputs), rank_by=rank_by, implementation="reference")
    got = novelty(*inputs, rank_by=rank_by, implementation="native")
    assert (got - truth).abs().max() < 2e-5, rank_by
"""
    environment = {"FASTSEL_ISA": isa, "PYTHONSAFEPATH": "1", "PATH": ""}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=120)
