import numpy as np
import pytest
import torch

from fastsel.errors import UsageError
from fastsel.selectors import vendi_sample
from fastsel.selectors.rows import Rows
from fastsel.selectors.spectrum import effective_number, gram_eigenvalues, vendi_score


def matrix(n=60, d=8, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d))


def naive_vendi(x, q=1.0):
    """The formula, from the whole similarity matrix in float64."""
    unit = x / np.where(np.linalg.norm(x, axis=1, keepdims=True) > 0, np.linalg.norm(x, axis=1, keepdims=True), 1)
    values = np.linalg.eigvalsh(unit @ unit.T / len(x))
    values = values[values > 1e-12]
    if q == 1:
        return np.exp(-(values * np.log(values)).sum())
    return 1 / values.max() if q == np.inf else np.exp(np.log((values**q).sum()) / (1 - q))


@pytest.mark.parametrize("q", [0.5, 1.0, 2.0, np.inf])
@pytest.mark.parametrize("shape", [(60, 8), (8, 60), (20, 20), (1, 5)])
def test_the_score_from_the_smaller_side_is_the_score(shape, q):
    x = matrix(*shape)
    assert vendi_score(Rows(x, unit=True), q) == pytest.approx(naive_vendi(x, q), rel=1e-9)


def test_the_score_counts_what_differs():
    assert vendi_score(Rows(np.eye(5), unit=True)) == pytest.approx(5, rel=1e-12)
    assert vendi_score(Rows(np.ones((7, 3)), unit=True)) == pytest.approx(1, rel=1e-12)
    assert vendi_score(Rows(np.repeat(np.eye(3), 4, axis=0), unit=True), 0) == pytest.approx(3)
    assert vendi_score(Rows(np.zeros((0, 3)), unit=True)) == 0
    assert effective_number(np.array([0.5, 0.25, 0.25]), 1) == pytest.approx(2**1.5)
    with pytest.raises(UsageError, match="q must be at least 0"):
        effective_number(np.ones(1), -1)


def test_blocks_of_rows_add_up(monkeypatch):
    x = Rows(matrix(100, 5), unit=True)
    whole = gram_eigenvalues(x)
    monkeypatch.setattr("fastsel.selectors.spectrum.BLOCK_ROWS", 7)
    np.testing.assert_allclose(gram_eigenvalues(x), whole, rtol=1e-12)


def test_keeps_the_best_of_the_draws():
    x = matrix()
    indices, gains = vendi_sample(x, 10, draws=25, seed=3)
    generator = np.random.default_rng(3)
    scores = {tuple(draw): naive_vendi(x[draw]) for draw in (generator.permutation(60)[:10] for _ in range(25))}
    best = max(scores, key=scores.get)
    assert tuple(indices) == best
    assert gains.sum() == pytest.approx(scores[best], rel=1e-9) and indices.dtype == np.int64


def test_more_draws_are_never_worse_and_one_draw_is_a_random_one():
    x = matrix()
    scores = [vendi_sample(x, 12, draws=draws, seed=5)[1].sum() for draws in (1, 5, 20)]
    assert scores == sorted(scores)
    assert np.array_equal(vendi_sample(x, 12, draws=1, seed=5)[0], np.random.default_rng(5).permutation(60)[:12])


def test_rows_chosen_before_belong_to_every_draw():
    x = np.concatenate([np.repeat(np.eye(3, 5), 4, axis=0), np.eye(5)[3:]])  # 12 rows along 3 axes, 2 along others
    indices, gains = vendi_sample(x, 2, draws=200, seed=0, initial=range(8))
    assert sorted(indices.tolist()) == [12, 13]  # without rows 0 to 7, 8 to 11 would do as well
    assert gains.sum() == pytest.approx(naive_vendi(x[[*range(8), 12, 13]]), rel=1e-9)


def test_edges():
    x = matrix(6)
    assert sorted(vendi_sample(x, 99, draws=2)[0]) == list(range(6))
    assert vendi_sample(x, 0)[0].tolist() == vendi_sample(np.zeros((0, 3)), 3)[0].tolist() == []
    assert len(vendi_sample(np.zeros((5, 3)), 2)[0]) == 2
    for given in (x.astype(np.float32), torch.from_numpy(x), x.tolist()):
        indices, gains = vendi_sample(given, 3, draws=4)
        assert np.array_equal(indices, vendi_sample(x, 3, draws=4)[0]) and gains.dtype == np.float64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draws": 0}, "draws must be"),
        ({"q": -1}, "q must be at least 0"),
        ({"initial": [2, 2]}, "row 2 stands there twice"),
        ({"x": np.array([[0.0], [np.inf]])}, "x: row 1 holds NaN or infinity"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(UsageError, match=message):
        vendi_sample(**({"x": matrix(), "k": 3} | options))
