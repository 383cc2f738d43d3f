"""Every kernel's cases at their real sizes on a GPU: "auto" takes Triton, which is as exact as plain code.

The references run on the device too, in float64, and in parts where one would not fit.
"""

import importlib

import pytest
import torch

pytest.importorskip("triton")

from fastsel.commands.kernel_check import compare, kernel_names  # noqa: E402
from fastsel.kernels._runtime.devices import triton_architecture  # noqa: E402
from fastsel.kernels._runtime.dispatch import recording, run  # noqa: E402
from fastsel.kernels._runtime.triton_launch import INTERPRETED  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(INTERPRETED, reason="compiled kernels are what is tested")]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What the kernels do not take, and plain torch does.
BY_TORCH = {("topk_similarity", "no_points"), ("topk_similarity", "many_kept")}
PART_TOKENS, PART_COORDINATES = 2048, 16_384


def part_of(kernel, name):
    return importlib.import_module(f"fastsel.kernels.{kernel}.{name}")


def copied(inputs):
    return [x.clone() if isinstance(x, torch.Tensor) else x for x in inputs]


def widened(inputs):
    return [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs]


def referred(kernel, inputs):
    """The reference's results: all logits, or the whole matrix of signs, may be larger than the device's memory."""
    compute = part_of(kernel, "reference").compute
    if kernel == "linear_token_stats" and len(inputs[0]) > PART_TOKENS:
        hidden, weight, targets, *options = inputs
        parts = [
            compute(h, weight, t, *options)
            for h, t in zip(hidden.split(PART_TOKENS), targets.split(PART_TOKENS), strict=True)
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    if kernel == "random_projection" and inputs[2] == "rademacher":
        x, k, kind, sparsity, seed, first, out = inputs
        for start in range(0, x.shape[1], PART_COORDINATES):
            compute(x[:, start : start + PART_COORDINATES], k, kind, sparsity, seed, first + start, out)
        return out
    return compute(*inputs)


def cases():
    for kernel in kernel_names():
        for case in part_of(kernel, "cases").CASES.values():
            for dtype in DTYPES:
                name = f"{kernel}-{case.name}-{str(dtype).removeprefix('torch.')}"
                yield pytest.param(kernel, case, dtype, id=name)


@pytest.fixture(autouse=True)
def memory_given_back():
    """Other processes of a parallel run need what this one has reserved."""
    yield
    torch.cuda.empty_cache()


@pytest.mark.parametrize(("kernel", "case", "dtype"), list(cases()))
@torch.inference_mode()
def test_matches_reference(kernel, case, dtype):
    inputs = part_of(kernel, "cases").make_inputs(case, dtype, "cuda")
    with recording() as ran:
        got = run(part_of(kernel, "api").IMPLEMENTATIONS, "auto", *copied(inputs))
    here = triton_architecture(torch.empty(0, device="cuda"))
    assert ran == {kernel: "torch" if (kernel, case.name) in BY_TORCH else f"triton-{here}"}
    again = run(part_of(kernel, "api").IMPLEMENTATIONS, "auto", *copied(inputs))
    truth, plain = referred(kernel, widened(copied(inputs))), referred(kernel, copied(inputs))
    _, problem = compare(got, truth, plain, dtype)
    assert problem is None, problem
    for first, second in zip(tensors(got), tensors(again), strict=True):
        assert torch.equal(torch.nan_to_num(first), torch.nan_to_num(second)), "two runs differ in their bits"


def tensors(results):
    if isinstance(results, torch.Tensor):
        return [results]
    values = results.values() if isinstance(results, dict) else results
    return [value for value in values if isinstance(value, torch.Tensor)]
