"""linear_token_stats against the bare matrix product of its shape, and against torch with the logits stored.

Peers are functions of the same inputs; the matrix product writes into a buffer that it is given, everything else
allocates what it needs. GPU rows compare the same on the device.
"""

import pytest
import torch
from torch.nn import functional as F

from fastsel.kernels._runtime.testing import assert_as_exact
from fastsel.kernels.linear_token_stats import linear_token_stats
from fastsel.kernels.linear_token_stats.cases import ALL_OUTPUTS, CASES, make_inputs

NLL = ("nll",)
WITH_MARGIN = ("nll", "entropy", "top1_logprob", "top2_logprob")
SLOW = pytest.param("smollm2", marks=pytest.mark.slow)
GATE = pytest.param("smollm2_batch", marks=pytest.mark.gate)


def logits_nll(hidden, weight, targets):
    """What one writes first."""
    return {"nll": F.cross_entropy(hidden @ weight.T, targets, ignore_index=-1, reduction="none")}


def logits_nll_entropy_margin(hidden, weight, targets):
    """The same with entropy and the two best words."""
    logprobs = F.log_softmax(hidden @ weight.T, dim=1)
    best = logprobs.topk(2, dim=1).values
    return {
        "nll": F.nll_loss(logprobs, targets, ignore_index=-1, reduction="none"),
        "entropy": -(logprobs.exp() * logprobs).sum(1),
        "top1_logprob": best[:, 0],
        "top2_logprob": best[:, 1],
    }


def chunked_linear_cross_entropy(hidden, weight, targets):
    """torch's own way to store no logits; without reduction, as scores need one value a row."""
    options = torch.nn.LinearCrossEntropyOptions()
    loss = F.linear_cross_entropy(hidden, weight, targets, reduction="none", ignore_index=-1, options=options)
    return {"nll": loss}


PEERS = [
    pytest.param(logits_nll, NLL, "torch, logits stored: nll", id="nll"),
    pytest.param(logits_nll_entropy_margin, WITH_MARGIN, "torch, logits stored: nll, entropy, margin", id="margin"),
    pytest.param(chunked_linear_cross_entropy, NLL, "F.linear_cross_entropy, chunked", id="chunked"),
]


def ours(inputs, outputs, implementation):
    return linear_token_stats(*inputs[:-1], outputs, implementation=implementation)


def check_against_reference(inputs, stats):
    """The gate of everything below: no number for values that are not right."""
    rows = slice(0, 64)
    sample = (inputs[0][rows], inputs[1], inputs[2][rows], *inputs[3:])
    exact = tuple(x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in sample)
    truth = linear_token_stats(*exact, implementation="reference")
    plain = linear_token_stats(*sample, implementation="reference")
    for name in ALL_OUTPUTS[:-1]:
        if getattr(stats, name) is not None:
            assert_as_exact(
                getattr(stats, name)[rows], getattr(truth, name), getattr(plain, name),
                reduction_length=inputs[0].shape[1], what=name,
            )  # fmt: skip


def agrees(inputs):
    def check(stats, peer):
        check_against_reference(inputs, stats)
        for name, values in peer.items():
            torch.testing.assert_close(getattr(stats, name), values, rtol=1e-4, atol=1e-4)

    return check


@pytest.mark.parametrize("outputs", [ALL_OUTPUTS, NLL], ids=["all", "nll"])
@pytest.mark.parametrize("case", [GATE, SLOW])
def test_bare_matrix_product(compare, case, outputs):
    """The floor that storing logits cannot pass: ratio >= 1 means that the statistics cost less than nothing."""
    inputs = make_inputs(CASES[case], torch.float32, "cpu")
    hidden, weight = inputs[:2]
    buffer = torch.empty(len(hidden), len(weight))
    found = compare(
        lambda: ours(inputs, outputs, "native"), lambda: torch.mm(hidden, weight.T, out=buffer),
        op="linear_token_stats", case=f"{case}, {'all outputs' if outputs == ALL_OUTPUTS else 'nll'}",
        name="torch.mm alone", check=lambda stats, _: check_against_reference(inputs, stats),
    )  # fmt: skip
    assert found.ratio_cpu > 1


@pytest.mark.parametrize(("peer", "outputs", "name"), PEERS)
@pytest.mark.parametrize("case", ["smollm2_batch", SLOW])
def test_torch(compare, peak_memory, case, peer, outputs, name):
    inputs = make_inputs(CASES[case], torch.float32, "cpu")
    _, our_peak = peak_memory(lambda: ours(inputs, outputs, "native"))
    _, peer_peak = peak_memory(lambda: peer(*inputs[:3]))
    found = compare(
        lambda: ours(inputs, outputs, "native"), lambda: peer(*inputs[:3]),
        op="linear_token_stats", case=case, name=name, check=agrees(inputs),
        info={"our_peak_bytes": our_peak, "peer_peak_bytes": peer_peak},
    )  # fmt: skip
    assert found.ratio_cpu > 1.2
    assert our_peak <= 16 * 2**20


@pytest.mark.parametrize("implementation", ["torch"])
def test_without_the_compiled_library(compare, implementation):
    """What a machine without a compiler gets."""
    inputs = make_inputs(CASES["smollm2_batch"], torch.float32, "cpu")
    compare(
        lambda: ours(inputs, ALL_OUTPUTS, "native"), lambda: ours(inputs, ALL_OUTPUTS, implementation)._asdict(),
        op="linear_token_stats", case="smollm2_batch, all outputs", name=f"our {implementation}",
        check=agrees((*inputs[:-1], ALL_OUTPUTS)),
    )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize(("peer", "outputs", "name"), PEERS[:2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_torch_on_the_gpu(compare, dtype, peer, outputs, name):
    inputs = make_inputs(CASES["smollm2"], dtype, "cuda")
    widened = [x.float() if x.is_floating_point() else x for x in inputs[:3]]

    def synchronised(function, *arguments):
        result = function(*arguments)
        torch.cuda.synchronize()
        return result

    compare(
        lambda: synchronised(ours, inputs, outputs, "triton"), lambda: synchronised(peer, *widened),
        op="linear_token_stats", case=f"smollm2, {torch.cuda.get_device_name()}, {dtype}", name=name,
        check=agrees(inputs),
    )  # fmt: skip
