"""tree_attention against SDPA: one call a segment with its mask (our torch implementation), and one call in all.

The single call is what a packed batch costs when the forest is a dense mask: it computes every pair of the row.
"""

import pytest
import torch
from torch.nn import functional as F

from fastsel.kernels._runtime.testing import assert_as_exact
from fastsel.kernels.tree_attention import tree_attention
from fastsel.kernels.tree_attention.cases import CASES, cost, make_inputs

GATE = pytest.param("smollm2_batch", marks=pytest.mark.gate)
OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("short_rows", "long_row", "llama_8b_batch")]


def dense_mask(segments):
    """[t, t] bool: what each row sees."""
    seen = torch.zeros(segments.n_tokens, segments.n_tokens, dtype=torch.bool)
    starts = segments.start_list
    for s in range(len(segments)):
        own = slice(starts[s], starts[s + 1])
        for ancestor in segments.path(s):
            seen[own, starts[ancestor] : starts[ancestor + 1]] = True
        seen[own, own] = torch.ones(own.stop - own.start, own.stop - own.start, dtype=torch.bool).tril()
    return seen


def dense_attention(query, key, value, mask):
    """One SDPA call over the whole packed row."""
    heads_first = (x.transpose(0, 1)[None] for x in (query, key, value))
    return F.scaled_dot_product_attention(*heads_first, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)


def agrees(inputs):
    def check(ours, peer):
        exact = tuple(x.double() if isinstance(x, torch.Tensor) else x for x in inputs)
        truth = tree_attention(*exact, implementation="torch")
        plain = tree_attention(*inputs, implementation="torch")
        longest = int(inputs[3].positions.max()) + 1
        for result in (ours, peer):
            assert_as_exact(result.float(), truth, plain.float(), reduction_length=longest + inputs[0].shape[2])

    return check


@pytest.mark.parametrize("case", [GATE, *OTHERS])
def test_sdpa_over_segments(compare, case):
    inputs = make_inputs(CASES[case], torch.float32, "cpu")
    found = compare(
        lambda: tree_attention(*inputs, implementation="native"),
        lambda: tree_attention(*inputs, implementation="torch"),
        op="tree_attention", case=case, name="SDPA, one call a segment", check=agrees(inputs),
        info={"flops": cost(CASES[case])[0]}, rounds=15,
    )  # fmt: skip
    assert found.ratio_cpu > 1


@pytest.mark.parametrize("case", ["smollm2_batch", *OTHERS])
def test_sdpa_with_a_dense_mask(compare, case):
    inputs = make_inputs(CASES[case], torch.float32, "cpu")
    mask = dense_mask(inputs[3])
    found = compare(
        lambda: tree_attention(*inputs, implementation="native"), lambda: dense_attention(*inputs[:3], mask),
        op="tree_attention", case=case, name="SDPA, dense mask", check=agrees(inputs), rounds=15,
    )  # fmt: skip
    assert found.ratio_cpu > 1


@pytest.mark.parametrize("case", ["smollm2_batch"])
def test_share_of_the_matrix_product_rate(compare, case):
    """How close the pairs come to the rate of a matrix product with the same number of flops."""
    inputs = make_inputs(CASES[case], torch.float32, "cpu")
    rows = round(cost(CASES[case])[0] / (2 * 576 * 1536))
    left, right = torch.randn(rows, 576), torch.randn(1536, 576)
    compare(
        lambda: tree_attention(*inputs, implementation="native"), lambda: F.linear(left, right),
        op="tree_attention", case=case, name="torch.mm of the same flops (n x 576 x 1536)", check=None, rounds=15,
    )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", ["smollm2_batch", "llama_8b_batch"])
def test_sdpa_on_the_gpu(compare, case, dtype):
    inputs = make_inputs(CASES[case], dtype, "cuda")

    def synchronised(implementation):
        result = tree_attention(*inputs, implementation=implementation)
        torch.cuda.synchronize()
        return result

    compare(
        lambda: synchronised("triton"), lambda: synchronised("torch"),
        op="tree_attention", case=f"{case}, {torch.cuda.get_device_name()}, {dtype}", name="SDPA, one call a segment",
        check=agrees(inputs), rounds=15,
    )  # fmt: skip
