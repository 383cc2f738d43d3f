"""silu(gate) * up and its gradient, against the formulas in float64 and against autograd."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsel.kernels._runtime import native
from fastsel.kernels._runtime.dispatch import NoImplementationError
from fastsel.kernels._runtime.testing import assert_as_exact
from fastsel.kernels.swiglu import reference, swiglu, swiglu_gradient, torch_blocked
from fastsel.kernels.swiglu.cases import CASES, Case, make_inputs

NEEDS_LIBRARY = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))
BOTH = [pytest.param("native", marks=NEEDS_LIBRARY), "torch"]
ALL = [*BOTH, "reference"]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def found(gate, up, d_out, out=None, *, implementation):
    """[the output], or both gradients."""
    if d_out is None:
        return [swiglu(gate, up, implementation=implementation)]
    return list(swiglu_gradient(gate, up, d_out, out=out, implementation=implementation))


def drawn(t, f, gradient=True, dtype=torch.float32, seed=0):
    return make_inputs(Case("drawn", t, f, gradient, ""), dtype, "cpu", seed)[:3]


def assert_exact(got, inputs):
    widened = [None if x is None else x.double() for x in inputs]
    truth, plain = reference.compute(*widened, None), reference.compute(*inputs, None)
    if inputs[2] is None:
        truth, plain = [truth], [plain]
    for ours, exact, same in zip(got, truth, plain, strict=True):
        assert ours.dtype == inputs[0].dtype
        assert_as_exact(ours, exact, same, reduction_length=1)


def matches():
    for name in ("native", "torch"):
        for case in CASES.values():
            for dtype in DTYPES[:1] if name == "native" else DTYPES:
                marks = [NEEDS_LIBRARY] * (name == "native") + [pytest.mark.slow] * case.slow
                yield pytest.param(name, case, dtype, id=f"{name}-{case.name}-{dtype}", marks=marks)


@pytest.mark.parametrize(("implementation", "case", "dtype"), list(matches()))
def test_matches_reference(implementation, case, dtype):
    inputs = make_inputs(case, dtype, "cpu")[:3]
    assert_exact(found(*inputs, implementation=implementation), inputs)


@pytest.mark.parametrize("implementation", ALL)
def test_worked_example(implementation):
    """sigmoid(ln 3) = 3/4, sigmoid(0) = 1/2: outputs ln 3 * 3/4 * 8 and 0; d_up the same without the 8, times d_out.

    d_gate: 2 * 8 * 3/4 * (1 + ln 3 / 4) and 3 * 4 * 1/2 * (1 + 0).
    """
    dtype = torch.float32 if implementation == "native" else torch.float64
    log = torch.log(torch.tensor(3.0, dtype=dtype))
    gate, up, d_out = torch.tensor([[[log, 0]], [[8, 4]], [[2, 3]]], dtype=dtype)
    expected = torch.tensor([[[6 * log, 0]], [[12 + 3 * log, 6]], [[1.5 * log, 0]]], dtype=dtype)
    got = [x for d in (None, d_out) for x in found(gate, up, d, implementation=implementation)]
    torch.testing.assert_close(torch.stack(got), expected, rtol=3e-7 if dtype == torch.float32 else 1e-15, atol=0)


@pytest.mark.parametrize("implementation", ["torch", "reference"])
@settings(max_examples=25, deadline=None)
@given(t=st.integers(0, 30), f=st.integers(0, 30), size=st.sampled_from([0.1, 3.0, 50.0]), seed=st.integers(0, 99))
def test_law_the_gradient_is_autograds(implementation, t, f, size, seed):
    gate, up, d_out = drawn(t, f, dtype=torch.float64, seed=seed)
    gate = (size * gate).requires_grad_()
    up = up.requires_grad_()
    out = F.silu(gate) * up
    expected = torch.autograd.grad(out, (gate, up), d_out)
    got = found(gate, up, d_out, implementation=implementation)
    assert not any(x.requires_grad for x in got)
    torch.testing.assert_close(got, list(expected), rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(swiglu(gate, up, implementation=implementation), out.detach(), rtol=1e-13, atol=1e-14)


def strided(x, layout):
    """x with other strides."""
    if layout == "columns":
        return x.T.contiguous().T
    if layout == "half":  # of what one product with both matrices gives
        return torch.cat([torch.full_like(x, torch.nan), x], 1)[:, x.shape[1] :]
    if layout == "every_second":
        return torch.stack([torch.full_like(x, torch.nan), x], 2)[..., 1]
    return x


@pytest.mark.parametrize("implementation", ALL)
@settings(max_examples=40, deadline=None)
@given(
    t=st.integers(0, 40), f=st.integers(0, 70), seed=st.integers(0, 99), gradient=st.booleans(),
    dtype=st.sampled_from(DTYPES), at_once=st.sampled_from([1, 100, 1 << 19]),
    layouts=st.tuples(*[st.sampled_from(["plain", "columns", "half", "every_second"])] * 3),
)  # fmt: skip
def test_law_any_shape_and_strides(implementation, t, f, seed, gradient, dtype, at_once, layouts):
    dtype = torch.float32 if implementation == "native" else dtype
    inputs = drawn(t, f, gradient, dtype, seed)
    other = [None if x is None else strided(x, layout) for x, layout in zip(inputs, layouts, strict=True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_blocked, "BLOCK_ELEMENTS", at_once)
        got = found(*other, implementation=implementation)
    assert all(x.is_contiguous() for x in got)
    assert_exact(got, inputs)


@pytest.mark.parametrize("implementation", BOTH)
@settings(max_examples=20, deadline=None)
@given(t=st.integers(1, 40), f=st.integers(1, 70), seed=st.integers(0, 99), data=st.data())
def test_law_an_elements_bits_do_not_depend_on_its_place(implementation, t, f, seed, data):
    """Torch's own vector code rounds its tails otherwise: it is held to rounding only."""
    inputs = drawn(t, f, seed=seed)
    first = data.draw(st.integers(0, t - 1))
    whole = found(*inputs, implementation=implementation)
    part = found(*(x[first:] for x in inputs), implementation=implementation)
    for a, b in zip(whole, part, strict=True):
        if implementation == "native":
            assert torch.equal(a[first:], b)
        else:
            torch.testing.assert_close(a[first:], b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", ["torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_law_results_of_16_bits_are_rounded_once(implementation, dtype):
    gate, up, d_out = drawn(40, 300, dtype=dtype)
    for d in (None, d_out):
        truth = found(gate.double(), up.double(), d if d is None else d.double(), implementation="reference")
        for ours, exact in zip(found(gate, up, d, implementation=implementation), truth, strict=True):
            half_unit = torch.finfo(dtype).eps / 2 * exact.abs()
            assert ((ours.double() - exact).abs() <= 1.01 * half_unit + 1e-5).all()


@NEEDS_LIBRARY
@pytest.mark.parametrize("gradient", [False, True])
def test_law_the_number_of_threads_changes_no_bit(gradient):
    from fastsel.kernels.swiglu import cpu_native

    inputs = drawn(301, 1001, gradient)
    assert inputs[0].numel() // cpu_native.ELEMENTS_OF_THREAD >= 7
    expected = found(*inputs, implementation="native")
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            assert all(map(torch.equal, found(*inputs, implementation="native"), expected))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_law_results_may_lie_where_inputs_lie(implementation, dtype, monkeypatch):
    if implementation == "native" and dtype != torch.float32:
        pytest.skip("native takes float32")
    monkeypatch.setattr(torch_blocked, "BLOCK_ELEMENTS", 500)
    inputs = drawn(9, 133, dtype=dtype)
    apart = found(
        *inputs, out=(torch.empty_like(inputs[0]), torch.empty_like(inputs[0])), implementation=implementation
    )
    assert_exact(apart, inputs)
    for first in range(3):
        for second in {0, 1, 2} - {first}:
            copies = [x.clone() for x in inputs]
            got = found(*copies, out=(copies[first], copies[second]), implementation=implementation)
            assert got[0] is copies[first] and got[1] is copies[second]
            assert torch.equal(got[0], apart[0]) and torch.equal(got[1], apart[1])
            (rest,) = {0, 1, 2} - {first, second}
            assert torch.equal(copies[rest], inputs[rest])


@pytest.mark.parametrize("implementation", ALL)
def test_edges_the_largest_gates(implementation):
    """The sigmoid is 0 or 1: outputs are 0 or gate * up, gradients 0 or d_out * up and d_out * gate; no NaN."""
    largest = torch.finfo(torch.float32).max
    gate = torch.tensor([[-largest, -1e4, -104.0, 104.0, 1e4, largest, 0.0, -0.0]])
    up, d_out = torch.full_like(gate, 0.5), torch.full_like(gate, 2.0)
    (out,) = found(gate, up, None, implementation=implementation)
    d_gate, d_up = found(gate, up, d_out, implementation=implementation)
    open_gate = gate > 0
    assert torch.equal(out[open_gate], (0.5 * gate)[open_gate])
    assert torch.equal(d_gate[open_gate], torch.ones(3))
    for x in (out, d_gate, d_up):
        assert (x[:, :3].abs() < 1e-30).all() and torch.isfinite(x[:, :5]).all()
    assert d_gate[0, 6:].tolist() == [0.5, 0.5] and out[0, 6:].tolist() == [0, 0] == d_up[0, 6:].tolist()


@NEEDS_LIBRARY
@pytest.mark.parametrize("isa", ["plain", "avx2"])
def test_lesser_instruction_sets_agree(isa):
    if not native.INSTRUCTION_SETS[isa] <= native._cpu_flags():
        pytest.skip(f"this processor has no {isa}")
    code = """
import torch
from fastsel.kernels.swiglu import reference, swiglu, swiglu_gradient
generator = torch.Generator().manual_seed(0)
for t, f in ((1, 3), (37, 29)):
    gate, up, d_out = (3 * torch.randn(t, f, generator=generator) for _ in range(3))
    exact = [x.double() for x in (gate, up, d_out)]
    truth = reference.compute(*exact[:2], None, None), *reference.compute(*exact, None)
    got = swiglu(gate, up, implementation="native"), *swiglu_gradient(gate, up, d_out, implementation="native")
    for a, b in zip(got, truth, strict=True):
        assert (a - b).abs().max() < 1e-6 * b.abs().max()
"""
    environment = {"FASTSEL_ISA": isa, "PYTHONSAFEPATH": "1", "PATH": ""}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=120)


X = torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"gate": torch.zeros(3)}, r"gate must have shape \[t, f\], got \[3\]"),
        ({"gate": X.int()}, "gate must be float32 | bfloat16 | float16 | float64, got int32"),
        ({"up": X.T}, r"up must have shape \[3, 4\], got \[4, 3\]"),
        ({"up": X.double()}, "up must be float32, got float64"),
        ({"up": X.to("meta")}, "up must be on cpu, got meta"),
        ({"d_out": X[:2]}, r"d_out must have shape \[3, 4\], got \[2, 4\]"),
        ({"d_out": X.bfloat16()}, "d_out must be float32, got bfloat16"),
        ({"out": (X.clone(), X[:1])}, r"out\[1\] must have shape \[3, 4\], got \[1, 4\]"),
        ({"out": (X.half(), X.clone())}, r"out\[0\] must be float32, got float16"),
        ({"out": (X.clone(), torch.zeros(4, 3).T)}, r"out\[1\] must be contiguous, got strides \(1, 3\)"),
        ({"out": (X, X)}, "out must be two tensors of memory of their own"),
        ({"implementation": "cuda"}, "is not known here"),
    ],
)
def test_refuses(changed, message):
    with pytest.raises(ValueError, match=message):
        swiglu_gradient(**({"gate": X, "up": X, "d_out": X} | changed))
    if not changed.keys() & {"d_out", "out"}:
        with pytest.raises(ValueError, match=message):
            swiglu(**({"gate": X, "up": X} | changed))


@NEEDS_LIBRARY
def test_refuses_other_dtypes_in_the_compiled_library_by_name():
    with pytest.raises(NoImplementationError, match="takes float32, got bfloat16"):
        swiglu(X.bfloat16(), X.bfloat16(), implementation="native")
    assert torch.equal(swiglu(X.bfloat16(), X.bfloat16()), X.bfloat16())
