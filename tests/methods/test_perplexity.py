"""Perplexity of the answer: a worked example and its edges."""

import numpy as np
import pytest

import fastsel
from fastsel.io.templates import SingleTurnTemplate

BARE = SingleTurnTemplate("bare", "{instruction} ", None, "")
QUIET = {"progress": "none"}


def test_worked_example(bigram):
    """P(a|q) = 1/2, P(b|q) = 1/8, P(b|a) = 1/4:  q -> a: 2;  q -> b: 8;  q -> a b: sqrt(2 * 4) = 2.83.

    One of three: the row with the highest, row 1.
    """
    model = bigram({"q": {"a": 1 / 2, "b": 1 / 8}, "a": {"b": 1 / 4}})
    rows = [{"instruction": "q", "input": "", "output": answer} for answer in ("a", "b", "a b")]
    selection = fastsel.perplexity(rows, model=model, template=BARE, budget=1, **QUIET)
    np.testing.assert_allclose(selection.scores, [2, 8, 8**0.5], rtol=1e-6)
    assert selection.indices.tolist() == [1]


def test_text_is_scored_from_the_start_token(bigram):
    """P(a|<s>) = 1/2 and P(b|a) = 1/8: the text "a b" has perplexity 4."""
    model = bigram({"<s>": {"a": 1 / 2}, "a": {"b": 1 / 8}})
    selection = fastsel.perplexity([{"text": "a b"}], model=model, template=BARE, budget=1, **QUIET)
    np.testing.assert_allclose(selection.scores, [4], rtol=1e-6)


@pytest.mark.parametrize("official", [False, True])
def test_is_the_conditioned_loss_of_ifd(tiny, golden_rows, official):
    options = {"model": tiny("llama"), "max_length": 96, "official": official, **QUIET}
    alone = fastsel.perplexity(golden_rows, **options)
    np.testing.assert_allclose(
        alone.metrics["loss_cond"], fastsel.ifd(golden_rows, **options).metrics["loss_cond"], rtol=1e-5
    )
    np.testing.assert_allclose(alone.scores, np.exp(alone.metrics["loss_cond"]))


def test_no_eligible_row(tiny):
    rows = [{"instruction": "q", "input": "", "output": ""}]
    selection = fastsel.perplexity(rows, model=tiny("llama"), max_length=96, budget=1, **QUIET)
    assert selection.indices.size == 0 and selection.short_by == 1
