"""Superfiltering: a worked example, the formula written out slowly, and the authors' numbers."""

import math

import numpy as np
import pytest
import torch

import fastsel
from fastsel.errors import UsageError

QUIET = {"progress": "none"}


def test_worked_example(bigram):
    """Four rows under a model that knows only the word before; exp(s(A|Q) - s(A)) with s in units of ln 2.

    P(a|q) = 1/2, P(b|q) = 1/8, P(a|<s>) = P(b|<s>) = 1/4, P(a|a) = P(b|a) = 1/4; direct starts from <s>.

        row 0: q -> a      s(A|Q) = 1      s(A) = 2    2^(1 - 2)   = 1/2
        row 1: q -> a b    s(A|Q) = 3/2    s(A) = 2    2^(3/2 - 2) = 0.7071
        row 2: q -> b      s(A|Q) = 3      s(A) = 2    2^(3 - 2)   = 2: not eligible
        row 3: q -> a a    as row 1

    Two are asked for: rows 1 and 3, the lowest row first.
    """
    model = bigram({"q": {"a": 1 / 2, "b": 1 / 8}, "<s>": {"a": 1 / 4, "b": 1 / 4}, "a": {"a": 1 / 4, "b": 1 / 4}})
    rows = [{"instruction": "q", "input": "", "output": answer} for answer in ("a", "a b", "b", "a a")]
    selection = fastsel.superfiltering(rows, model=model, budget=2, **QUIET)
    np.testing.assert_allclose(selection.scores, [0.5, 0.5**0.5, 2, 0.5**0.5], rtol=1e-6)
    np.testing.assert_allclose(selection.metrics["ppl_direct"], [4, 4, 4, 4], rtol=1e-6)
    np.testing.assert_allclose(selection.metrics["ppl_cond"][:3], [2, 8**0.5, 8], rtol=1e-6)
    assert selection.indices.tolist() == [1, 3]


def test_a_ratio_of_one_is_dropped(bigram):
    """The instruction changes nothing: P(a|q) = P(a|<s>) = 1/4. Below 1 is asked for here, up to 1 in ifd."""
    model = bigram({"q": {"a": 1 / 4}, "<s>": {"a": 1 / 4}})
    rows = [{"instruction": "q", "input": "", "output": "a"}]
    assert len(fastsel.superfiltering(rows, model=model, budget=1, **QUIET)) == 0
    assert len(fastsel.ifd(rows, model=model, template="none", budget=1, **QUIET)) == 1


def transcription(rows, model, tokenizer, max_length):
    """The formula written out: separate forwards, token by token, float64 from the logits on."""
    start = tokenizer("")["input_ids"] or [tokenizer.convert_tokens_to_ids("<|endoftext|>")]

    def ids(text):
        return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def mean_loss(before, answer):
        with torch.no_grad():
            logits = model(torch.tensor([before + answer])).logits[0].double()
        losses = [-torch.log_softmax(logits[len(before) + t - 1], -1)[token].item() for t, token in enumerate(answer)]
        return sum(losses) / len(losses)

    scores = []
    for row in rows:
        text = row["instruction"] + "\n" + (row["input"] + "\n" if row["input"] else "")
        prompt, whole = ids(text), ids(text + row["output"])
        answer = whole[len(prompt) :] if whole[: len(prompt)] == prompt else ids(row["output"])
        answer = answer[: max(0, max_length - len(start) - len(prompt))]
        if not row["output"] or not answer:
            scores.append(math.nan)
            continue
        scores.append(math.exp(mean_loss(start + prompt, answer) - mean_loss(start, answer)))
    return np.array(scores)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_equals_the_slow_transcription(tiny, golden_rows, kind):
    model, tokenizer = tiny(kind)
    selection = fastsel.superfiltering(golden_rows, model=(model, tokenizer), max_length=96, **QUIET)
    np.testing.assert_allclose(
        selection.scores, transcription(golden_rows, model, tokenizer, 96), rtol=3e-5
    )  # exp of a difference of losses up to 10: their errors of 1e-6 add up


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_official_equals_recorded_numbers(tiny, golden_rows, golden, kind):
    recorded = golden(f"superfiltering_{kind}")
    selection = fastsel.superfiltering(
        golden_rows,
        model=tiny(kind),
        max_length=recorded["max_length"],
        official=True,
        budget=recorded["rate"],  # 0.02 % of 52,002 is 10 rows, whatever the pool
        **QUIET,
    )
    assert selection.indices.tolist() == recorded["selected"]
    assert np.isnan(selection.scores).tolist() == np.isnan(recorded["ifd_ppl"]).tolist()
    scored = ~np.isnan(selection.scores)
    np.testing.assert_allclose(np.log(selection.metrics["ppl_cond"])[scored], recorded["loss_cond"][scored], rtol=1e-5)
    np.testing.assert_allclose(
        np.log(selection.metrics["ppl_direct"])[scored], recorded["loss_direct"][scored], rtol=1e-5
    )
    np.testing.assert_allclose(selection.scores[scored], recorded["ifd_ppl"][scored], rtol=3e-5)


def test_one_token_answers_are_lost_only_officially(tiny, golden_rows):
    """GPT-2 adds no start token: the released code scores no token of the bare answer "a"."""
    rows = [row for row in golden_rows if row["output"] in ("a", "7", "e")]
    options = {"model": tiny("gpt2"), "max_length": 96, **QUIET}
    official = fastsel.superfiltering(rows, official=True, **options)
    assert np.isnan(official.scores).all()
    assert {reason.partition(": ")[2] for reason in official.reasons.values()} == {"no answer token is left to score"}
    assert np.isfinite(fastsel.superfiltering(rows, **options).scores).all()


def test_official_share_of_52002_runs_short_on_a_small_pool(tiny, golden_rows):
    options = {"model": tiny("llama"), "max_length": 96, "official": True, **QUIET}
    selection = fastsel.superfiltering(golden_rows, budget=0.1, **options)
    assert selection.requested == 5200
    assert len(selection) == selection.eligible.sum() and selection.short_by == 5200 - len(selection)


def test_equal_rows_tie_to_the_lowest(tiny, golden_rows):
    selection = fastsel.superfiltering(golden_rows[14:17], model=tiny("gpt2"), max_length=96, budget=2, **QUIET)
    assert len(set(selection.scores.tolist())) == 1
    assert selection.indices.tolist() == [0, 1]


def test_no_eligible_row(tiny):
    rows = [{"instruction": "q", "input": "", "output": ""}]
    selection = fastsel.superfiltering(rows, model=tiny("llama"), max_length=96, budget=1, **QUIET)
    assert selection.indices.size == 0 and selection.short_by == 1


def test_same_call_gives_the_same_bits(tiny, golden_rows):
    first, second = (fastsel.superfiltering(golden_rows, model=tiny("gpt2"), max_length=96, **QUIET) for _ in range(2))
    assert first.scores.tobytes() == second.scores.tobytes() and first.indices.tolist() == second.indices.tolist()


def covering(vectors, k):
    """Greedy facility location with submodlib's exp(-distance / d), every pair in float64."""
    x = vectors.astype(np.float64)
    similarity = np.exp(-np.linalg.norm(x[:, None] - x[None], axis=2) / x.shape[1])
    best, chosen = np.zeros(len(x)), []
    for _ in range(k):
        gains = np.maximum(similarity - best, 0).sum(1)
        gains[chosen] = -1
        chosen.append(int((gains >= gains.max() * (1 - 1e-9)).argmax()))
        best = np.maximum(best, similarity[chosen[-1]])
    return chosen


@pytest.mark.parametrize("official", [False, True])
def test_a_shortlist_is_covered_by_facility_location(tiny, golden_rows, official):
    """Superfiltering.D: of the best rows by ratio, those that stand for the others; in the order of choice."""
    from fastsel.features.embeddings import embed_texts

    options = {"model": tiny("gpt2"), "official": official, **QUIET}
    plain = fastsel.superfiltering(golden_rows, budget=16, **options)
    chosen = fastsel.superfiltering(golden_rows, budget=5, shortlist=16, **options)
    texts = [
        row["instruction"] + "\n" + (row["input"] + "\n" if row["input"] else "") + row["output"]
        for row in (golden_rows[i] for i in plain.indices)
    ]
    wanted = covering(embed_texts(texts, max_length=512), 5)
    assert chosen.indices.tolist() == plain.indices[wanted].tolist()
    np.testing.assert_array_equal(chosen.scores, plain.scores)
    assert np.flatnonzero(chosen.eligible).tolist() == sorted(plain.indices.tolist())
    assert chosen.rule == f"not among the {len(plain)} best perplexity ratios"
    assert np.flatnonzero(~np.isnan(chosen.gains)).tolist() == sorted(chosen.indices.tolist())


def test_a_share_of_a_shortlist_is_of_alpaca_in_official_runs(tiny, golden_rows):
    options = {"model": tiny("gpt2"), "budget": 2, "encoder": None, **QUIET}
    assert fastsel.superfiltering(golden_rows, shortlist="20%", **options).eligible.sum() == 7
    official = fastsel.superfiltering(golden_rows, shortlist="20%", official=True, **options)
    assert official.eligible.sum() > 7  # 10,400 rows: all that there are


def test_refuses_a_shortlist_in_tokens_before_the_model_runs(golden_rows):
    with pytest.raises(UsageError, match="counts tokens, but this method counts none"):
        fastsel.superfiltering(golden_rows, model="nowhere", budget=2, shortlist="1ktok", **QUIET)
