"""The facility_location kernel against the bare matrix product of its shape, and against plain torch."""

import pytest
import torch

from fastsel.kernels.facility_location import facility_location
from fastsel.kernels.facility_location.cases import CASES, make_inputs


def ours(inputs, implementation):
    candidates, points, best, raised, weights, similarity, gamma = inputs
    return facility_location(
        candidates, points, best, raised=raised, weights=weights, similarity=similarity, gamma=gamma,
        implementation=implementation,
    )  # fmt: skip


@pytest.mark.parametrize("case", [pytest.param("update", marks=pytest.mark.gate)])
def test_bare_matrix_product(compare, case):
    inputs = make_inputs(CASES[case], torch.float32, "cpu")
    candidates, points = inputs[:2]
    buffer = torch.empty(len(candidates), len(points))
    expected = ours(inputs, "reference")
    compare(
        lambda: ours(inputs, "auto"), lambda: torch.mm(candidates, points.T, out=buffer),
        op="facility_location", case=case, name="torch.mm alone",
        check=lambda gains, _: torch.testing.assert_close(gains, expected, rtol=1e-5, atol=1e-5),
    )  # fmt: skip
