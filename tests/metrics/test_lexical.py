import json
import math
import random
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from fastsel import metrics
from fastsel.errors import UsageError
from fastsel.metrics import lexical

GOLDEN = json.loads((Path(__file__).parent / "golden" / "lexicalrichness.json").read_text())


def test_words_and_ratios_are_those_of_lexicalrichness():
    """Recorded from lexicalrichness 0.5.1; see golden/record.py."""
    for row in GOLDEN:
        assert lexical.words(row["text"]) == row["words"]
        assert metrics.ttr([row["text"]]) == pytest.approx(row["ttr"], rel=1e-12)


def test_the_sampled_vocd_is_that_of_lexicalrichness():
    """The same draws in the same order; the fit differs by what scipy's tolerance of 1.5e-8 leaves."""
    for row in GOLDEN:
        if row["vocd"] is not None:
            assert metrics.vocd_d([row["text"]], exact=False, seed=42) == pytest.approx(row["vocd"], rel=1e-6)
            # Sampling errs by a few percent around the expectation.
            assert metrics.vocd_d([row["text"]]) == pytest.approx(row["vocd"], rel=0.1)
        else:
            assert math.isnan(metrics.vocd_d([row["text"]]))
            assert metrics.vocd_d([row["text"]], short="zero") == 0


def test_the_expected_ratio_is_the_mean_over_all_samples(monkeypatch):
    monkeypatch.setattr(lexical, "SAMPLE_SIZES", range(2, 6))
    tokens = list("aabacdbe")
    expected = [np.mean([len(set(s)) / size for s in combinations(tokens, size)]) for size in range(2, 6)]
    np.testing.assert_allclose(lexical._expected_ratios(tokens), expected, rtol=1e-12)


def test_the_fit_finds_the_d_of_a_curve():
    sizes = np.arange(35, 51)
    for d in (0.5, 7.0, 60.0, 400.0, 1e4):
        assert lexical._fitted((d / sizes) * (np.sqrt(1 + 2 * sizes / d) - 1)) == pytest.approx(d, rel=1e-6)


def test_a_richer_vocabulary_has_a_larger_d():
    generator = random.Random(0)
    texts = [" ".join("w" + "abcdefghij"[i % 10] * (1 + i // 10) for i in (generator.randrange(v) for _ in range(400)))
             for v in (10, 40, 160)]  # fmt: skip
    values = [metrics.vocd_d([text]) for text in texts]
    assert values == sorted(values) and values[0] < 10 < values[2]
    assert metrics.vocd_d(texts) == pytest.approx(np.mean(values))


def test_hand_worked_ratios():
    assert metrics.ttr(["The cat saw the cat.", "One two!"]) == pytest.approx((3 / 5 + 1) / 2)
    assert metrics.ttr(["The cat saw the cat.", "the dog"], pooled=True) == pytest.approx(4 / 7)
    assert metrics.ttr(["", "a b", "123"]) == 1  # texts without a word count for nothing
    assert metrics.ttr(["A a"], tokenizer=str.split) == 1


def test_edges():
    assert math.isnan(metrics.ttr([])) and math.isnan(metrics.ttr(["..."])) and math.isnan(metrics.vocd_d([]))
    fifty, more = " ".join(["a b"] * 25), " ".join(["a b"] * 26)
    assert math.isnan(metrics.vocd_d([fifty])) and metrics.vocd_d([more]) > 0
    assert metrics.vocd_d([fifty, more], short="zero") == pytest.approx(metrics.vocd_d([more]) / 2)
    assert metrics.vocd_d([fifty, more], pooled=True) > 0
    words = ["".join(pair) for pair in combinations("abcdefghijklmno", 2)]
    assert metrics.vocd_d([" ".join(words)]) == pytest.approx(1e6)  # no word repeats


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.ttr("one text"), "texts must be a list of texts"),
        (lambda: metrics.ttr(["a", None]), "texts: row 1 is NoneType"),
        (lambda: metrics.vocd_d(["a"], short="drop"), "short must be one of skip, zero"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(UsageError, match=message):
        call()
