import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsel.kernels._runtime import native
from fastsel.kernels._runtime.dispatch import NoImplementationError
from fastsel.kernels._runtime.testing import assert_as_exact
from fastsel.kernels.tree_attention import Segments, cpu_native, tree_attention
from fastsel.kernels.tree_attention.cases import CASES, Case, make_inputs

NEEDS_LIBRARY = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))
BOTH = [pytest.param("native", marks=NEEDS_LIBRARY), "torch"]
ALL = [*BOTH, "reference"]
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}


def in_float64(inputs):
    return tuple(x.double() if isinstance(x, torch.Tensor) else x for x in inputs)


def assert_matches(got, inputs):
    truth = tree_attention(*in_float64(inputs), implementation="reference")
    plain = tree_attention(*inputs, implementation="reference")
    longest = int(inputs[3].positions.max()) + 1 if len(inputs[3]) else 1
    assert got.dtype == inputs[0].dtype
    assert_as_exact(got, truth, plain, reduction_length=longest + inputs[0].shape[2])


def matches():
    """Every implementation, case and dtype that it takes; large cases in float32 only."""
    for name in ("native", "torch"):
        for case in CASES.values():
            for dtype in ["float32"] if case.slow or name == "native" else DTYPES:
                marks = [NEEDS_LIBRARY] * (name == "native") + [pytest.mark.slow] * case.slow
                yield pytest.param(name, case, DTYPES[dtype], id=f"{name}-{case.name}-{dtype}", marks=marks)


@pytest.mark.parametrize(("implementation", "case", "dtype"), list(matches()))
def test_matches_reference(implementation, case, dtype):
    inputs = make_inputs(case, dtype, "cpu")
    assert_matches(tree_attention(*inputs, implementation=implementation), inputs)


@st.composite
def forests(draw, most=6, longest=40):
    lengths = draw(st.lists(st.integers(1, longest), min_size=1, max_size=most))
    return tuple(lengths), tuple(draw(st.integers(-1, s - 1)) for s in range(len(lengths)))


@pytest.mark.parametrize("implementation", BOTH)
@settings(max_examples=40, deadline=None)
@given(
    forest=forests(), hk=st.integers(1, 3), group=st.integers(1, 4), d=st.integers(1, 20), dv=st.integers(1, 40),
    window=st.sampled_from([None, 1, 5, 33]), softcap=st.sampled_from([None, 2.0]), seed=st.integers(0, 99),
)  # fmt: skip
def test_law_any_forest_and_options(implementation, forest, hk, group, d, dv, window, softcap, seed):
    case = Case("drawn", *forest, hk * group, hk, d, dv, "", window, softcap)
    inputs = make_inputs(case, torch.float32, "cpu", seed)
    truth = tree_attention(*in_float64(inputs), implementation="reference")
    got = tree_attention(*inputs, implementation=implementation)
    torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ALL)
@settings(max_examples=15, deadline=None)
@given(forest=forests(), window=st.sampled_from([None, 9]), seed=st.integers(0, 99))
def test_law_a_path_alone_gives_the_same(implementation, forest, window, seed):
    """The rows of a segment equal the last rows of its path taken out and laid side by side as one sequence."""
    case = Case("drawn", *forest, 4, 2, 8, 12, "", window)
    query, key, value, segments, *options = make_inputs(case, torch.float32, "cpu", seed)
    got = tree_attention(query, key, value, segments, *options, implementation=implementation)
    starts = segments.start_list
    for s in range(len(segments)):
        rows = torch.cat([torch.arange(starts[a], starts[a + 1]) for a in segments.path(s)])
        alone = (query[rows], key[rows], value[rows], Segments([0, len(rows)], [-1]), *options)
        expected = tree_attention(*alone, implementation=implementation)[-(starts[s + 1] - starts[s]) :]
        torch.testing.assert_close(got[starts[s] : starts[s + 1]], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ALL)
def test_law_siblings_and_strangers_do_not_matter(implementation):
    """Other numbers, NaN among them, in one segment change the bits of that segment and its descendants only."""
    query, key, value, segments, *options = make_inputs(CASES["family"], torch.float32, "cpu")
    before = tree_attention(query, key, value, segments, *options, implementation=implementation)
    starts = segments.start_list
    changed = 2
    for x in (query, key, value):
        x[starts[changed] : starts[changed + 1]] = torch.nan
    after = tree_attention(query, key, value, segments, *options, implementation=implementation)
    for s in range(len(segments)):
        rows = slice(starts[s], starts[s + 1])
        if changed in segments.path(s):
            assert after[rows].isnan().all(dim=2).all()
        else:
            assert torch.equal(after[rows], before[rows])


@pytest.mark.parametrize("implementation", ALL)
def test_law_weights_sum_to_one(implementation):
    query, key, value, *rest = make_inputs(CASES["all_options"], torch.float32, "cpu")
    got = tree_attention(query, key, torch.ones_like(value), *rest, implementation=implementation)
    torch.testing.assert_close(got, torch.ones_like(got), rtol=1e-5, atol=0)


@pytest.mark.parametrize("implementation", ALL)
def test_law_same_input_same_bits(implementation):
    inputs = make_inputs(CASES["all_options"], torch.float32, "cpu")
    first = tree_attention(*inputs, implementation=implementation)
    assert torch.equal(first, tree_attention(*inputs, implementation=implementation))


@NEEDS_LIBRARY
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_law_the_number_of_threads_changes_no_bit(threads):
    inputs = make_inputs(CASES["family"], torch.float32, "cpu")
    before = torch.get_num_threads()
    expected = tree_attention(*inputs, implementation="native")
    torch.set_num_threads(threads)
    try:
        assert torch.equal(tree_attention(*inputs, implementation="native"), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("implementation", ALL)
def test_edges_hand_worked(implementation):
    """A root of two tokens and two children of one; scores are 0, so that weights are equal: plain means of values.

    Token 0 sees value 1; token 1 sees 1, 2; each child sees 1, 2 and its own (6, 9); a window of two drops the 1.
    """
    query, key = torch.zeros(4, 1, 2), torch.ones(4, 1, 2)
    value = torch.tensor([1.0, 2.0, 6.0, 9.0]).reshape(4, 1, 1)
    segments = Segments([0, 2, 3, 4], [-1, 0, 0])
    got = tree_attention(query, key, value, segments, implementation=implementation)
    torch.testing.assert_close(got.flatten(), torch.tensor([1.0, 1.5, 3.0, 4.0]))
    got = tree_attention(query, key, value, segments, 2, implementation=implementation)
    torch.testing.assert_close(got.flatten(), torch.tensor([1.0, 1.5, 4.0, 5.5]))


@pytest.mark.parametrize("implementation", ALL)
def test_edges_large_scores_do_not_overflow(implementation):
    """With scores of 10^4 and more the best key takes all the weight."""
    case = Case("", (50, 20), (-1, 0), 2, 1, 8, 8, "")
    query, key, value, segments, window, softcap, _ = make_inputs(case, torch.float32, "cpu")
    got = tree_attention(query, key, value, segments, window, softcap, 1e4, implementation=implementation)
    truth = tree_attention(*in_float64((query, key, value)), segments, scale=1e4, implementation="reference")
    torch.testing.assert_close(got.double(), truth, rtol=1e-3, atol=1e-3)
    hardest = tree_attention(query, key, value, segments, scale=1e38, implementation=implementation)
    assert torch.equal(hardest[0], value[0].expand(2, -1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_edges_capped_16_bit_logits_are_kept_in_float32(dtype):
    """Logits up to 30: rounded to the dtype before the softmax they would make errors of 0.05."""
    query, key, value, segments, *_ = make_inputs(CASES["softcap"], dtype, "cpu")
    got = tree_attention(query, key, value, segments, softcap=30.0, scale=4.0, implementation="torch")
    wide = tree_attention(
        *in_float64((query, key, value)), segments, softcap=30.0, scale=4.0, implementation="reference"
    )
    assert (got.double() - wide).abs().max() <= 0.02


@pytest.mark.parametrize("implementation", ALL)
def test_edges_strided_inputs_are_read_in_place_and_left_alone(implementation):
    """As transformers lays them out: [h, t, d] seen as [t, h, d], and slices of one fused projection."""
    query, key, value, segments, *options = make_inputs(CASES["family"], torch.float32, "cpu")
    expected = tree_attention(query, key, value, segments, *options, implementation=implementation)
    heads_first = query.transpose(0, 1).contiguous().transpose(0, 1)
    fused = torch.cat([key, value], 2)
    parts = (heads_first, fused[..., :64], fused[..., 64:])
    copies = [x.clone() for x in parts]
    got = tree_attention(*parts, segments, *options, implementation=implementation)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    assert all(torch.equal(x, copy) for x, copy in zip(parts, copies, strict=True))
    every_other = torch.stack([query, torch.full_like(query, torch.nan)], 3).flatten(2)[..., ::2]
    got = tree_attention(every_other, key, value, segments, *options, implementation=implementation)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("implementation", ALL)
def test_edges_torchs_defaults_do_not_matter(implementation):
    """A caller may have set another default dtype (half the bytes of a float32 buffer) or device."""
    inputs = make_inputs(CASES["family"], torch.float32, "cpu")
    expected = tree_attention(*inputs, implementation=implementation)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            fresh = Segments(inputs[3].start_list, inputs[3].parent_list)
            got = tree_attention(*inputs[:3], fresh, *inputs[4:], implementation=implementation)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("implementation", ["native", "torch"])
def test_edges_memory_does_not_grow_with_the_square(implementation):
    """16,384 tokens in 256 segments: all pairs at once would take 1 GB a head."""
    if implementation == "native" and native.unavailable():
        pytest.skip(native.unavailable())
    case = Case("", (64,) * 256, (-1,) * 256, 1, 1, 4, 4, "")
    inputs = make_inputs(case, torch.float32, "cpu")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        tree_attention(*inputs, implementation=implementation)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest < 16 * 2**20


def test_segments_know_their_positions_and_paths():
    segments = Segments([0, 3, 5, 9, 10], [-1, 0, 0, 2])
    assert segments.positions.tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 6, 7]
    assert (segments.path(3), segments.path(1), len(segments), segments.n_tokens) == ([0, 2, 3], [0, 1], 4, 10)
    assert segments.ancestor_ranges == [[], [(0, 3, 0)], [(0, 3, 0)], [(0, 3, 0), (5, 9, 3)]]
    first_rows, owners = segments.query_blocks(2)
    assert (first_rows.tolist(), owners.tolist()) == ([0, 2, 3, 5, 7, 9], [0, 0, 1, 2, 2, 3])
    chain = Segments(torch.tensor([0, 3, 5, 9]), torch.tensor([-1, 0, 1]))
    assert chain.ancestor_ranges == [[], [(0, 3, 0)], [(0, 5, 0)]]


@pytest.mark.parametrize(
    ("starts", "parents", "message"),
    [
        ([0, 2], [-1, 0], "2 offsets for 2 parents"),
        ([1, 2], [-1], "from 0"),
        ([0, 2, 2], [-1, 0], "segment 1 is empty"),
        ([0, 2, 3], [-1, 1], r"parents\[1\] must be -1 or a smaller index than 1, got 1"),
        ([0, 2], [-2], r"parents\[0\] must be -1"),
    ],
)
def test_refuses_segments_that_are_no_forest(starts, parents, message):
    with pytest.raises(ValueError, match=message):
        Segments(starts, parents)


def test_refuses_inputs_that_do_not_match():
    query, key, value, segments, *_ = make_inputs(CASES["tiny"], torch.float32, "cpu")
    for arguments, message in (
        ((query[0], key, value, segments), r"query must have shape \[t, h, d\], got \[2, 5\]"),
        ((query.int(), key, value, segments), "query must be float32"),
        ((query, key.double(), value, segments), "key must be float32, got float64"),
        ((query, key[:, :, :2], value, segments), r"key must have shape \[5, hk, 5\]"),
        ((query, key, value[:4], segments), r"value must have shape \[5, 1, dv\], got \[4, 1, 3\]"),
        ((query[:, :1].repeat(1, 3, 1), key.repeat(1, 2, 1), value.repeat(1, 2, 1), segments), "no multiple of the 2"),
        ((query, key, value, Segments([0, 4], [-1])), "segments cover 4 rows, query has 5"),
        ((query, key, value, segments, 0), "window must be at least 1 or None, got 0"),
        ((query, key, value, segments, None, 0.0), "softcap must be positive and finite, or None, got 0.0"),
        ((query, key, value, segments, None, float("inf")), "softcap must be positive and finite, or None, got inf"),
        ((query, key, value, segments, None, None, float("nan")), "scale must be finite, got nan"),
        ((query[:, :, :0], key[:, :, :0], value, segments), "at least one feature"),
    ):
        with pytest.raises(ValueError, match=message):
            tree_attention(*arguments)


def test_refuses_by_name_what_native_cannot_take():
    inputs = make_inputs(CASES["tiny"], torch.bfloat16, "cpu")
    with pytest.raises(NoImplementationError, match="native: takes float32, got bfloat16"):
        tree_attention(*inputs, implementation="native")
    assert "runs on the CPU" in cpu_native.unsupported(*(x.to("meta") for x in inputs[:3]), *inputs[3:])


@NEEDS_LIBRARY
@pytest.mark.parametrize(("dtype", "module"), [(torch.float32, "cpu_native"), (torch.bfloat16, "torch_blocked")])
def test_auto_runs_the_implementation_expected(dtype, module, caplog):
    with caplog.at_level(logging.DEBUG, logger="fastsel.kernels"):
        tree_attention(*make_inputs(CASES["tiny"], dtype, "cpu"))
    assert caplog.messages == [f"fastsel.kernels.tree_attention.{module}"]
