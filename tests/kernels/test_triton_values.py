"""The values of every Triton kernel without a GPU: Triton's interpreter runs them on CPU tensors.

TRITON_INTERPRET is read when Triton is imported, so the checks (functions named check_*) run in a pytest process of
their own, in which every address that a kernel touches must lie in one of the tensors of its launch.
"""

import pytest
import torch

triton = pytest.importorskip("triton")

from fastsel.kernels._runtime import triton_blocks  # noqa: E402
from fastsel.kernels._runtime.testing import assert_as_exact, placed  # noqa: E402
from fastsel.kernels._runtime.triton_launch import INTERPRETED, Launch  # noqa: E402
from fastsel.kernels.linear_token_stats import api as stats_api  # noqa: E402
from fastsel.kernels.linear_token_stats import cases as stats_cases  # noqa: E402
from fastsel.kernels.linear_token_stats import gpu_triton as stats_kernel  # noqa: E402
from fastsel.kernels.linear_token_stats import reference as stats_reference  # noqa: E402
from fastsel.kernels.tree_attention import api as tree_api  # noqa: E402
from fastsel.kernels.tree_attention import cases as tree_cases  # noqa: E402
from fastsel.kernels.tree_attention import gpu_triton as tree_kernel  # noqa: E402
from fastsel.kernels.tree_attention import reference as tree_reference  # noqa: E402
from fastsel.kernels.tree_attention.segments import Segments  # noqa: E402

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
@pytest.mark.parametrize(
    "expression", [pytest.param("not slow", id="fast"), pytest.param("slow", marks=pytest.mark.slow, id="slow")]
)
def test_values_under_the_interpreter(expression, run_under_the_interpreter):
    run_under_the_interpreter(__file__, expression)


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
@pytest.mark.parametrize("kernel", [stats_kernel, tree_kernel])
def test_refuses_cpu_tensors_outside_the_interpreter(kernel):
    hidden = torch.zeros(2, 3, 4)
    assert kernel.unsupported(hidden, hidden, hidden, None, None, 1.0, ()) == (
        "needs a CUDA or ROCm device; these tensors are on cpu"
    )


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
def test_refuses_rows_that_spread_over_2_31_elements():
    """A transposed matrix: the kernel multiplies feature numbers by their stride in 32 bits."""
    hidden = torch.empty(4, 2**14, device="meta")
    for n_words, reason in ((2**17, "weight spreads 16384 over 131072 each"), (2**17 - 16, "needs a CUDA")):
        weight = torch.empty(2**14, n_words, device="meta").T
        assert reason in stats_kernel.unsupported(hidden, weight, hidden[:, 0], None, None, 1.0, ("nll",))


# ------------------------------------------------------------------------------------ in the interpreter's process


@pytest.fixture
def small_tiles(monkeypatch):
    """Little work for the interpreter, and many tiles and slices in a small case."""
    if INTERPRETED:
        monkeypatch.setattr(stats_kernel, "SLICE", 128)
        monkeypatch.setattr(
            stats_kernel, "LAUNCH_TABLE", dict.fromkeys(stats_kernel.LAUNCH_TABLE, (32, 64, 32, 4, 2, "ieee"))
        )
        monkeypatch.setattr(
            tree_kernel, "LAUNCH_TABLE", dict.fromkeys(tree_kernel.LAUNCH_TABLE, (32, 32, 4, 2, "ieee"))
        )


small = pytest.mark.usefixtures("small_tiles")
SMALL_CASES = [
    *(stats_cases.CASES[name] for name in ("one", "tiny", "empty")),
    stats_cases.Case("options", 37, 48, 300, "three slices; all options", bias=True, softcap=7.0, scale=0.25),
]


def widened(inputs):
    return [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs]


def compare_stats(inputs):
    """The kernel against the reference in float64, field by field; returns the kernel's results."""
    inputs = [placed(x) for x in inputs]
    got = stats_api.linear_token_stats(*inputs, implementation="triton")._asdict()
    truth, plain = stats_reference.compute(*widened(inputs)), stats_reference.compute(*inputs)
    length = inputs[0].shape[1] + inputs[1].shape[0]
    for name in inputs[-1]:
        if name == "argmax":
            is_clear = (truth["top1_logprob"] - truth["top2_logprob"] > 1e-4) | truth["lse"].isnan()
            assert torch.equal(got[name][is_clear], truth[name][is_clear])
        else:
            assert_as_exact(got[name], truth[name], plain[name], reduction_length=length, what=name)
    return got


@small
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda case: case.name)
def check_stats_match_the_reference(case, dtype):
    compare_stats(stats_cases.make_inputs(case, dtype, "cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["odd", "whole_tiles", "wide", "bias", "all_options"])
def check_stats_match_the_reference_on_larger_cases(name, dtype):
    compare_stats(stats_cases.make_inputs(stats_cases.CASES[name], dtype, "cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("outputs", [("nll",), stats_cases.ALL_OUTPUTS], ids=["nll", "all"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def check_stats_tiles_of_every_architecture(architecture, dtype, outputs, monkeypatch):
    monkeypatch.setattr(stats_kernel, "triton_architecture", lambda tensor: architecture)
    case = stats_cases.Case("tiles", 150, 80, 1300, "two blocks of tokens, two slices, a masked end of the features")
    *inputs, _ = stats_cases.make_inputs(case, dtype, "cpu")
    compare_stats((*inputs, outputs))


@small
def check_stats_outputs_alone_are_the_same():
    case = stats_cases.Case("small", 5, 32, 300, "")
    *inputs, outputs = map(placed, stats_cases.make_inputs(case, torch.float32, "cpu"))
    together = stats_api.linear_token_stats(*inputs, outputs, implementation="triton")._asdict()
    for name in outputs:
        alone = stats_api.linear_token_stats(*inputs, (name,), implementation="triton")._asdict()
        torch.testing.assert_close(alone.pop(name), together[name], rtol=1e-5, atol=1e-5)
        assert set(alone.values()) == {None}


@small
def check_stats_of_words_with_probability_zero_and_of_rows_with_nan():
    case = stats_cases.Case("special", 6, 16, 200, "two slices", bias=True)
    hidden, weight, targets, bias, *_ = stats_cases.make_inputs(case, torch.float32, "cpu")
    bias[[0, 3, 199]] = -torch.inf  # in both slices
    targets = torch.tensor([3, 4, -1, 199, -1, 7])
    hidden[3, 2], hidden[4, 0] = torch.nan, torch.nan
    got = compare_stats((hidden, weight, targets, bias, None, 1.0, stats_cases.ALL_OUTPUTS))
    assert got["nll"][0] == torch.inf and got["nll"][4] == 0 and got["nll"][3].isnan()
    assert got["argmax"][3] == -1 and got["entropy"][4].isnan()
    bias[1:] = -torch.inf
    bias[0] = 0.0
    got = compare_stats((hidden[:3], weight, targets[:3], bias, None, 1.0, stats_cases.ALL_OUTPUTS))
    assert got["top2_logprob"].tolist() == [-torch.inf] * 3 and got["argmax"].tolist() == [0] * 3
    bias[0] = -torch.inf
    got = compare_stats((hidden[:3], weight, targets[:3], bias, None, 1.0, stats_cases.ALL_OUTPUTS))
    assert got["lse"].isnan().all() and got["argmax"].tolist() == [-1] * 3
    bias[:] = 0.0
    bias[150] = torch.inf
    got = compare_stats((hidden[:3], weight, targets[:3], bias, None, 1.0, stats_cases.ALL_OUTPUTS))
    assert got["top1_logprob"].isnan().all()
    capped = compare_stats((hidden[:3], weight, targets[:3], bias, 5.0, 1.0, stats_cases.ALL_OUTPUTS))
    assert capped["argmax"].tolist() == [150] * 3


@small
def check_stats_of_any_strides():
    *inputs, outputs = stats_cases.make_inputs(stats_cases.Case("s", 20, 32, 200, "", bias=True), torch.float32, "cpu")
    hidden, weight, targets, bias, softcap, scale = inputs
    hidden = hidden.T.contiguous().T
    weight = torch.randn(400, 64)[::2, ::2].copy_(weight)
    bias = torch.randn(400)[::2].copy_(bias)
    targets = torch.zeros(40, dtype=torch.int64)[::2].copy_(targets)
    assert not any(x.is_contiguous() for x in (hidden, weight, bias, targets))
    compare_stats((hidden, weight, targets, bias, softcap, scale, outputs))


@small
def check_stats_ties_go_to_the_first_word_and_large_logits_keep_their_digits():
    hidden = torch.randint(-2, 3, (9, 32)).float()
    weight = torch.randint(-2, 3, (300, 32)).float().repeat(4, 1)  # every word four times, in two slices
    targets = torch.arange(9)
    got = compare_stats((hidden, weight, targets, None, None, 1.0, stats_cases.ALL_OUTPUTS))
    assert torch.equal(got["argmax"], placed((hidden @ weight[:300].T).argmax(1)))
    assert torch.equal(got["top1_logprob"], got["top2_logprob"])
    compare_stats((hidden * 64, weight * 64, targets, None, None, 1.0, stats_cases.ALL_OUTPUTS))


@small
def check_stats_repeat_bit_for_bit_and_do_not_depend_on_the_batch():
    *inputs, outputs = stats_cases.make_inputs(stats_cases.Case("b", 70, 32, 200, ""), torch.float32, "cpu")
    hidden, weight, targets, *options = map(placed, inputs)
    first, again, few = (
        stats_api.linear_token_stats(hidden[:n], weight, targets[:n], *options, outputs, implementation="triton")
        for n in (70, 70, 5)
    )
    for a, b, c in zip(first, again, few, strict=True):
        assert torch.equal(a, b) and torch.equal(a[:5], c)


@pytest.mark.slow
def check_stats_address_rows_beyond_two_to_the_31(spread_storage):
    far = 2**30  # elements between rows: row 2 begins at 2^31
    storage = spread_storage(2 * far + 16, torch.float32)
    hidden = storage.as_strided((3, 16), (far, 1))
    hidden.copy_(torch.randn(3, 16))
    weight, targets = torch.randn(50, 16), torch.tensor([1, 2, 3])
    compare_stats((hidden, weight, targets, None, None, 1.0, stats_cases.ALL_OUTPUTS))
    compare_stats((weight, hidden, targets.repeat(17)[:50] % 3, None, None, 1.0, stats_cases.ALL_OUTPUTS))


def compare_attention(case, dtype):
    *qkv, segments, window, softcap, scale = map(placed, tree_cases.make_inputs(case, dtype, "cpu"))
    got = tree_api.tree_attention(*qkv, segments, window=window, softcap=softcap, scale=scale, implementation="triton")
    options = (segments, window, softcap, scale)
    truth = tree_reference.compute(*(x.double() for x in qkv), *options)
    plain = tree_reference.compute(*qkv, *options)
    if dtype == torch.bfloat16:
        # The interpreter cuts float32 to bfloat16 where a device rounds: up to one more unit in the last place.
        assert ((got.double() - truth).abs() <= 2**-6 * (1 + truth.abs())).all()
    elif got.numel():
        assert_as_exact(got, truth, plain, reduction_length=segments.n_tokens)
    assert got.shape == truth.shape


FAST_FORESTS = ["one", "tiny", "empty", "window", "softcap"]
FOREST = ((37, 3, 35, 1, 34, 30), (-1, 0, 1, 0, 3, -1))  # three levels, two roots


@small
@pytest.mark.parametrize("name", FAST_FORESTS)
def check_attention_matches_the_reference(name):
    compare_attention(tree_cases.CASES[name], torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [name for name, case in tree_cases.CASES.items() if not case.slow])
def check_attention_matches_the_reference_everywhere(name, dtype):
    compare_attention(tree_cases.CASES[name], dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("head", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def check_attention_tiles_of_every_architecture(architecture, head, dtype, monkeypatch):
    if head > tree_kernel.WIDEST_HEAD[dtype]:
        wide = torch.zeros(0, 1, head, dtype=dtype)
        assert "heads of at most 128 features" in tree_kernel.unsupported(wide, wide, wide, None, None, None, 1.0)
        return
    monkeypatch.setattr(tree_kernel, "triton_architecture", lambda tensor: architecture)
    compare_attention(tree_cases.Case("tiles", *FOREST, 2, 1, head, head, "one head size"), dtype)


@small
def check_attention_keeps_nan_with_the_descendants():
    case = tree_cases.Case("poisoned", *FOREST, 1, 1, 16, 16, "")
    segments = tree_cases.make_inputs(case, torch.float32, "cpu")[3]
    query, key, value = (placed(torch.randn(segments.n_tokens, 1, 16)) for _ in range(3))
    before = tree_api.tree_attention(query, key, value, segments, implementation="triton")
    poisoned = slice(segments.start_list[3], segments.start_list[4])
    key[poisoned] = value[poisoned] = torch.nan
    after = tree_api.tree_attention(query, key, value, segments, implementation="triton")
    descendants = slice(segments.start_list[3], segments.start_list[5])
    assert after[descendants].isnan().all()
    assert torch.equal(after[: descendants.start], before[: descendants.start])
    assert torch.equal(after[descendants.stop :], before[descendants.stop :])


@small
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.skipif(not INTERPRETED, reason="the interpreter's products are counted")
def check_attention_visits_only_blocks_in_which_something_is_seen(window, monkeypatch):
    builder = triton.runtime.interpreter.interpreter_builder
    dots = []
    plain_dot = type(builder).create_dot
    monkeypatch.setattr(builder, "create_dot", lambda *rest: dots.append(1) or plain_dot(builder, *rest), raising=False)
    starts = [0, *range(300, 720, 60)]  # a prompt and six answers
    segments = Segments(starts, [-1] + [0] * 6)
    query, key, value = (torch.randn(segments.n_tokens, 1, 16) for _ in range(3))
    inputs = (query, key, value, segments, window, None, 0.25)
    _, (launch,) = tree_kernel.plan(*inputs, architecture="sm_90")
    launch.run()
    block_q, block_k = launch.constants["BLOCK_Q"], launch.constants["BLOCK_K"]
    if window is None:
        programs = tree_kernel.work(launch, segments, 16).programs
        assert len(dots) == 2 * sum(p.number * sum(p.inner_passes) for p in programs)
    # A block of queries and a block of keys that share an attended pair lie in a band of this many pairs.
    seen = torch.minimum(segments.positions + 1, torch.tensor(window or segments.n_tokens))
    most = sum(
        (int(seen[first : first + block_q].max()) + block_q) / block_k + 2
        for first in segments.query_blocks(block_q)[0]
    )
    assert len(dots) <= 2 * most
    assert len(dots) < 2 * (segments.n_tokens / block_q) * (segments.n_tokens / block_k) / 2


@pytest.mark.slow
def check_attention_addresses_rows_beyond_two_to_the_31(spread_storage):
    far = 2**30
    storage = spread_storage(2 * far + 16, torch.float32)
    wide = storage.as_strided((3, 1, 16), (far, 16, 1))
    wide.copy_(torch.randn(3, 1, 16))
    segments = Segments([0, 3], [-1])
    got = tree_api.tree_attention(wide, wide, wide, segments, implementation="triton")
    near = wide.contiguous()
    assert torch.equal(got, tree_api.tree_attention(near, near, near, segments, implementation="triton"))


# ------------------------------------------------------------------------------------ planted faults: each is caught


def small_stats(dtype=torch.float32):
    inputs = stats_cases.make_inputs(stats_cases.Case("p", 8, 32, 64, "planted"), dtype, "cpu")
    results, launches = stats_kernel.plan(*inputs, architecture="sm_90")
    return inputs, results, launches


def check_planted_reading_past_the_vocabulary_is_caught():
    _, _, (main, _) = small_stats()
    with pytest.raises(triton.runtime.errors.InterpreterError, match="OutOfBoundsError"):
        main._replace(arguments=main.arguments | {"V": 65}).run()


def check_planted_rows_left_unwritten_are_caught():
    inputs, results, (main, merge) = small_stats()
    main.run()
    merge._replace(arguments=merge.arguments | {"T": 7, "SLICES": 1}).run()
    assert results["nll"][7].isnan()  # what was not written is not a number, and no comparison accepts it


def check_planted_bfloat16_products_of_the_interpreter_are_caught(monkeypatch):
    monkeypatch.setattr(triton_blocks, "_INTERPRETED", triton.language.constexpr(False))
    with pytest.raises(AssertionError):
        compare_stats(small_stats(torch.bfloat16)[0])


@small
def check_planted_mask_off_by_one_is_caught(monkeypatch):
    plain_run = Launch.run
    shifted = {"window": 19}
    monkeypatch.setattr(Launch, "run", lambda launch: plain_run(launch._replace(arguments=launch.arguments | shifted)))
    with pytest.raises(AssertionError):
        compare_attention(tree_cases.CASES["window"], torch.float32)
