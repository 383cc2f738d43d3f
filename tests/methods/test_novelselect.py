"""NovelSelect over an embedded pool: the worked example, the authors' list, quotas and quality."""

import json
from pathlib import Path

import numpy as np
import pytest

import fastsel
from fastsel.errors import UsageError
from fastsel.io import open_pool
from fastsel.selectors.density import local_density

GOLDEN = Path(__file__).parents[1] / "selectors" / "golden" / "novelselect.json"


def pool_of(n, sources=None, scores=None):
    rows = [{"instruction": f"question {i}", "output": f"answer {i}"} for i in range(n)]
    for name, values in (("source", sources), ("s", scores)):
        for row, value in zip(rows, values or [], strict=False):
            row[name] = value
    return open_pool(rows, **({} if scores is None else {"score_column": "s"}))


def novelselect(matrix, **options):
    pool = options.pop("pool", None) or pool_of(len(matrix))
    return fastsel.novelselect(pool, encoder=np.asarray(matrix, np.float32), progress="none", **options)


def transcription(x, k, first, rule="official"):
    """The method from end to end, in float64: neighbours, densities, and every row's score at every step."""
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    of = x if rule == "official" else unit
    squares = np.sort(((of[:, None] - of[None]) ** 2).sum(2), axis=1)[:, 1:11]
    sigma = (squares.mean(1) + 1e-9) ** -0.5
    picks = [first]
    while len(picks) < k:
        scores = []
        for i in range(len(x)):
            distances = 1 - unit[picks] @ unit[i]
            if rule == "official":
                terms = np.sort(distances * (sigma[i] + sigma[picks])) / len(picks)
            else:
                terms = (distances * sigma[picks])[np.argsort(distances)]
            scores.append(-np.inf if i in picks else (terms / np.arange(1, len(picks) + 1)).sum())
        picks.append(int(np.argmax(scores)))
    return picks


def test_worked_example():
    """Unit vectors at 0, 90, 60 and 180 degrees, no density: tests/selectors/test_novelselect.py has the arithmetic.

    Seed 0 draws row 0 of 4; then comes 180 degrees with 2 (1 - cos 180) = 4, then 90 with (2 + 2/2) / 2 = 1.5.
    """
    angles = np.deg2rad([0, 90, 60, 180])
    got = novelselect(np.stack([np.cos(angles), np.sin(angles)], axis=1), budget=3, density_power=0)
    assert got.indices.tolist() == [0, 3, 1]
    assert got.gains[[0, 3, 1]] == pytest.approx([0, 4, 1.5], abs=1e-6)
    assert np.isnan(got.scores[2]) and got.eligible.all()


@pytest.mark.parametrize("rule", ["official", "paper"])
def test_matches_the_transcription(rule):
    x = np.random.default_rng(0).standard_normal((70, 6)).astype(np.float32)
    got = novelselect(x, budget=25, seed=3, rule=rule)
    assert got.indices.tolist() == transcription(x.astype(np.float64), 25, got.indices[0], rule)


def test_official_is_the_authors_list():
    """Recorded from their code in float32, first row included; see tests/selectors/golden/record_novelsum.py."""
    case = json.loads(GOLDEN.read_text())["cases"][0]
    x = np.random.RandomState(case["data_seed"]).standard_normal((case["n"], case["d"]))
    got = novelselect(x, budget=case["k"], official=True)
    assert got.indices.tolist() == case["indices"]


def test_quotas_hold_and_density_is_of_the_whole_pool():
    x = np.random.default_rng(2).standard_normal((40, 4))
    got = novelselect(x, pool=pool_of(40, ["a"] * 30 + ["b"] * 10), budget=8, per="source")
    assert (got.indices < 30).sum() == 6 and len(got) == 8
    alone = fastsel.selectors.novelselect(
        x[:30].astype(np.float32), 6, seed=0, density=local_density(x.astype(np.float32))[:30]
    )[0]
    assert got.indices[:6].tolist() == alone.tolist()


def test_quality_multiplies_the_novelty():
    x = np.random.default_rng(3).standard_normal((30, 5))
    scores = [1.0 if i in (4, 9, 22) else 0.0 for i in range(30)]
    got = novelselect(x, pool=pool_of(30, scores=scores), quality="score", budget=4)
    assert set(got.indices[1:].tolist()) <= {4, 9, 22}
    assert np.isnan(got.scores).sum() == 26


def test_refuses():
    x = np.eye(12)
    for options, message in [
        ({"rule": "code"}, "rule must be one of official, paper"),
        ({"model": "bundled"}, "model is for quality='perplexity' or 'reward'"),
        ({"density_power": -1.0}, "beta must be a number of at least 0"),
        ({"budget": "10tok"}, "counts tokens, but this method counts none"),
    ]:
        with pytest.raises(UsageError, match=message):
            novelselect(x, **({"budget": 3} | options))
