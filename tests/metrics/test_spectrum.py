import json
import math
from pathlib import Path

import numpy as np
import pytest

from fastsel import metrics
from fastsel.errors import UsageError

GOLDEN = json.loads((Path(__file__).parent / "golden" / "vendi_score.json").read_text())


def matrix(n=50, d=7, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d)) + 0.3


def cosines(x):
    lengths = np.linalg.norm(x, axis=1, keepdims=True)
    unit = x / np.where(lengths > 0, lengths, 1)
    return unit @ unit.T


def test_vendi_is_that_of_the_package():
    """Recorded from vendi_score 0.0.3: score_K of the cosines and score_dual, q = 0.5, 1, 2; see golden/record.py."""
    x = np.array(GOLDEN["x"])
    for q, values in GOLDEN["scores"].items():
        assert metrics.vendi(x, q=float(q)) == pytest.approx(values["score_dual"], rel=1e-9)
        # Of the n - d eigenvalues that are 0 but for rounding, those above 0 count in score_K: for q < 1 they show.
        assert metrics.vendi(x, q=float(q)) == pytest.approx(values["score_K"], rel=1e-9 if float(q) >= 1 else 1e-4)


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("ridge", [1e-6, 1e-2])
@pytest.mark.parametrize("shape", [(50, 7), (7, 50), (12, 12)])
def test_the_determinant_lemma_gives_the_determinant(shape, ridge, similarity):
    x = matrix(*shape)
    gram = cosines(x) if similarity == "cosine" else x @ x.T
    sign, expected = np.linalg.slogdet(gram + ridge * np.eye(len(x)))
    assert sign == 1
    got = metrics.log_determinant(x, ridge=ridge, similarity=similarity)
    assert got == pytest.approx(expected, rel=1e-6 if ridge < 1e-4 else 1e-9)


def test_the_cholesky_form_of_emb_diversity_agrees():
    x = matrix(6, 20)
    factor = np.linalg.cholesky(cosines(x) + 1e-6 * np.eye(6))
    assert metrics.log_determinant(x) == pytest.approx(2 * np.log(np.diag(factor)).sum(), rel=1e-9)


def test_hand_worked():
    """Cosines [[1, 0.6], [0.6, 1]]: eigenvalues 1.6 and 0.4; halves .8 and .2."""
    x = np.array([[1.0, 0], [3, 4]])
    assert metrics.vendi(x) == pytest.approx(math.exp(-0.8 * math.log(0.8) - 0.2 * math.log(0.2)))
    assert metrics.vendi(x, q=math.inf) == pytest.approx(1 / 0.8)
    assert metrics.log_determinant(x, ridge=0) == pytest.approx(math.log(1.6 * 0.4))


def test_edges():
    assert metrics.log_determinant(np.ones((3, 2)), ridge=0) == -math.inf
    assert metrics.log_determinant(np.zeros((4, 2)), ridge=0.5) == pytest.approx(4 * math.log(0.5))
    assert metrics.log_determinant(np.zeros((0, 2))) == 0 and metrics.vendi(np.zeros((0, 2))) == 0
    x = matrix(9, 4)
    x[3] = 0
    assert metrics.vendi(x) == pytest.approx(np.exp(-sum(v * np.log(v) for v in np.linalg.eigvalsh(cosines(x) / 9)
                                                         if v > 1e-12)), rel=1e-9)  # fmt: skip


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: metrics.vendi(x, q=-1), "q must be at least 0"),
        (lambda x: metrics.log_determinant(x, ridge=-1), "ridge must be at least 0"),
        (lambda x: metrics.log_determinant(x, similarity="rbf"), "similarity must be one of cosine, dot"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(UsageError, match=message):
        call(matrix(5, 2))
