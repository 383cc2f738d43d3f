"""NovelSum against its formula in float64 and against the authors' numbers."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsel.errors import UsageError
from fastsel.metrics import dist_sum, novelsum, novelsum_grid

GOLDEN = Path(__file__).parents[1] / "selectors" / "golden" / "novelsum.json"


def by_formula(x, reference, alpha, beta, k, *, side="row", include_self=True, normalise="mean", sigma="mean_squared"):
    """Row by row, as it reads; for a reference without equal rows that holds x."""
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    unit_reference = reference / np.linalg.norm(reference, axis=1, keepdims=True)
    density, values = [], []
    for row, unit_row in zip(x, unit, strict=True):
        if sigma == "mean_squared":
            spread = np.sort(((row - reference) ** 2).sum(1))[1 : k + 1].mean()
        else:
            spread = np.sort(1 - unit_reference @ unit_row)[1 : k + 1].sum()
        density.append((spread + 1e-9) ** -beta)
    density = np.array(density)
    for i in range(len(x)):
        others = [j for j in range(len(x)) if include_self or j != i]
        distances = 1 - unit[others] @ unit[i]
        if side == "row":
            terms = np.sort(distances) * density[i]
        elif side == "column":
            terms = (distances * density[others])[np.argsort(distances, kind="stable")]
        else:
            terms = np.sort(distances * (density[i] + density[others]))
        weights = np.arange(1, len(others) + 1) ** -float(alpha)
        values.append(weights @ terms / (weights.sum() if normalise == "mean" else 1))
    return np.mean(values) if normalise == "mean" else np.sum(values)


def test_worked_example():
    """Three unit vectors at 0, 90 and 180 degrees; beta 0 makes every density 1; alpha 1, itself included.

    Row 0: 0, 1, 2 -> (0 + 1/2 + 2/3) / (11/6) = 7/11; row 1: 0, 1, 1 -> (1/2 + 1/3) / (11/6) = 5/11; row 2 as row 0.
    Without itself: rows 0 and 2: (1 + 2/2) / 1.5 = 4/3; row 1: (1 + 1/2) / 1.5 = 1.
    """
    x = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    assert novelsum(x, beta=0) == pytest.approx(19 / 33, rel=1e-6)
    assert novelsum(x, beta=0, include_self=False) == pytest.approx((4 / 3 + 1 + 4 / 3) / 3, rel=1e-6)
    assert novelsum(x, beta=0, normalise="sum") == pytest.approx(19 / 33 * 3 * 11 / 6, rel=1e-6)
    # Squared distances to the nearest other row are 2, so sigma is 2^-1/2 for all three.
    assert novelsum(x, neighbours=1) == pytest.approx(19 / 33 * 2**-0.5, rel=1e-6)


@pytest.mark.parametrize("sigma", ["mean_squared", "sum_cosine"])
@pytest.mark.parametrize("normalise", ["mean", "sum"])
@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("side", ["row", "column", "both"])
def test_matches_the_formula(side, include_self, normalise, sigma):
    generator = np.random.default_rng(0)
    reference = generator.standard_normal((120, 10)) + 0.3
    x = reference[20:70]
    options = {"normalise": normalise, "sigma": sigma, "include_self": include_self}
    grid = novelsum_grid(
        x, reference, density_side=side, alphas=(0, 0.5, 2), betas=(0, 1), neighbours=(3, 7), **options
    )
    assert len(grid) == 12
    for (k, beta, alpha), value in grid.items():
        expected = by_formula(x, reference, alpha, beta, k, side=side, **options)
        assert value == pytest.approx(expected, rel=2e-6), (k, beta, alpha)


@pytest.mark.parametrize("name", ["inside", "outside", "copies"])
def test_the_authors_numbers(name):
    """Their command line's grid; "copies" has distances of the size of rounding where alpha is 2."""
    reference = np.random.RandomState(3).standard_normal((900, 32))
    x = {
        "inside": reference[100:300],
        "outside": np.random.RandomState(4).standard_normal((150, 32)) + 0.3,
        "copies": np.repeat(reference[:60], 3, axis=0),
    }[name]
    recorded = json.loads(GOLDEN.read_text())["sets"][name]
    for (k, beta, alpha), value in novelsum_grid(x, reference).items():
        expected = recorded[f"neighbor_{k}_density_{beta}_distance_{alpha}"]
        assert value == pytest.approx(expected, rel=2e-6, abs=1e-7), (k, beta, alpha)
    assert dist_sum(x, average="all") == pytest.approx(recorded["cos_distance"], rel=2e-6)


@settings(max_examples=20, deadline=None)
@given(n=st.integers(2, 40), seed=st.integers(0, 99), scale=st.sampled_from([0.25, 2.0]))
def test_law_order_scale_and_copies(n, seed, scale):
    x = np.random.default_rng(seed).standard_normal((n, 5))
    value = novelsum(x, neighbours=3)
    assert novelsum(x[::-1], neighbours=3) == pytest.approx(value, rel=1e-5)
    # Distances are cosines; squared distances to neighbours grow with the square of the scale.
    assert novelsum(x * scale, neighbours=3) == pytest.approx(value / scale, rel=1e-5)
    assert novelsum(np.concatenate([x, x]), x, neighbours=3) < value


def test_edges():
    assert np.isnan(novelsum(np.zeros((0, 3))))
    assert novelsum(np.ones((1, 3)), beta=0) == pytest.approx(0, abs=1e-6)
    assert novelsum(np.ones((4, 3)), beta=0) == pytest.approx(0, abs=1e-6)
    assert novelsum(np.zeros((3, 2)), beta=0) == pytest.approx(
        1
    )  # a row of zeros is at distance 1 from every row, itself too


def test_refuses():
    x = np.ones((4, 3))
    for call, message in [
        (lambda: novelsum(x, density_side="rows"), "density_side must be one of row, column, both, got 'rows'"),
        (lambda: novelsum(x, normalise="max"), "normalise must be one of mean, sum"),
        (lambda: novelsum(x, sigma="sum"), "sigma must be one of mean_squared, sum_cosine"),
        (lambda: novelsum(x, alpha=-1), "alpha must be a number of at least 0, got -1"),
        (lambda: novelsum(x, neighbours=0), "neighbours must be a whole number of at least 1, got 0"),
        (lambda: novelsum(x, np.ones((4, 2))), "reference has 2 features a row, x has 3"),
        (lambda: novelsum(np.full((2, 2), np.nan)), "x: row 0 holds NaN or infinity"),
    ]:
        with pytest.raises(UsageError, match=message):
            call()
