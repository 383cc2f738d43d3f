"""The tolerance policy refuses what it has to refuse; everything else in tests/kernels stands on it."""

import pytest
import torch

from fastsel.kernels._runtime.testing import assert_as_exact

NAN, INF = float("nan"), float("inf")


def check(got: list[float], truth: list[float]) -> float:
    exact = torch.tensor(truth, dtype=torch.float64)
    return assert_as_exact(torch.tensor(got), exact, exact.float(), reduction_length=4)


def test_equal_values_pass_with_nan_and_infinities_in_place():
    assert check([1.0, NAN, INF, -INF], [1.0, NAN, INF, -INF]) == 0.0


@pytest.mark.parametrize(
    ("got", "truth"),
    [
        ([0.0, 1.0], [NAN, 1.0]),
        ([NAN, 1.0], [0.0, 1.0]),
        ([INF, 1.0], [-INF, 1.0]),
        ([3.4e38, 1.0], [INF, 1.0]),
        ([INF, 1.0], [NAN, 1.0]),
        ([1.001, 1.0], [1.0, 1.0]),
    ],
)
def test_a_wrong_value_fails(got, truth):
    with pytest.raises(AssertionError):
        check(got, truth)


def test_a_wrong_shape_fails():
    with pytest.raises(AssertionError, match="shape"):
        check([1.0], [1.0, 2.0])


def test_errors_of_rounding_pass_and_larger_ones_do_not():
    assert check([1.0 + 2.0**-23], [1.0]) > 0
    with pytest.raises(AssertionError, match="allowed"):
        check([1.0 + 2.0**-20], [1.0])
