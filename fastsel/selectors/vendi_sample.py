"""The most diverse of some random draws, by the Vendi score."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastsel.errors import UsageError
from fastsel.selectors.rows import Rows, check_k, check_rows
from fastsel.selectors.spectrum import vendi_score


def vendi_sample(
    x: Any, k: int, *, draws: int = 10, q: float = 1.0, seed: int = 0, initial: ArrayLike | None = None
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Draw k rows at random, several times, and keep the draw with the largest Vendi score.

    Args:
        x: [n, d] finite numbers, compared by their cosine; numpy, mapped from a file, or torch on any device.
        k: how many; all rows when there are fewer.
        draws: how many draws compete.
        q: order of the score; see fastsel.metrics.vendi.
        seed: of the draws.
        initial: row numbers chosen before. They belong to every draw when it is scored, and are not returned.

    Returns:
        indices int64 [k] in the order drawn, and gains float64 [k]: each the score of the draw (with `initial`) divided
        by k, because a draw is judged as a whole; the first of equal draws is kept. Unlike those of other selectors,
        the first j rows are not the selection for k = j, but those of one random draw of j.

    Raises:
        UsageError: a row is not finite (it is named), or an argument is not as above.

    Cost: draws times 2 k d min(k, d) + 10 min(k, d)^3 flops in float64.
    Source: VendiSampling of the code of DiverseEvol (arXiv 2311.08182), a schedule that its paper compares with; score
        of Friedman & Dieng, "The Vendi Score", TMLR 2023 (arXiv 2210.02410).
    """
    if isinstance(draws, bool) or not isinstance(draws, (int, np.integer)) or draws < 1:
        raise UsageError(f"draws must be a whole number of at least 1, got {draws!r}")
    rows = Rows(x, unit=True)
    before = check_rows(initial, rows.n, "initial")
    k = check_k(k, rows.n - len(before))
    if k == 0:
        return np.zeros(0, np.int64), np.zeros(0)
    others = np.setdiff1d(np.arange(rows.n), before)
    generator = np.random.default_rng(seed)
    best, best_score = others[:0], -np.inf
    for _ in range(int(draws)):
        drawn = others[generator.permutation(len(others))[:k]]
        together = Rows(rows.exact(np.concatenate([before, drawn])), unit=True)
        score = vendi_score(together, q)
        if score > best_score:
            best, best_score = drawn, score
    return best.astype(np.int64), np.full(k, best_score / k)
