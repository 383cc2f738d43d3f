"""The gradient of attention within segments against autograd through the reference, in float64."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsel.kernels._runtime import native
from fastsel.kernels.tree_attention import Segments, tree_attention, tree_attention_gradient
from fastsel.kernels.tree_attention.cases import Case, make_inputs

NEEDS_LIBRARY = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))
BOTH = [pytest.param("native", marks=NEEDS_LIBRARY), "torch"]


def inputs_of(lengths, hk, group, d, dv, window=None, softcap=None, scale=None, seed=0):
    case = Case("drawn", tuple(lengths), (-1,) * len(lengths), hk * group, hk, d, dv, "", window, softcap, scale)
    query, key, value, *rest = make_inputs(case, torch.float32, "cpu", seed)
    d_out = torch.randn(len(query), hk * group, dv, generator=torch.Generator().manual_seed(seed + 1))
    return query, key, value, d_out, *rest


def truth_of(inputs):
    *tensors, d_out, segments, window, softcap, scale = inputs
    exact = [x.double().requires_grad_() for x in tensors]
    out = tree_attention(*exact, segments, window, softcap, scale, implementation="torch")
    with torch.enable_grad():
        pieces = [
            tree_attention(
                *(x[a:b] for x in exact), Segments([0, b - a], [-1]), window, softcap, scale, implementation="reference"
            )
            for a, b in zip(segments.start_list, segments.start_list[1:], strict=False)
        ]
    assert torch.allclose(torch.cat(pieces), out)
    return torch.autograd.grad(torch.cat(pieces), exact, d_out.double())


def assert_close(found, truth, tolerance):
    for ours, exact in zip(found, truth, strict=True):
        assert ours.shape == exact.shape
        assert (ours.double() - exact).norm() <= tolerance * exact.norm().clamp_min(1e-3)


@pytest.mark.parametrize("implementation", BOTH)
@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=4), hk=st.integers(1, 3), group=st.integers(1, 5),
    d=st.integers(1, 40), dv=st.integers(1, 40), window=st.sampled_from([None, 1, 5, 33]), seed=st.integers(0, 99),
)  # fmt: skip
def test_law_any_segments_and_heads(implementation, lengths, hk, group, d, dv, window, seed):
    inputs = inputs_of(lengths, hk, group, d, dv, window, seed=seed)
    assert_close(tree_attention_gradient(*inputs, implementation=implementation), truth_of(inputs), 2e-6)


@pytest.mark.parametrize("implementation", BOTH)
@pytest.mark.parametrize("window", [None, 50, 150])
def test_matches_reference_over_several_blocks_of_keys(implementation, window):
    """Longer than KEYS_MULTIPLE, blocks of queries and a chain of sums; the heads of SmolLM2-135M."""
    inputs = inputs_of((300, 7, 193), 3, 3, 64, 64, window)
    assert_close(tree_attention_gradient(*inputs, implementation=implementation), truth_of(inputs), 2e-6)


@pytest.mark.parametrize("implementation", BOTH)
def test_edges_more_heads_than_rows_of_a_block(implementation):
    inputs = inputs_of((9, 3), 1, 100, 8, 8)
    assert_close(tree_attention_gradient(*inputs, implementation=implementation), truth_of(inputs), 2e-6)


def test_softcap_and_float64_are_exact():
    inputs = inputs_of((40, 90), 2, 3, 16, 24, 30, 2.0, 0.7)
    exact = [x.double() if isinstance(x, torch.Tensor) else x for x in inputs]
    assert_close(tree_attention_gradient(*exact), truth_of(inputs), 1e-13)
    with pytest.raises(NotImplementedError, match="native: takes float32"):
        tree_attention_gradient(*exact, implementation="native")
    assert_close(tree_attention_gradient(*inputs), truth_of(inputs), 2e-6)


@NEEDS_LIBRARY
def test_refuses_a_softcap_by_name():
    with pytest.raises(NotImplementedError, match="no softcap"):
        tree_attention_gradient(*inputs_of((5,), 1, 1, 4, 4, None, 2.0), implementation="native")


@pytest.mark.parametrize("implementation", BOTH)
def test_law_other_segments_change_no_bit(implementation):
    """NaN and other numbers in one segment stay in it, and so does another packing."""
    query, key, value, d_out, segments, *options = inputs_of((60, 130, 33), 2, 3, 16, 16)
    before = tree_attention_gradient(query, key, value, d_out, segments, *options, implementation=implementation)
    for x in (query, key, value, d_out):
        x[60:190] = torch.nan
    after = tree_attention_gradient(query, key, value, d_out, segments, *options, implementation=implementation)
    for first, second in zip(before, after, strict=True):
        assert torch.equal(first[:60], second[:60]) and torch.equal(first[190:], second[190:])
        assert second[60:190].isnan().all()


@NEEDS_LIBRARY
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_law_the_number_of_threads_changes_no_bit(threads):
    inputs = inputs_of((60, 130, 33), 2, 3, 16, 16)
    expected = tree_attention_gradient(*inputs, implementation="native")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for ours, theirs in zip(tree_attention_gradient(*inputs, implementation="native"), expected, strict=True):
            assert torch.equal(ours, theirs)
    finally:
        torch.set_num_threads(before)


@NEEDS_LIBRARY
@pytest.mark.parametrize("isa", ["plain", "avx2"])
def test_lesser_instruction_sets_agree(isa):
    if not native.INSTRUCTION_SETS[isa] <= native._cpu_flags():
        pytest.skip(f"this processor has no {isa}")
    code = """
import torch
from fastsel.kernels.tree_attention import Segments, tree_attention_gradient
generator = torch.Generator().manual_seed(0)
shapes = (6, 20), (2, 20), (2, 36), (6, 36)
query, key, value, d_out = (torch.randn(230, *shape, generator=generator) for shape in shapes)
for window in (None, 50):
    inputs = Segments([0, 7, 200, 230], [-1] * 3), window
    truth = tree_attention_gradient(*(x.double() for x in (query, key, value, d_out)), *inputs)
    got = tree_attention_gradient(query, key, value, d_out, *inputs, implementation="native")
    for a, b in zip(got, truth):
        assert (a - b).norm() < 2e-6 * b.norm(), window
"""
    environment = {"FASTSEL_ISA": isa, "PYTHONSAFEPATH": "1", "PATH": ""}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=120)


@pytest.mark.parametrize("implementation", BOTH)
def test_edges_strides_nothing_and_large_scores(implementation):
    query, key, value, d_out, segments, *options = inputs_of((20, 30), 2, 2, 8, 8)
    expected = tree_attention_gradient(query, key, value, d_out, segments, *options, implementation=implementation)
    turned = (x.transpose(0, 2).contiguous().transpose(0, 2) for x in (query, key, value, d_out))
    found = tree_attention_gradient(*turned, segments, *options, implementation=implementation)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    none = inputs_of((), 1, 1, 4, 4)
    assert [x.numel() for x in tree_attention_gradient(*none, implementation=implementation)] == [0, 0, 0]
    found = tree_attention_gradient(query, key, value, d_out, segments, scale=1e4, implementation=implementation)
    assert all(torch.isfinite(x).all() for x in found)


def test_refuses_forests_and_wrong_shapes():
    query, key, value, d_out, segments, *options = inputs_of((3, 4), 1, 2, 4, 4)
    with pytest.raises(ValueError, match="continues another"):
        tree_attention_gradient(query, key, value, d_out, Segments([0, 3, 7], [-1, 0]), *options)
    with pytest.raises(ValueError, match="d_out"):
        tree_attention_gradient(query, key, value, d_out[:, :1], segments, *options)
    with pytest.raises(ValueError, match="segments cover"):
        tree_attention_gradient(query, key, value, d_out, Segments([0, 3], [-1]), *options)
    with pytest.raises(ValueError, match="no multiple"):
        tree_attention_gradient(query[:, :1], key.repeat(1, 2, 1), value.repeat(1, 2, 1), d_out[:, :1], segments)
    with pytest.raises(ValueError, match="is not known"):
        tree_attention_gradient(query, key, value, d_out, segments, implementation="reference")
