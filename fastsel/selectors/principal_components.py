"""Principal components of a few rows: the directions in which they vary, each with a sign that is stated."""

import numpy as np
import torch
from numpy.typing import NDArray

from fastsel.errors import UsageError
from fastsel.selectors.rows import BLOCK_ROWS, BLOCK_VALUES, Rows

SIGNS = ("target", "sklearn")
# An inner product of unit vectors below this says nothing about a sign.
NO_SIGN = 1e-9


def principal_components(
    x: Rows, *, variance: float = 0.5, sign: str = "target"
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The fewest components that explain more than a share of the rows' variance around their mean.

    Args:
        x: [m, d] rows; at least two different ones.
        variance: above 0 and below 1.
        sign: "target": a component's inner product with the mean row is >= 0 (where that is 0, the next rule);
            "sklearn": its entry of largest magnitude is positive, as PCA of scikit-learn 1.5 and later has it.

    Returns:
        components float64 [q, d] of unit length, largest variance first, and their shares of the variance float64 [q],
        not rescaled. Equal variances leave a component free to turn; a sign does not mend that.

    Raises:
        UsageError: an option is not as above, or the rows do not vary.

    Cost: min(m, d) m d multiplications in float64; memory min(m, d)^2 numbers, and blocks of rows.
    """
    if not 0 < variance < 1:
        raise UsageError(f"variance must be a share above 0 and below 1, got {variance}")
    if sign not in SIGNS:
        raise UsageError(f"sign must be one of {', '.join(SIGNS)}, got {sign!r}")
    size = min(BLOCK_ROWS, max(1, BLOCK_VALUES // x.d))
    parts = [slice(start, min(x.n, start + size)) for start in range(0, x.n, size)]
    mean = torch.zeros(x.d, dtype=torch.float64, device=x.device)
    for part in parts:
        mean += x.exact(part).sum(0) / x.n
    if x.n <= x.d:
        inner = torch.zeros(x.n, x.n, dtype=torch.float64, device=x.device)
        for part in parts:
            block = x.exact(part) - mean
            for other in parts:
                inner[part, other] = block @ (x.exact(other) - mean).T
    else:
        inner = torch.zeros(x.d, x.d, dtype=torch.float64, device=x.device)
        for part in parts:
            block = x.exact(part) - mean
            inner += block.T @ block
    values, vectors = torch.linalg.eigh(inner) if x.n else (mean[:0], inner)
    values = values.flip(0).clamp(min=0)
    total = float(values.sum())
    # What subtracting the mean leaves of equal rows is their rounding.
    if not total > 1e-24 * float(mean @ mean) * max(x.n, 1):
        raise UsageError(
            f"the {x.n} target rows do not differ, so that they have no principal components: give other rows, or "
            "components="
        )
    shares = values.cpu().numpy() / total
    q = min(int(np.searchsorted(np.cumsum(shares), variance, side="right")) + 1, int((shares > 1e-15).sum()))
    leading = vectors.flip(1)[:, :q]
    if x.n <= x.d:
        directions = torch.zeros(q, x.d, dtype=torch.float64, device=x.device)
        for part in parts:
            directions += leading[part].T @ (x.exact(part) - mean)
    else:
        directions = leading.T
    components: NDArray[np.float64] = directions.cpu().numpy().copy()
    components /= np.linalg.norm(components, axis=1, keepdims=True)
    return components * _signs(components, mean.cpu().numpy(), sign)[:, None], shares[:q]


def _signs(components: NDArray[np.float64], mean: NDArray[np.float64], sign: str) -> NDArray[np.float64]:
    """Float64 [q] of 1 and -1."""
    largest = np.take_along_axis(components, np.abs(components).argmax(1)[:, None], axis=1)[:, 0]
    signs = np.where(largest < 0, -1.0, 1.0)
    if sign == "target":
        along = components @ mean
        signs = np.where(np.abs(along) > NO_SIGN * np.linalg.norm(mean), np.where(along < 0, -1.0, 1.0), signs)
    return signs
