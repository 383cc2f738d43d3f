import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsel.kernels._runtime import native
from fastsel.kernels._runtime.dispatch import NoImplementationError
from fastsel.kernels._runtime.testing import assert_as_exact
from fastsel.kernels.label_gain import LabelRows, label_gain
from fastsel.kernels.label_gain.cases import CASES, Case, make_inputs

NEEDS_LIBRARY = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))
BOTH = [pytest.param("native", marks=NEEDS_LIBRARY), "torch"]
ALL = [*BOTH, "reference"]
OPTIONS = ("rule", "phi", "a", "b", "alpha")
RULES = [(rule, phi) for rule in ("first_order", "exact") for phi in ("power", "exp")]
LAW = Case("law", n=200, n_labels=40, entries=5, why="labels that many rows share, rows without any")


def gains_of(inputs, implementation, **changed):
    label_rows, state, rows, *options = inputs
    options = dict(zip(OPTIONS, options, strict=True)) | changed
    return label_gain(label_rows, state, rows, **options, implementation=implementation)


def by_hand(label_rows, state, rows, rule, phi, a, b, alpha):
    """The formula, entry by entry, in Python's float64."""
    import math

    def information(x):
        return (x + a) ** b if phi == "power" else 1 - math.exp(-alpha * x)

    def slope(x):
        return b * (x + a) ** (b - 1) if phi == "power" else alpha * math.exp(-alpha * x)

    gains, x = [], state.tolist()
    for row in range(len(label_rows)) if rows is None else rows.tolist():
        first, stop = label_rows.indptr[row : row + 2].tolist()
        entries = list(
            zip(label_rows.indices[first:stop].tolist(), label_rows.values[first:stop].tolist(), strict=True)
        )
        if rule == "first_order":
            gains.append(sum(value * slope(x[label]) for label, value in entries))
        else:
            gains.append(sum(information(x[label] + value) - information(x[label]) for label, value in entries))
    return torch.tensor(gains, dtype=torch.float64)


def matches():
    for name in ("native", "torch"):
        for case in CASES.values():
            for dtype in (torch.float32, torch.float64, torch.bfloat16):
                # native refuses 16 bits
                if not case.slow and (name, dtype) != ("native", torch.bfloat16):
                    marks = [NEEDS_LIBRARY] * (name == "native")
                    yield pytest.param(name, case, dtype, id=f"{name}-{case.name}-{dtype}", marks=marks)


@pytest.mark.parametrize(("implementation", "case", "dtype"), list(matches()))
def test_matches_reference(implementation, case, dtype):
    inputs = make_inputs(case, dtype, "cpu")
    truth = gains_of(inputs, "reference")
    got = gains_of(inputs, implementation)
    assert got.dtype == torch.float64
    longest = int(inputs[0].indptr.diff().max()) if len(inputs[0]) else 1
    assert_as_exact(got, truth, truth, reduction_length=longest)


@pytest.mark.parametrize("implementation", ALL)
def test_worked_example(implementation):
    """phi(x) = (x + 1)^0.5, phi'(x) = 0.5 / (x + 1)^0.5; labels have received 0, 3 and 8.

    Row 0 brings 3 of label 0: first order 3 * 0.5 = 1.5, exact 2 - 1 = 1.
    Row 1 brings 12 of label 1 and 7 of label 2: 12 * 0.25 + 7 / 6 = 25 / 6; exact (4 - 2) + (4 - 3) = 3.  Row 2: 0.
    """
    label_rows = LabelRows(
        torch.tensor([0, 1, 3, 3]), torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([3.0, 12.0, 7.0]), 3
    )
    inputs = (label_rows, torch.tensor([0.0, 3.0, 8.0], dtype=torch.float64), None, "first_order", "power", 1, 0.5, 1)
    torch.testing.assert_close(
        gains_of(inputs, implementation), torch.tensor([1.5, 25 / 6, 0], dtype=torch.float64), rtol=1e-14, atol=0
    )
    torch.testing.assert_close(
        gains_of(inputs, implementation, rule="exact"),
        torch.tensor([1.0, 3.0, 0.0], dtype=torch.float64), rtol=1e-14, atol=1e-15,
    )  # fmt: skip
    chosen = gains_of((*inputs[:2], torch.tensor([1, 1, 0]), *inputs[3:]), implementation)
    assert chosen.tolist() == pytest.approx([25 / 6, 25 / 6, 1.5])


@pytest.mark.parametrize("implementation", ALL)
@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 40), n_labels=st.integers(1, 30), entries=st.floats(0, 9), rule=st.sampled_from(RULES),
    asked=st.none() | st.integers(0, 60), seed=st.integers(0, 99),
)  # fmt: skip
def test_law_any_shape_equals_the_formula(implementation, n, n_labels, entries, rule, asked, seed):
    inputs = make_inputs(Case("drawn", n, n_labels, entries, "", asked, *rule), torch.float64, "cpu", seed)
    torch.testing.assert_close(gains_of(inputs, implementation), by_hand(*inputs), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("implementation", BOTH)
@pytest.mark.parametrize(("rule", "phi"), RULES)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999))
def test_law_no_gain_rises_when_labels_receive_more(implementation, rule, phi, seed):
    """What makes a lazy greedy choice exact."""
    inputs = make_inputs(LAW, torch.float64, "cpu", seed)
    before = gains_of(inputs, implementation, rule=rule, phi=phi)
    more = torch.rand(LAW.n_labels, dtype=torch.float64) * (torch.rand(LAW.n_labels) < 0.3)
    after = gains_of((inputs[0], inputs[1] + more, *inputs[2:]), implementation, rule=rule, phi=phi)
    assert (after <= before * (1 + 1e-12) + 1e-12).all() and (after >= 0).all()
    assert (
        gains_of(inputs, implementation, rule="exact", phi=phi)
        <= gains_of(inputs, implementation, rule="first_order", phi=phi) * (1 + 1e-12) + 1e-12
    ).all()  # phi lies below its tangent


@pytest.mark.parametrize("implementation", BOTH)
@settings(max_examples=15, deadline=None)
@given(rows=st.lists(st.integers(0, LAW.n - 1), min_size=1, max_size=80), rule=st.sampled_from(RULES))
def test_law_a_rows_bits_do_not_depend_on_the_rows_beside_it(implementation, rows, rule):
    """Few rows are evaluated without a table of all labels, all rows with one; torch's pow is held to rounding only."""
    inputs = make_inputs(LAW, torch.float64, "cpu")
    changed = dict(zip(("rule", "phi"), rule, strict=True))
    whole = gains_of(inputs, implementation, **changed)
    part = gains_of((*inputs[:2], torch.tensor(rows), *inputs[3:]), implementation, **changed)
    if implementation == "torch":
        torch.testing.assert_close(part, whole[rows], rtol=1e-11, atol=1e-12)
    else:
        assert torch.equal(part, whole[rows])


@NEEDS_LIBRARY
@pytest.mark.parametrize("rule", ["first_order", "exact"])
def test_law_the_number_of_threads_changes_no_bit(rule):
    inputs = make_inputs(CASES["pool"], torch.float64, "cpu")
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(gains_of(inputs, "native", rule=rule))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("implementation", ALL)
def test_edges_slices_and_int32_offsets_beyond_the_first_block(implementation, monkeypatch):
    from fastsel.kernels.label_gain import torch_blocked

    monkeypatch.setattr(torch_blocked, "BLOCK_ROWS", 7)
    label_rows, state, _, *options = make_inputs(LAW, torch.float32, "cpu")
    wide_state, wide_rows = torch.zeros(2 * LAW.n_labels, dtype=torch.float64), torch.arange(100)
    wide_state[::2] = state
    sliced = (label_rows, wide_state[::2], wide_rows[::3], *options)
    torch.testing.assert_close(
        gains_of(sliced, implementation), by_hand(label_rows, state, wide_rows[::3], *options), rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(
        gains_of((label_rows, state, None, *options), implementation),
        by_hand(label_rows, state, None, *options), rtol=1e-12, atol=1e-12,
    )  # fmt: skip


def rows_of(indptr, indices, values, n_labels=3):
    return LabelRows(torch.tensor(indptr), torch.tensor(indices, dtype=torch.int32), torch.tensor(values), n_labels)


@pytest.mark.parametrize(
    ("indptr", "indices", "values", "message"),
    [
        ([1, 2], [0], [1.0], "begin with 0 and end with 1"),
        ([0, 2], [0], [1.0], "begin with 0 and end with 1"),
        ([0, 1, 0, 1], [0], [1.0], "never fall"),
        ([0, 1, 2], [0, 3], [1.0, 1.0], "row 1 has the label 3; there are 3"),
        ([0, 1, 2], [0, -1], [1.0, 1.0], "row 1 has the label -1"),
        ([0, 1, 1, 2], [0, 1], [1.0, -0.5], "row 2 holds -0.5"),
        ([0, 1, 2], [0, 1], [1.0, float("nan")], "row 1 holds nan"),
        ([0, 1, 2], [0, 1], [float("inf"), 1.0], "row 0 holds inf"),
        ([0, 1, 3], [2, 1, 1], [1.0, 1.0, 1.0], "labels of row 1 must rise, each once"),
        ([0, 1, 3], [2, 1, 0], [1.0, 1.0, 1.0], "labels of row 1 must rise"),
    ],
)
def test_refuses_rows_that_break_a_rule(indptr, indices, values, message, monkeypatch):
    from fastsel.kernels.label_gain import label_rows

    for at_once in (1, 2, 1000):  # an error is found whichever part of the entries it lies in
        monkeypatch.setattr(label_rows, "CHECKED_AT_ONCE", at_once)
        with pytest.raises(ValueError, match=message):
            rows_of(indptr, indices, values)
        assert len(rows_of([0, 2, 2, 3], [0, 2, 0], [1.0, 2.0, 3.0])) == 3


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rule": "second_order"}, "rule must be first_order or exact"),
        ({"phi": "log"}, "phi must be power or exp"),
        ({"a": 0.0}, "a and alpha must be positive"),
        ({"b": 1.5}, "b above 0 and at most 1"),
        ({"alpha": float("nan")}, "must be positive"),
        ({"state": torch.zeros(2, dtype=torch.float64)}, r"state must have shape \[3\], got \[2\]"),
        ({"state": torch.zeros(3)}, "state must be float64, got float32"),
        ({"rows": torch.tensor([0, 2])}, "rows must lie between 0 and 1, got 0 to 2"),
        ({"rows": torch.tensor([-1])}, "got -1 to -1"),
        ({"rows": torch.tensor([0], dtype=torch.int32)}, "rows must be int64"),
        ({"label_rows": 3}, "label_rows must be LabelRows, got int"),
    ],
)
def test_refuses(changed, message):
    given = {"label_rows": rows_of([0, 1, 1], [2], [1.0]), "state": torch.zeros(3, dtype=torch.float64)} | changed
    with pytest.raises(ValueError, match=message):
        label_gain(**given)


@NEEDS_LIBRARY
def test_refuses_16_bit_values_in_the_compiled_library_by_name():
    inputs = make_inputs(CASES["tiny"], torch.bfloat16, "cpu")
    with pytest.raises(NoImplementationError, match="takes float32 and float64 values, got bfloat16"):
        gains_of(inputs, "native")
    assert torch.equal(gains_of(inputs, "auto"), gains_of(inputs, "torch"))
