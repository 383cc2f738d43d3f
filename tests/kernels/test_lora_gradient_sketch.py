import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsel.kernels._runtime import native
from fastsel.kernels._runtime.dispatch import NoImplementationError
from fastsel.kernels._runtime.testing import assert_as_exact
from fastsel.kernels.lora_gradient_sketch import AdamStep, lora_gradient_sketch, torch_blocked
from fastsel.kernels.lora_gradient_sketch.cases import CASES, STEPS, Case, make_inputs
from fastsel.kernels.random_projection import random_projection

NEEDS_LIBRARY = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))
BOTH = [pytest.param("native", marks=NEEDS_LIBRARY), "torch"]
ALL = [*BOTH, "reference"]
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
LAW = Case("law", (3, 50, 1, 17, 290, 40, 2, 8, 11), 150, 70, 9, "tails everywhere", s=5, k=97)


NAMES = ("x", "delta", "lora_a", "lora_b", "offsets", "scale", "adam", "sign", "targets", "sketch", "out")


def call(inputs, implementation, **changed):
    given = dict(zip(NAMES, inputs, strict=True)) | changed
    return lora_gradient_sketch(**given, implementation=implementation)


def assert_close(got, expected, tolerance=1e-5):
    """Every result within a share of its largest number."""
    for ours, same in zip(got, expected, strict=True):
        largest = max(1.0, same.abs().max().item()) if same is not None and same.numel() else 1.0
        torch.testing.assert_close(ours, same, rtol=0, atol=tolerance * largest, check_dtype=False)


def in_float64(inputs):
    return tuple(x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs)


def assert_matches(got, inputs, **changed):
    truth, plain = call(in_float64(inputs), "reference", **changed), call(inputs, "reference", **changed)
    working = torch.float64 if inputs[0].dtype == torch.float64 else torch.float32
    n_terms = len(inputs[0]) + inputs[2].numel() + inputs[3].numel()
    for name in ("dots", "sqnorms", "sketch"):
        ours, exact, same_dtype = (getattr(result, name) for result in (got, truth, plain))
        assert (ours is None) == (exact is None)
        if ours is not None:
            assert ours.dtype == (working if name == "sketch" else torch.float64)
            # What went into the sums of doubles was of the working dtype: so is the tolerance.
            assert_as_exact(ours, exact, same_dtype.to(working), reduction_length=n_terms, what=name)


def matches():
    for name in ("native", "torch"):
        for case in CASES.values():
            for dtype in ["float32"] if case.slow else DTYPES:
                if (name, dtype) == ("native", "float64"):
                    continue
                marks = [NEEDS_LIBRARY] * (name == "native") + [pytest.mark.slow] * case.slow
                yield pytest.param(name, case, DTYPES[dtype], id=f"{name}-{case.name}-{dtype}", marks=marks)


@pytest.mark.parametrize(("implementation", "case", "dtype"), list(matches()))
def test_matches_reference(implementation, case, dtype):
    inputs = make_inputs(case, dtype, "cpu")
    got = call(inputs, implementation)
    assert got.sqnorms.shape == (len(case.lengths),)
    assert got.dots is None or got.dots.shape == (len(case.lengths), case.s)
    assert got.sketch is None or got.sketch.shape == (len(case.lengths), case.k)
    assert_matches(got, inputs)


def test_matches_reference_for_rademacher():
    """What torch alone computes; "auto" comes to it where the library refuses."""
    for dtype in DTYPES.values():
        inputs = make_inputs(LAW._replace(kind="rademacher"), dtype, "cpu")
        assert_matches(call(inputs, "torch"), inputs)
        assert torch.equal(call(inputs, "auto").sketch, call(inputs, "torch").sketch)
    with pytest.raises(NoImplementationError, match="native: sketches by SJLT, got rademacher"):
        call(make_inputs(LAW._replace(kind="rademacher"), torch.float32, "cpu"), "native")


@pytest.mark.parametrize("step", STEPS)
def test_the_reference_is_the_gradient_that_autograd_gives(step):
    """Each example alone through y = scale B A x in float64, and the step written out coordinate by coordinate."""
    inputs = make_inputs(LAW._replace(step=step), torch.float64, "cpu")
    x, delta, lora_a, lora_b, offsets, scale, adam, sign, targets, sketch, _ = inputs
    got = call(inputs, "reference")
    for i in range(len(LAW.lengths)):
        tokens = slice(int(offsets[i]), int(offsets[i + 1]))
        a, b = lora_a.clone().requires_grad_(), lora_b.clone().requires_grad_()
        (scale * (x[tokens] @ a.T) @ b.T * delta[tokens]).sum().backward()
        gamma = []
        for c, g in enumerate(torch.cat([a.grad.flatten(), b.grad.flatten()]).tolist()):
            if step in ("sgd", "sign"):
                gamma.append(g if step == "sgd" else math.copysign(1.0, g))
                continue
            m, v = adam.exp_avg[c].item(), adam.exp_avg_sq[c].item()
            m = (0.9 * m + (1 - 0.9) * g) / adam.correction1 if step != "bergson" else g
            v = (0.999 * v + (1 - 0.999) * g * g) / adam.correction2 if step not in ("bergson", "frozen") else v
            eps = adam.eps
            gamma.append(m / (math.sqrt(v + eps) if step in ("less", "frozen", "no_eps") else math.sqrt(v) + eps))
        gamma = torch.tensor(gamma, dtype=torch.float64)
        torch.testing.assert_close(got.dots[i], targets @ gamma, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(got.sqnorms[i], gamma @ gamma, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("implementation", BOTH)
@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), max_size=12), d_in=st.integers(1, 90), d_out=st.integers(1, 90),
    r=st.integers(1, 20), step=st.sampled_from(list(STEPS)), s=st.integers(0, 9), k=st.integers(0, 60),
    sparsity=st.integers(1, 3), seed=st.integers(0, 99),
)  # fmt: skip
def test_law_any_shape_and_options(implementation, lengths, d_in, d_out, r, step, s, k, sparsity, seed):
    case = Case("drawn", tuple(lengths), d_in, d_out, r, "", step, s, k, sparsity=min(sparsity, max(1, k)))
    inputs = make_inputs(case, torch.float32, "cpu", seed)
    got, truth = call(inputs, implementation), call(in_float64(inputs), "reference")
    if step in ("sign", "no_eps"):  # a gradient within rounding of 0 has either sign
        return
    assert_close(got, truth, 3e-5)


@pytest.mark.parametrize("kind", ["sjlt", "rademacher"])
@pytest.mark.parametrize("implementation", ALL)
def test_law_a_sketch_is_the_random_projection_of_the_whole_vector(implementation, kind):
    """gamma itself, read off by the unit vectors as targets; coordinates are counted over all modules."""
    if (implementation, kind) == ("native", "rademacher"):
        pytest.skip("the library sketches by SJLT")
    case = Case("small", (3, 20, 5), 24, 20, 5, "", k=40, kind=kind, sparsity=1 if kind == "rademacher" else 2)
    inputs = make_inputs(case, torch.float32, "cpu")
    got = call(inputs, implementation, targets=torch.eye(5 * (24 + 20)))
    for first in (0, 1000, 2**40 + 5):
        sketch = call(inputs, implementation, sketch=inputs[9]._replace(first=first)).sketch
        options = {"kind": kind, "sparsity": case.sparsity, "seed": inputs[9].seed, "first": first}
        assert_close([sketch], [random_projection(got.dots.float(), 40, **options)])


@pytest.mark.parametrize("implementation", ALL)
def test_law_out_is_added_to(implementation):
    inputs = make_inputs(LAW, torch.float32, "cpu")
    once = call(inputs, implementation).sketch
    total = torch.randn(once.shape)
    before = total.clone()
    assert call(inputs, implementation, out=total).sketch is total
    torch.testing.assert_close(total, before + once, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("implementation", BOTH)
@settings(max_examples=15, deadline=None)
@given(chosen=st.permutations(range(len(LAW.lengths))), n=st.integers(1, len(LAW.lengths)))
def test_law_an_example_does_not_depend_on_the_others(implementation, chosen, n):
    inputs = make_inputs(LAW, torch.float32, "cpu")
    whole, chosen = call(inputs, implementation), chosen[:n]
    x, delta, *_ = inputs
    bounds = inputs[4].tolist()
    tokens = torch.cat([torch.arange(bounds[i], bounds[i + 1]) for i in chosen])
    offsets = torch.tensor([0, *(LAW.lengths[i] for i in chosen)]).cumsum(0)
    got = call(inputs, implementation, x=x[tokens], delta=delta[tokens], offsets=offsets)
    for ours, expected in zip(got, whole, strict=True):
        if implementation == "native":
            assert torch.equal(ours, expected[chosen])
        else:
            assert_close([ours], [expected[chosen]])


@NEEDS_LIBRARY
@pytest.mark.parametrize("threads", [2, 3, 7])
def test_law_the_number_of_threads_changes_no_bit(threads):
    inputs = make_inputs(LAW, torch.float32, "cpu")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = call(inputs, "native")
        torch.set_num_threads(threads)
        for ours, same in zip(call(inputs, "native"), expected, strict=True):
            assert torch.equal(ours, same)
    finally:
        torch.set_num_threads(before)


@NEEDS_LIBRARY
def test_law_groups_of_tiles_change_no_bit():
    """64 examples of a module of 16 tiles do not fit into one buffer, one of them does: they are made in groups."""
    case = Case("groups", (3,) * 64, 1024, 1024, 16, "more than a buffer of gradients", s=3, k=100)
    inputs = make_inputs(case, torch.float32, "cpu")
    alone = call(inputs, "native", x=inputs[0][:3], delta=inputs[1][:3], offsets=torch.tensor([0, 3]))
    for ours, expected in zip(alone, call(inputs, "native"), strict=True):
        assert torch.equal(ours[0], expected[0])


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("sparsity", [1, 3])
def test_law_sjlt_keeps_norms_and_products(implementation, sparsity):
    case = Case("norms", (20, 30, 25, 25, 10, 60), 64, 64, 8, "", k=4096, sparsity=sparsity)
    got = call(make_inputs(case, torch.float32, "cpu"), implementation)
    ratio = got.sketch.double().square().sum(1) / got.sqnorms
    assert (ratio - 1).abs().max() < 5 * math.sqrt(2 / 4096)


@pytest.mark.parametrize("implementation", ALL)
def test_edges_hand_worked(implementation):
    """Two tokens of one example, scale 2: x = (1, 2), (3, -1); delta = 0.5, -1; A = (1, 1), B = 3.

    delta B = 1.5, -3; dA = 2 (1.5 (1, 2) - 3 (3, -1)) = (-15, 12); x A^T = 3, 2; dB = 2 (0.5 * 3 - 1 * 2) = -1.
    Adam with beta1 = beta2 = 0.5, eps = 1 inside, m = (1, 2, 3), v = (7, 6, 0.5):
    m' = (-7, 7, 1); v' + eps = (117, 76, 1.75), so that gamma = (-7 / sqrt(117), 7 / sqrt(76), 1 / sqrt(1.75)).
    """
    x, delta = torch.tensor([[1.0, 2.0], [3.0, -1.0]]), torch.tensor([[0.5], [-1.0]])
    module = (x, delta, torch.tensor([[1.0, 1.0]]), torch.tensor([[3.0]]), torch.tensor([0, 2]))
    options = {"scale": 2.0, "targets": torch.eye(3), "implementation": implementation}
    got = lora_gradient_sketch(*module, **options)
    assert got.dots.tolist() == [[-15, 12, -1]] and got.sqnorms.item() == 370 and got.sketch is None
    assert lora_gradient_sketch(*module, **options, sign=True).dots.tolist() == [[-1, 1, -1]]
    adam = AdamStep(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([7.0, 6.0, 0.5]), beta1=0.5, beta2=0.5, eps=1.0)
    expected = [-7 / math.sqrt(117), 7 / math.sqrt(76), 1 / math.sqrt(1.75)]
    assert lora_gradient_sketch(*module, **options, adam=adam).dots[0].tolist() == pytest.approx(expected, rel=1e-6)
    outside = [-7 / (math.sqrt(116) + 1), 7 / (math.sqrt(75) + 1), 1 / (math.sqrt(0.75) + 1)]
    got = lora_gradient_sketch(*module, **options, adam=adam._replace(eps_inside=False))
    assert got.dots[0].tolist() == pytest.approx(outside, rel=1e-6)


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("step", ["less", "published", "no_eps", "sgd", "sign"])
def test_edges_no_gradient(implementation, step):
    """Without tokens gamma is the momentum alone; where nothing keeps the denominator from 0 it is 0, never NaN."""
    inputs = make_inputs(LAW._replace(step=step), torch.float32, "cpu")
    x, delta, adam = inputs[0][:0], inputs[1][:0], inputs[6]
    if adam is not None:
        adam.exp_avg_sq[:40], adam.exp_avg[:40] = 0, 0
    got = call(inputs, implementation, x=x, delta=delta, offsets=torch.zeros(3, dtype=torch.int64))
    if adam is None:
        expected = torch.zeros(1)
    else:
        m, v = 0.9 * adam.exp_avg.double() / adam.correction1, 0.999 * adam.exp_avg_sq.double() / adam.correction2
        expected = m / ((v + adam.eps).sqrt() if adam.eps_inside else v.sqrt() + adam.eps)
        expected[:40] = 0
    torch.testing.assert_close(got.sqnorms, (expected**2).sum().double().expand(2), rtol=1e-5, atol=0)
    assert torch.isfinite(got.dots).all() and torch.isfinite(got.sketch).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("implementation", ALL)
def test_edges_an_example_that_is_not_finite_spoils_itself_alone(implementation, step, value):
    inputs = make_inputs(LAW._replace(step=step), torch.float32, "cpu")
    clean = call(inputs, implementation)
    inputs[0][60, 3] = value  # in the fourth example
    got = call(inputs, implementation)
    others = [i for i in range(len(LAW.lengths)) if i != 3]
    for ours, expected in zip(got, clean, strict=True):
        assert torch.equal(ours[others], expected[others])
    assert not torch.isfinite(got.sqnorms[3]) and not torch.isfinite(got.dots[3]).any()
    assert not torch.isfinite(got.sketch[3]).all()


@pytest.mark.parametrize("implementation", BOTH)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_edges_strides_and_targets_of_another_dtype(implementation, dtype):
    inputs = make_inputs(LAW, DTYPES[dtype], "cpu")
    x, delta, lora_a, lora_b, offsets, scale, adam, sign, targets, sketch, _ = inputs
    expected = call(inputs, implementation)
    many = torch.zeros(2 * LAW.s, len(adam.exp_avg) + 7, dtype=targets.dtype)
    many[::2, 3:-4] = targets
    state = torch.zeros(2, 2 * len(adam.exp_avg))
    state[0, ::2], state[1, ::2] = adam.exp_avg, adam.exp_avg_sq
    got = call(
        inputs, implementation, x=x.T.contiguous().T, delta=torch.cat([delta, delta], 1)[:, : LAW.d_out],
        lora_a=lora_a.T.contiguous().T, lora_b=lora_b.T.contiguous().T, targets=many[::2, 3:-4],
        adam=adam._replace(exp_avg=state[0, ::2], exp_avg_sq=state[1, ::2]),
    )  # fmt: skip
    assert_close(got, expected)
    for other in (torch.bfloat16, torch.float16, torch.float32):
        rounded = call(inputs, implementation, targets=targets.to(other)).dots
        same = call(inputs, implementation, targets=targets.to(other).float()).dots
        torch.testing.assert_close(rounded, same, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("implementation", ALL)
def test_edges_tokens_of_no_example_are_not_read(implementation):
    inputs = make_inputs(LAW, torch.float32, "cpu")
    expected = call(inputs, implementation)
    x, delta, offsets = inputs[0], inputs[1], inputs[4]
    x, delta = (torch.cat([y[:5] * torch.nan, y, y[:9] * torch.nan]) for y in (x, delta))
    assert_close(call(inputs, implementation, x=x, delta=delta, offsets=offsets + 5), expected)


def test_edges_tiles_change_nothing(monkeypatch):
    for kind in ("sjlt", "rademacher"):
        inputs = make_inputs(LAW._replace(kind=kind), torch.float32, "cpu")
        whole = call(inputs, "torch")
        with monkeypatch.context() as patch:
            patch.setattr(torch_blocked, "VALUES", 700)
            assert_close(call(inputs, "torch"), whole)


def test_refuses_what_does_not_match():
    inputs = make_inputs(CASES["tiny"], torch.float32, "cpu")
    x, delta, lora_a, lora_b, offsets, _, adam, _, targets, sketch, _ = inputs
    for changed, message in [
        ({"x": x[0]}, r"x must have shape \[t, d_in\]"),
        ({"x": x.int()}, "x must be float32"),
        ({"delta": delta[1:]}, r"delta must have shape \[6, d_out\]"),
        ({"delta": delta.double()}, "delta must be float32, got float64"),
        ({"lora_a": lora_a[:, 1:]}, r"lora_a must have shape \[r, 5\]"),
        ({"lora_a": lora_a[:0], "lora_b": lora_b[:, :0]}, "at least one row"),
        ({"lora_b": lora_b.T}, r"lora_b must have shape \[3, 2\]"),
        ({"lora_b": lora_b.double()}, "lora_b must be float32"),
        ({"offsets": offsets.int()}, "offsets must be int64"),
        ({"offsets": offsets[:0]}, "at least one entry"),
        ({"offsets": torch.tensor([0, 4, 2])}, "must not decrease and lie between 0 and 6"),
        ({"offsets": torch.tensor([0, 7])}, "must not decrease and lie between 0 and 6"),
        ({"offsets": torch.tensor([-1, 2])}, "must not decrease and lie between 0 and 6"),
        ({"adam": adam._replace(exp_avg=adam.exp_avg[1:])}, r"adam.exp_avg must have shape \[16\]"),
        ({"adam": adam._replace(exp_avg_sq=adam.exp_avg_sq.half())}, "adam.exp_avg_sq must be float32"),
        ({"adam": adam._replace(exp_avg=None)}, "needed for a step with momentum"),
        ({"adam": adam._replace(beta2=1.5)}, "betas of 0 to 1"),
        ({"adam": adam._replace(eps=-1.0)}, "eps of at least 0"),
        ({"adam": adam._replace(correction1=0.0)}, "corrections must be above 0"),
        ({"sign": True}, "two different steps"),
        ({"targets": targets[:, 1:]}, r"targets must have shape \[s, 16\]"),
        ({"sketch": sketch._replace(kind="gaussian")}, "sjlt or rademacher, got 'gaussian'"),
        ({"sketch": sketch._replace(k=0)}, "sketch.k must lie between"),
        ({"sketch": sketch._replace(first=-1)}, "sketch.first must be at least 0"),
        ({"sketch": sketch._replace(sparsity=8)}, "between 1 and k = 7, got 8"),
        ({"out": torch.zeros(3, 6)}, r"out must have shape \[3, 7\]"),
        ({"out": torch.zeros(3, 7), "sketch": None}, "give sketch too"),
        ({"implementation": "cuda"}, "it is one of: auto"),
    ]:
        implementation = changed.pop("implementation", "auto")
        with pytest.raises(ValueError, match=message):
            call(inputs, implementation, **changed)
    with pytest.raises(NoImplementationError, match="triton: "):
        call(inputs, "triton")
