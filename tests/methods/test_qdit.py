"""QDIT over an embedded pool: the trade of quality and diversity, by hand and against a transcription."""

import numpy as np
import pytest

import fastsel
from fastsel.errors import InputError, UsageError
from fastsel.features import quality as quality_module
from fastsel.features.quality import row_quality
from fastsel.io import open_pool
from fastsel.io.templates import NONE


def pool_with(scores):
    return open_pool(
        [{"instruction": f"question {i}", "output": "a", "s": score} for i, score in enumerate(scores)],
        score_column="s",
    )


def qdit(matrix, scores, **options):
    return fastsel.qdit(pool_with(scores), encoder=np.asarray(matrix), progress="none", **options)


def transcription(x, q, k, alpha, divide=1.0):
    """Greedy of (1 - alpha) d / divide + alpha q over the whole matrix, in float64."""
    x = np.asarray(x, np.float64)
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    cosines, best, chosen, gains = np.maximum(x @ x.T, 0), np.zeros(len(x)), [], []
    for _ in range(k):
        values = (1 - alpha) * np.maximum(cosines - best, 0).sum(1) / divide + alpha * q
        values[chosen] = -np.inf
        chosen.append(int(np.argmax(values >= values.max() - 1e-9 * abs(values.max()))))
        gains.append(values.max())
        best = np.maximum(best, cosines[chosen[-1]])
    return chosen, np.array(gains)


def test_worked_example():
    """Rows along three axes, two on the first; scores 1, 2, 4, 5, to [0, 1]: 0, 0.25, 0.75, 1; alpha 1/2.
    First: rows 0 and 1 cover two rows (0.5 x 2 + 0.5 q = 1, 1.125), row 2 0.5 + 0.375, row 3 0.5 + 0.5. Row 1 is taken.
    Then row 3 gains 1, row 2 0.875, row 0 nothing."""
    got = qdit(np.eye(3)[[0, 0, 1, 2]], [1, 2, 4, 5], alpha=0.5, budget=3)
    assert got.indices.tolist() == [1, 3, 2]
    np.testing.assert_allclose(got.gains[[1, 3, 2]], [1.125, 1.0, 0.875])
    assert got.scores.tolist() == [1, 2, 4, 5]


@pytest.mark.parametrize("scale", ["raw", "mean", "minmax", "zscore"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.9])
def test_matches_the_transcription(scale, alpha):
    random = np.random.default_rng(0)
    x, scores = random.standard_normal((50, 4)), random.normal(5, 2, 50)
    q = {
        "minmax": (scores - scores.min()) / np.ptp(scores),
        "zscore": (scores - scores.mean()) / scores.std(),
    }.get(scale, scores)
    chosen, gains = transcription(x, q, 12, alpha, divide=50 if scale == "mean" else 1)
    got = qdit(x, scores, scale=scale, alpha=alpha, budget=12)
    assert got.indices.tolist() == chosen
    np.testing.assert_allclose(got.gains[chosen], gains, rtol=1e-5)


def test_the_ends_are_facility_location_and_the_best_rows():
    x, scores = np.random.default_rng(1).standard_normal((40, 5)), np.random.default_rng(2).random(40)
    plain = fastsel.facility_location(pool_with(scores), encoder=x, budget=10, progress="none")
    assert qdit(x, scores, alpha=0.0, budget=10).indices.tolist() == plain.indices.tolist()
    assert qdit(x, scores, alpha=1.0, budget=10).indices.tolist() == np.argsort(-scores)[:10].tolist()


def test_a_row_without_quality_is_left_out_with_a_reason():
    got = qdit(np.eye(4), [1.0, None, 2.0, 3.0], budget=4)
    assert sorted(got.indices.tolist()) == [0, 2, 3] and np.isnan(got.scores[1])
    assert "no score in s" in got.reasons[1] and got.short_by == 1


def test_perplexity_prefers_the_likely_answer(bigram, monkeypatch):
    """P(a|q) is 1/2 and P(b|q) 1/4: the losses are ln 2 and ln 4."""
    monkeypatch.setattr(quality_module, "load_template", lambda name: NONE)
    model = bigram({"q": {"a": 0.5, "b": 0.25}})
    rows = [{"instruction": "q", "output": "b"}, {"instruction": "q", "output": "a"}]
    got = row_quality(open_pool(rows), "perplexity", model=model, progress="none")
    np.testing.assert_allclose(got.values, [-np.log(4), -np.log(2)], rtol=1e-5)
    chosen = fastsel.qdit(rows, encoder=np.eye(2), quality="perplexity", model=model, budget=1, progress="none")
    assert chosen.indices.tolist() == [1]


def test_refuses():
    with pytest.raises(UsageError, match="scale='log' is not known"):
        qdit(np.eye(2), [1, 2], scale="log")
    with pytest.raises(UsageError, match="alpha"):
        qdit(np.eye(2), [1, 2], alpha=1.5)
    with pytest.raises(InputError, match="carries no scores"):
        fastsel.qdit([{"instruction": "a", "output": "b"}], encoder=np.eye(1), progress="none")
