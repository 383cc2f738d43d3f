import pytest
import torch

from fastsel.kernels._runtime import native
from fastsel.kernels._runtime.dispatch import refusal
from fastsel.kernels._runtime.testing import assert_as_exact
from fastsel.kernels.facility_location import facility_location
from fastsel.kernels.facility_location.api import IMPLEMENTATIONS
from fastsel.kernels.facility_location.cases import CASES, make_inputs

NEEDS_LIBRARY = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))
BOTH = [pytest.param("native", marks=NEEDS_LIBRARY), "torch"]
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}


def in_float64(inputs):
    return tuple(x.double() if isinstance(x, torch.Tensor) else x for x in inputs)


def call(inputs, implementation):
    candidates, points, best, raised, weights, similarity, gamma = inputs
    return facility_location(
        candidates, points, best, raised=raised, weights=weights, similarity=similarity, gamma=gamma,
        implementation=implementation,
    )  # fmt: skip


def assert_matches(got, inputs):
    truth, plain = call(in_float64(inputs), "reference"), call(inputs, "reference")
    assert got.dtype == torch.float64
    assert_as_exact(got, truth, plain, reduction_length=max(inputs[0].shape[1], len(inputs[1])))


def matches():
    """Every implementation, case and dtype; the large cases in float32 only."""
    for name in ("native", "torch"):
        for case in CASES.values():
            for dtype in ["float32"] if case.slow or case.n * case.m > 10**6 else DTYPES:
                if (name, dtype) != ("native", "float64"):
                    marks = [NEEDS_LIBRARY] * (name == "native") + [pytest.mark.slow] * case.slow
                    yield pytest.param(name, case, DTYPES[dtype], id=f"{name}-{case.name}-{dtype}", marks=marks)


@pytest.mark.parametrize(("implementation", "case", "dtype"), list(matches()))
def test_matches_reference(implementation, case, dtype):
    inputs = make_inputs(case, dtype, "cpu")
    reason, _ = refusal(implementation, IMPLEMENTATIONS[implementation], inputs)
    if reason:
        pytest.skip(reason)
    assert_matches(call(inputs, implementation), inputs)
