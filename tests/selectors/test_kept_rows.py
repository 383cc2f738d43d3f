import numpy as np
import pytest
import torch

from fastsel.kernels.facility_location import Pairs
from fastsel.selectors.kept_rows import KeptRows


def pairs_above(s, rows, best):
    """All pairs of these rows of s [n, m] that exceed best [m]."""
    row, point = torch.nonzero(torch.from_numpy(s[rows] > best), as_tuple=True)
    starts = torch.searchsorted(row, torch.arange(len(rows) + 1))
    return Pairs(starts, point.int(), torch.from_numpy(s[rows])[row, point])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("capacity", [10**6, 60])
def test_law_gains_are_those_of_whole_rows_however_little_room_there_is(capacity, weighted):
    """Rows come, shrink as best rises, and go; what is kept adds what all similarities of the row would."""
    random = np.random.default_rng(0)
    n, m = 40, 25
    s, weights = random.standard_normal((n, m)), random.random(m) if weighted else None
    best, kept = np.full(m, -np.inf), KeptRows(n, capacity)
    forgotten = False
    for step in range(30):
        missing = random.permutation(np.setdiff1d(np.arange(n), kept.numbers))[:3]
        others = np.setdiff1d(kept.numbers, missing)
        kept.keep(missing, pairs_above(s, missing, best), others)
        assert kept.has_each(missing).all() and all(kept.has(row) for row in missing.tolist())
        rows = random.permutation(kept.numbers)
        terms = np.where(np.isinf(best), s[rows], np.maximum(s[rows] - best, 0))
        expected = terms.sum(1) if weights is None else terms @ weights
        for _ in range(2):  # the second time from what the first left
            np.testing.assert_allclose(kept.gains(rows, best, weights), expected, rtol=1e-12, atol=1e-12)
        points, similarities = kept.pairs_of(int(rows[0]))
        assert np.array_equal(similarities, s[rows[0], points])
        forgotten |= not kept.has_each(others).all()
        best = np.maximum(best, s[step] - 1.0)
    assert forgotten == (capacity == 60)


def test_edges_rows_without_pairs():
    kept = KeptRows(3, 10)
    empty = Pairs(
        torch.zeros(3, dtype=torch.int64), torch.zeros(0, dtype=torch.int32), torch.zeros(0, dtype=torch.float64)
    )
    kept.keep(np.array([0, 2]), empty, np.zeros(0, np.int64))
    assert kept.numbers.tolist() == [0, 2] and not kept.has(1)
    assert kept.gains(np.array([2, 0]), np.zeros(4), None).tolist() == [0, 0]
