import logging
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsel.kernels._runtime import native
from fastsel.kernels._runtime.dispatch import NoImplementationError
from fastsel.kernels._runtime.testing import assert_as_exact, floor
from fastsel.kernels.linear_token_stats import LinearTokenStats, cpu_native, linear_token_stats
from fastsel.kernels.linear_token_stats.cases import ALL_OUTPUTS, CASES, Case, make_inputs

NEEDS_LIBRARY = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))
BOTH = [pytest.param("native", marks=NEEDS_LIBRARY), "torch"]
ALL = [*BOTH, "reference"]
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
FLOAT_OUTPUTS = ALL_OUTPUTS[:-1]
# 1,200 words are four tasks of the native code, the last one of 48 words; 33 rows are two tiles.
LAW = Case("law", t=33, d=20, v=1200, why="several tasks, groups and tiles, all with tails", bias=True)


def in_float64(inputs):
    return tuple(x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs)


def bits(stats):
    return [None if x is None else x.contiguous().view(torch.uint8).tolist() for x in stats]


def assert_matches(got, inputs):
    """Every output against the reference in float64; argmax wherever the gap to the second best is clear."""
    truth = linear_token_stats(*in_float64(inputs), implementation="reference")
    plain = linear_token_stats(*inputs, implementation="reference")
    hidden, weight = inputs[:2]
    for name in FLOAT_OUTPUTS:
        assert_as_exact(
            *(getattr(stats, name) for stats in (got, truth, plain)), reduction_length=hidden.shape[1], what=name
        )
        assert torch.equal(getattr(got, name).isnan(), getattr(truth, name).isnan()), f"{name}: NaN in other rows"
    assert got.argmax.dtype == torch.int64
    gap = truth.top1_logprob - truth.top2_logprob
    clear = ~(gap <= 2 * floor(torch.float32, hidden.shape[1], max(1.0, weight.shape[1] ** 0.5)))
    assert torch.equal(got.argmax[clear], truth.argmax[clear])
    assert clear.sum() >= 0.9 * len(clear)


def matches():
    """Every implementation, case and dtype; the large cases in float32 only, which keeps their reference in memory."""
    for name in ("native", "torch"):
        for case in CASES.values():
            for dtype in ["float32"] if case.slow else DTYPES:
                # native refuses float64; more than 2^31 logits: test_edges_more_than_2_31_logits
                if (name, dtype) != ("native", "float64") and case.t * case.v < 2**31:
                    marks = [NEEDS_LIBRARY] * (name == "native") + [pytest.mark.slow] * case.slow
                    yield pytest.param(name, case, DTYPES[dtype], id=f"{name}-{case.name}-{dtype}", marks=marks)


@pytest.mark.parametrize(("implementation", "case", "dtype"), list(matches()))
def test_matches_reference(implementation, case, dtype):
    inputs = make_inputs(case, dtype, "cpu")
    assert_matches(linear_token_stats(*inputs, implementation=implementation), inputs)


@pytest.mark.parametrize("implementation", BOTH)
@settings(max_examples=25, deadline=None)
@given(
    t=st.integers(0, 70), d=st.integers(1, 40), v=st.integers(1, 900), bias=st.booleans(),
    softcap=st.sampled_from([None, 0.5, 20.0]), scale=st.sampled_from([1.0, 0.3, -2.0]), seed=st.integers(0, 99),
)  # fmt: skip
def test_law_any_shape_and_options(implementation, t, d, v, bias, softcap, scale, seed):
    inputs = make_inputs(Case("drawn", t, d, v, "", bias, softcap, 1.0), torch.float32, "cpu", seed)
    inputs = (*inputs[:5], scale, ALL_OUTPUTS)
    got = linear_token_stats(*inputs, implementation=implementation)
    truth = linear_token_stats(*in_float64(inputs), implementation="reference")
    for name in FLOAT_OUTPUTS:
        torch.testing.assert_close(getattr(got, name).double(), getattr(truth, name), rtol=2e-5, atol=2e-5)
    clear = ~(truth.top1_logprob - truth.top2_logprob <= 1e-3)
    assert torch.equal(got.argmax[clear], truth.argmax[clear])


@pytest.mark.parametrize("implementation", BOTH)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999))
def test_law_permuting_the_vocabulary_changes_nothing(implementation, seed):
    hidden, weight, targets, bias, *rest = make_inputs(LAW, torch.float32, "cpu", seed)
    order = torch.randperm(LAW.v, generator=torch.Generator().manual_seed(seed))
    moved_to = torch.argsort(order)
    moved_targets = torch.where(targets < 0, targets, moved_to[targets.clamp(min=0)])
    a = linear_token_stats(hidden, weight, targets, bias, *rest, implementation=implementation)
    b = linear_token_stats(hidden, weight[order], moved_targets, bias[order], *rest, implementation=implementation)
    for name in FLOAT_OUTPUTS:
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-5, atol=1e-5)
    clear = a.top1_logprob - a.top2_logprob > 1e-4
    assert torch.equal(moved_to[a.argmax][clear], b.argmax[clear])


@pytest.mark.parametrize("implementation", ALL)
@settings(max_examples=15, deadline=None)
@given(spread=st.sampled_from([0.0, 0.1, 1.0, 30.0]), seed=st.integers(0, 999))
def test_law_bounds(implementation, spread, seed):
    """0 <= entropy <= log v, top2 <= top1 <= 0, -top1 <= nll, and v e^top1 >= 1."""
    hidden, weight, targets, bias, *_ = make_inputs(LAW, torch.float32, "cpu", seed)
    stats = linear_token_stats(
        hidden * spread, weight, targets, bias * spread, outputs=ALL_OUTPUTS, implementation=implementation
    )
    slack, log_v = 1e-5, math.log(LAW.v)
    assert (stats.entropy >= -slack).all() and (stats.entropy <= log_v + slack).all()
    assert (stats.top2_logprob <= stats.top1_logprob).all() and (stats.top1_logprob <= 0).all()
    assert (stats.top1_logprob >= -log_v - slack).all()
    assert (stats.nll >= -stats.top1_logprob - slack)[targets >= 0].all()


@pytest.mark.parametrize("implementation", BOTH)
@settings(max_examples=15, deadline=None)
@given(shift=st.floats(-50, 50), seed=st.integers(0, 999))
def test_law_a_constant_added_to_all_logits_moves_lse_only(implementation, shift, seed):
    hidden, weight, targets, bias, *rest = make_inputs(LAW, torch.float32, "cpu", seed)
    a = linear_token_stats(hidden, weight, targets, bias, *rest, implementation=implementation)
    b = linear_token_stats(hidden, weight, targets, bias + shift, *rest, implementation=implementation)
    torch.testing.assert_close(a.lse + shift, b.lse, rtol=1e-5, atol=2e-5)
    for name in ("nll", "entropy", "top1_logprob", "top2_logprob"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", ALL)
def test_law_same_input_same_bits(implementation):
    inputs = make_inputs(LAW, torch.float32, "cpu")
    first = bits(linear_token_stats(*inputs, implementation=implementation))
    assert all(bits(linear_token_stats(*inputs, implementation=implementation)) == first for _ in range(5))


@NEEDS_LIBRARY
@settings(max_examples=25, deadline=None)
@given(rows=st.lists(st.integers(0, LAW.t - 1), min_size=1, max_size=70), seed=st.integers(0, 99))
def test_law_a_rows_bits_do_not_depend_on_the_batch(rows, seed):
    hidden, weight, targets, *rest = make_inputs(LAW, torch.float32, "cpu", seed)
    whole = linear_token_stats(hidden, weight, targets, *rest, implementation="native")
    part = linear_token_stats(hidden[rows], weight, targets[rows], *rest, implementation="native")
    assert bits(part) == bits(x[rows] for x in whole)


@NEEDS_LIBRARY
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_law_the_number_of_threads_changes_no_bit(threads):
    inputs = make_inputs(LAW, torch.float32, "cpu")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = bits(linear_token_stats(*inputs, implementation="native"))
        torch.set_num_threads(threads)
        assert bits(linear_token_stats(*inputs, implementation="native")) == expected
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("asked", [(name,) for name in ALL_OUTPUTS] + [("nll", "entropy"), ("argmax", "lse")])
@pytest.mark.parametrize("implementation", ALL)
def test_law_asking_for_less_changes_no_bit(implementation, asked):
    inputs = make_inputs(LAW, torch.float32, "cpu")
    everything = linear_token_stats(*inputs, implementation=implementation)
    stats = linear_token_stats(*inputs[:-1], asked, implementation=implementation)
    for name in ALL_OUTPUTS:
        if name in asked:
            assert torch.equal(getattr(stats, name), getattr(everything, name))
        else:
            assert getattr(stats, name) is None


@NEEDS_LIBRARY
def test_law_blocks_of_rows_change_no_bit():
    """850 rows x 200,000 words exceed the room for partial results: the rows go in blocks."""
    inputs = make_inputs(Case("blocks", 850, 2, 200_000, ""), torch.float32, "cpu")
    whole = linear_token_stats(*inputs, implementation="native")
    for i in (0, 415, 416, 448, 849):
        row = slice(i, i + 1)
        alone = linear_token_stats(inputs[0][row], inputs[1], inputs[2][row], *inputs[3:], implementation="native")
        assert bits(alone) == bits(x[row] for x in whole)


@pytest.mark.parametrize("implementation", ALL)
def test_edges_hand_worked(implementation):
    """Logits (0, log 2, log 5): p = 1/8, 2/8, 5/8, entropy 3/8 log 8 + 2/8 log 4 + ... by hand below."""
    hidden = torch.tensor([[1.0]])
    weight = torch.tensor([[0.0], [math.log(2)], [math.log(5)]])
    stats = linear_token_stats(hidden, weight, torch.tensor([1]), outputs=ALL_OUTPUTS, implementation=implementation)
    entropy = 1 / 8 * math.log(8) + 2 / 8 * math.log(4) + 5 / 8 * math.log(8 / 5)
    expected = [math.log(4), math.log(8), entropy, math.log(5 / 8), math.log(2 / 8)]
    assert [x.item() for x in stats[:5]] == pytest.approx(expected, abs=2e-7)
    assert stats.argmax.tolist() == [2]


@pytest.mark.parametrize("implementation", ALL)
def test_edges_no_rows(implementation):
    stats = linear_token_stats(
        torch.empty(0, 4), torch.ones(5, 4), torch.empty(0, dtype=torch.int64),
        outputs=ALL_OUTPUTS, implementation=implementation,
    )  # fmt: skip
    assert [tuple(x.shape) for x in stats] == [(0,)] * 6
    assert [x.dtype for x in stats] == [torch.float32] * 5 + [torch.int64]


@pytest.mark.parametrize("implementation", ALL)
def test_edges_one_word(implementation):
    """The only word is certain; there is no second."""
    stats = linear_token_stats(
        torch.tensor([[3.0], [-7.0]]), torch.tensor([[2.0]]), torch.tensor([0, -1]),
        outputs=ALL_OUTPUTS, implementation=implementation,
    )  # fmt: skip
    assert stats.lse.tolist() == [6, -14]
    assert stats.nll.tolist() == stats.entropy.tolist() == stats.top1_logprob.tolist() == [0, 0]
    assert stats.top2_logprob.tolist() == [-math.inf] * 2
    assert stats.argmax.tolist() == [0, 0]


@pytest.mark.parametrize(
    "twins", [(0, 1), (5, 6), (11, 12), (95, 96), (3, 383), (100, 384), (700, 1199), (8, 400, 900)]
)
@pytest.mark.parametrize("implementation", ALL)
def test_edges_ties_take_the_lowest_index(implementation, twins):
    """Equal rows of weight lie in one tile, one group, one task and in different ones."""
    hidden, weight, targets, *_ = make_inputs(LAW, torch.float32, "cpu")
    hidden = hidden.abs()
    for word in twins:
        weight[word] = 10.0
    stats = linear_token_stats(hidden, weight, targets, outputs=ALL_OUTPUTS, implementation=implementation)
    assert stats.argmax.tolist() == [twins[0]] * LAW.t
    assert torch.equal(stats.top1_logprob, stats.top2_logprob)


@pytest.mark.parametrize("implementation", ALL)
def test_edges_all_logits_equal(implementation):
    targets = torch.arange(9) - 1
    stats = linear_token_stats(
        torch.zeros(9, 3), torch.randn(1000, 3), targets, outputs=ALL_OUTPUTS, implementation=implementation
    )
    log_v = torch.full((9,), math.log(1000))
    for name, expected in {"lse": log_v, "entropy": log_v, "top1_logprob": -log_v, "top2_logprob": -log_v}.items():
        torch.testing.assert_close(getattr(stats, name), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(stats.nll, torch.where(targets < 0, 0.0, log_v), rtol=1e-6, atol=1e-6)
    assert stats.argmax.tolist() == [0] * 9


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("implementation", ALL)
def test_edges_a_row_that_is_not_finite_is_nan_alone(implementation, value):
    """An infinite feature meets weights of both signs: +inf among the logits. Its neighbours do not change."""
    hidden, weight, targets, *rest = make_inputs(LAW, torch.float32, "cpu")
    clean = linear_token_stats(hidden, weight, targets, *rest, implementation=implementation)
    targets[4], targets[20] = 3, -1
    hidden[4, 7] = hidden[20, 0] = value
    stats = linear_token_stats(hidden, weight, targets, *rest, implementation=implementation)
    for name in FLOAT_OUTPUTS:
        x = getattr(stats, name)
        assert x[4].isnan(), name
        assert x[20].isnan() if name != "nll" else x[20] == 0, name
    assert stats.argmax[[4, 20]].tolist() == [-1, -1]
    others = [i for i in range(LAW.t) if i not in (4, 20)]
    assert bits(x[others] for x in stats) == bits(x[others] for x in clean)


@pytest.mark.parametrize("word", [0, 95, 96, 700, 1199])
@pytest.mark.parametrize("implementation", ALL)
def test_edges_a_weight_that_is_nan_spoils_every_row(implementation, word):
    hidden, weight, targets, *rest = make_inputs(LAW, torch.float32, "cpu")
    weight[word, 3] = math.nan
    stats = linear_token_stats(hidden, weight, targets, *rest, implementation=implementation)
    assert all(getattr(stats, name)[targets >= 0].isnan().all() for name in FLOAT_OUTPUTS)
    assert (stats.argmax == -1).all()


@pytest.mark.parametrize("implementation", ALL)
def test_edges_a_logit_of_minus_infinity_is_a_word_of_probability_zero(implementation):
    """As a mask in the bias: the same as leaving those words out; as the target, nll is +inf."""
    hidden, weight, targets, bias, *rest = make_inputs(LAW, torch.float32, "cpu")
    masked = torch.arange(LAW.v) % 3 == 1
    masked[:200] = True  # a whole group of words, so that the first maximum is not a logit's
    masked[1100:] = True
    targets = torch.where(masked[targets.clamp(min=0)], -1, targets)
    targets[0] = 17
    stats = linear_token_stats(
        hidden, weight, targets, bias.masked_fill(masked, -math.inf), *rest, implementation=implementation
    )
    kept = (~masked).nonzero()[:, 0]
    moved_to = torch.cumsum(~masked, 0) - 1
    moved = torch.where(targets < 0, targets, moved_to[targets.clamp(min=0)])
    moved[0] = -1
    expected = linear_token_stats(hidden, weight[kept], moved, bias[kept], *rest, implementation="reference")
    assert stats.nll[0] == math.inf
    torch.testing.assert_close(stats.nll[1:], expected.nll[1:], rtol=1e-5, atol=1e-5)
    for name in FLOAT_OUTPUTS[1:]:
        torch.testing.assert_close(getattr(stats, name), getattr(expected, name), rtol=1e-5, atol=1e-5)
    assert torch.equal(stats.argmax, kept[expected.argmax])


@pytest.mark.parametrize("left", [0, 1, 2])
@pytest.mark.parametrize("implementation", ALL)
def test_edges_almost_every_word_masked(implementation, left):
    """None left: NaN. One left: certain, no second. Two left: both known."""
    bias = torch.full((1200,), -math.inf)
    bias[[150, 1000][:left]] = 0.0
    hidden, weight, *_ = make_inputs(LAW, torch.float32, "cpu")
    stats = linear_token_stats(
        hidden, weight * 0, torch.full((LAW.t,), 150), bias, outputs=ALL_OUTPUTS, implementation=implementation
    )
    if left == 0:
        assert all(getattr(stats, name).isnan().all() for name in FLOAT_OUTPUTS) and (stats.argmax == -1).all()
        return
    expected = {"lse": math.log(left), "nll": math.log(left), "entropy": math.log(left)}
    expected |= {"top1_logprob": -math.log(left), "top2_logprob": -math.log(2) if left == 2 else -math.inf}
    for name, value in expected.items():
        torch.testing.assert_close(getattr(stats, name), torch.full((LAW.t,), value), rtol=1e-6, atol=1e-6)
    assert (stats.argmax == 150).all()


@pytest.mark.parametrize("implementation", ALL)
def test_edges_logits_of_any_size(implementation):
    """1e-30 to 1e30 and both signs: certain or uniform, never NaN."""
    for size in (1e-30, 1e-3, 1e3, 1e10, 1e30):
        hidden = torch.tensor([[size], [-size]])
        weight = torch.linspace(-1, 1, 501)[:, None]
        stats = linear_token_stats(
            hidden, weight, torch.tensor([500, 0]), outputs=ALL_OUTPUTS, implementation=implementation
        )
        truth = linear_token_stats(
            hidden.double(), weight.double(), torch.tensor([500, 0]), outputs=ALL_OUTPUTS, implementation="reference"
        )
        for name in FLOAT_OUTPUTS:
            torch.testing.assert_close(getattr(stats, name).double(), getattr(truth, name), rtol=1e-4, atol=2e-5)


@NEEDS_LIBRARY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_edges_every_16_bit_number_is_widened_exactly(dtype):
    """One word of weight 1: the logit is the number, and so is lse. As hidden state and as weight."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    one, no_target = torch.ones(1, 1, dtype=dtype), torch.full((2**16,), -1)
    as_hidden = linear_token_stats(numbers[:, None], one, no_target, outputs=["lse"], implementation="native").lse
    expected = numbers.float()
    finite = expected.isfinite()
    assert finite.sum() > 60_000
    assert torch.equal(as_hidden[finite], expected[finite])
    assert as_hidden[~finite].isnan().all()
    # The four rows of one call go through the vector code of packing.
    finite = numbers[finite]
    chosen = finite[torch.linspace(0, len(finite) - 1, 4000).long()].reshape(4, 1000).contiguous()
    eye = torch.eye(1000, dtype=dtype)
    top = linear_token_stats(eye, chosen, torch.full((1000,), -1), outputs=["argmax"], implementation="native").argmax
    assert torch.equal(chosen.float().gather(0, top[None])[0], chosen.float().amax(0))


@pytest.mark.parametrize("implementation", ALL)
def test_edges_any_stride(implementation):
    inputs = make_inputs(LAW, torch.float32, "cpu")
    hidden, weight, targets, bias, *rest = inputs
    expected = linear_token_stats(*inputs, implementation=implementation)
    spread_out = torch.randn(2 * LAW.t, LAW.d + 3)[::2, 1 : LAW.d + 1].copy_(hidden)
    transposed = weight.T.contiguous().T
    every_other = targets.repeat_interleave(2)[::2]
    bias_column = bias[:, None].repeat(1, 3)[:, 1]
    got = linear_token_stats(spread_out, transposed, every_other, bias_column, *rest, implementation=implementation)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    same_row = linear_token_stats(
        hidden[:1].expand(5, -1), weight, targets[:1].expand(5), bias, *rest, implementation=implementation
    )
    for a, b in zip(same_row, expected, strict=True):
        torch.testing.assert_close(a, b[:1].expand(5), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ALL)
def test_edges_inputs_stay_as_they_are_and_nothing_is_tracked(implementation):
    inputs = make_inputs(CASES["all_options"], torch.float32, "cpu")
    copies = [x.clone() for x in inputs[:4]]
    inputs[0].requires_grad_(True)
    stats = linear_token_stats(*inputs, implementation=implementation)
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=False))
    assert not any(x.requires_grad for x in stats)


@pytest.mark.parametrize("implementation", ALL)
def test_edges_torchs_defaults_do_not_matter(implementation):
    """A caller may have set another default dtype (half the bytes of a float32 buffer) or device."""
    inputs = make_inputs(LAW, torch.float32, "cpu")
    expected = linear_token_stats(*inputs, implementation=implementation)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            got = linear_token_stats(*inputs, implementation=implementation)
    finally:
        torch.set_default_dtype(torch.float32)
    assert bits(got) == bits(expected)


@NEEDS_LIBRARY
@pytest.mark.slow
def test_edges_more_than_2_31_logits():
    case = CASES["many_rows"]
    assert case.t * case.v > 2**31
    inputs = make_inputs(case, torch.float32, "cpu")
    stats = linear_token_stats(*inputs, implementation="native")
    rows = torch.tensor([0, 1, 33_333, case.t - 2, case.t - 1])
    sample = (inputs[0][rows], inputs[1], inputs[2][rows], *inputs[3:])
    assert_matches(LinearTokenStats(*(x[rows] for x in stats)), sample)


MEMORY = """
import ctypes, sys, torch
from pathlib import Path
from fastsel.kernels.linear_token_stats import linear_token_stats
from fastsel.kernels.linear_token_stats.cases import Case, make_inputs
def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))
t, d, v = map(int, sys.argv[2:])
inputs = make_inputs(Case("memory", t, d, v, ""), torch.float32, "cpu")
small = make_inputs(Case("small", 40, d, 2000, ""), torch.float32, "cpu")
linear_token_stats(*small, implementation=sys.argv[1])  # libraries and threads are loaded
ctypes.CDLL(None).malloc_trim(0)  # what making the inputs has freed must not hide what the call takes
Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is resident now
before = status("VmRSS")
linear_token_stats(*inputs, implementation=sys.argv[1])
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads memory from /proc")
@pytest.mark.parametrize(
    "sizes",
    [(1024, 64, 49_152), pytest.param((2048, 576, 49_152), marks=pytest.mark.slow)],
    ids=lambda sizes: "x".join(map(str, sizes)),
)
@pytest.mark.parametrize("implementation", ALL)
def test_edges_memory(implementation, sizes):
    """At most 16 MB beyond the inputs, where the reference stores logits of 200 and 400 MB."""
    command = [sys.executable, "-c", MEMORY, implementation, *map(str, sizes)]
    # The least of three: under pressure, pages of the inputs that were taken away come back during the call.
    taken = min(
        int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout)
        for _ in range(1 if implementation == "reference" else 3)
    )
    logits = 4 * sizes[0] * sizes[2]
    assert taken >= logits if implementation == "reference" else 2**19 <= taken <= 16 * 2**20


def refused(changes, message):
    inputs = dict(zip(("hidden", "weight", "targets", "bias"), make_inputs(LAW, torch.float32, "cpu"), strict=False))
    with pytest.raises(ValueError, match=message):
        linear_token_stats(**(inputs | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": torch.zeros(33)}, r"hidden must have shape \[t, d\], got \[33\]"),
        ({"hidden": torch.zeros(33, 20, dtype=torch.int64)}, "hidden must be float32 .* got int64"),
        ({"hidden": [[1.0]]}, "hidden must be a torch.Tensor, got list"),
        ({"weight": torch.zeros(1200, 21)}, r"weight must have shape \[v, 20\], got \[1200, 21\]"),
        ({"weight": torch.zeros(1200, 20, dtype=torch.bfloat16)}, "weight must be float32, got bfloat16"),
        ({"weight": torch.zeros(0, 20)}, r"at least one row and one column, got \[0, 20\]"),
        ({"weight": torch.zeros(9, 20, device="meta")}, "weight must be on cpu, got meta"),
        ({"targets": torch.zeros(32, dtype=torch.int64)}, r"targets must have shape \[33\], got \[32\]"),
        ({"targets": torch.zeros(33)}, "targets must be int64, got float32"),
        ({"targets": torch.full((33,), 1200)}, "targets must be below the vocabulary size 1200, got 1200"),
        ({"bias": torch.zeros(20)}, r"bias must have shape \[1200\], got \[20\]"),
        ({"bias": torch.zeros(1200, dtype=torch.float64)}, "bias must be float32, got float64"),
        ({"softcap": 0.0}, "softcap must be positive and finite, or None, got 0.0"),
        ({"softcap": math.nan}, "softcap must be positive and finite, or None, got nan"),
        ({"scale": math.inf}, "scale must be finite, got inf"),
        ({"outputs": ()}, r"outputs must be some of nll, .*; got \(\)"),
        ({"outputs": ("nll", "margin")}, "outputs must be some of nll, .* got .*margin"),
        ({"implementation": "cuda"}, "implementation='cuda' is not known here; it is one of: auto, triton, native"),
    ],
)
def test_refuses_wrong_inputs(changes, message):
    refused(changes, message)


def test_refuses_in_native_what_it_cannot_compute():
    inputs = make_inputs(CASES["tiny"], torch.float64, "cpu")
    assert cpu_native.unsupported(*inputs) == "takes float32, bfloat16 and float16, got float64"
    with pytest.raises(NoImplementationError, match="native: takes float32, bfloat16 and float16, got float64"):
        linear_token_stats(*inputs, implementation="native")
    on_meta = tuple(x.to("meta") if isinstance(x, torch.Tensor) else x for x in inputs)
    assert cpu_native.unsupported(*on_meta) == "runs on the CPU, the tensors are on meta"


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [pytest.param(torch.float32, "cpu_native", marks=NEEDS_LIBRARY), (torch.float64, "torch_blocked")],
)
def test_auto_takes_the_fastest_that_accepts(dtype, expected, caplog):
    with caplog.at_level(logging.DEBUG, logger="fastsel.kernels"):
        linear_token_stats(*make_inputs(CASES["tiny"], dtype, "cpu"))
    assert caplog.messages == [f"fastsel.kernels.linear_token_stats.{expected}"]
