"""IFD: a worked example, the formula written out slowly, and the authors' numbers."""

import math

import numpy as np
import pytest
import torch

import fastsel
from fastsel.errors import UsageError
from fastsel.io.templates import ALPACA, SingleTurnTemplate

BARE = SingleTurnTemplate("bare", "{instruction} ", None, "")
QUIET = {"progress": "none"}


def rows_of(*pairs):
    return [{"instruction": question, "input": "", "output": answer} for question, answer in pairs]


def test_worked_example(bigram):
    """Four rows under a model that knows only the word before.

    P(a|q) = 1/2, P(b|q) = 1/8, P(a|<s>) = 1/4, P(b|<s>) = 1/4, P(a|a) = 1/4, P(b|a) = 1/4; direct starts from <s>.

        row 0: q -> a      s(A|Q) = ln 2                  s(A) = ln 4                  IFD = 1/2
        row 1: q -> a b    s(A|Q) = (ln 2 + ln 4) / 2     s(A) = (ln 4 + ln 4) / 2     IFD = (1 + 2) / 4 = 3/4
        row 2: q -> b      s(A|Q) = ln 8                  s(A) = ln 4                  IFD = 3/2: not eligible
        row 3: q -> a a b  s(A|Q) = (1 + 2 + 2)/3 ln 2    s(A) = (2 + 2 + 2)/3 ln 2    IFD = 5/6

    Half of the four rows are kept: rows 3 and 1, the highest up to 1.
    """
    model = bigram({"q": {"a": 1 / 2, "b": 1 / 8}, "<s>": {"a": 1 / 4, "b": 1 / 4}, "a": {"a": 1 / 4, "b": 1 / 4}})
    rows = rows_of(("q", "a"), ("q", "a b"), ("q", "b"), ("q", "a a b"))
    selection = fastsel.ifd(rows, model=model, template=BARE, budget=0.5, **QUIET)
    np.testing.assert_allclose(selection.scores, [1 / 2, 3 / 4, 3 / 2, 5 / 6], rtol=1e-6)
    np.testing.assert_allclose(selection.metrics["loss_cond"][1], (math.log(2) + math.log(4)) / 2, rtol=1e-6)
    assert selection.indices.tolist() == [3, 1]
    assert selection.eligible.tolist() == [True, True, False, True]
    assert selection.n_tokens.tolist() == [3, 4, 3, 5]
    assert selection.short_by == 0


def test_conversation_is_scored_over_all_its_answers(bigram):
    """Two turns: q -> a, then r -> b under `User: q` and `Assistant: a` lines, which end in r.

    P(a|q) = 1/2, P(b|r) = 1/8; alone P(a|<s>) = P(b|<s>) = 1/4.
        s(A|Q) = (ln 2 + ln 8) / 2 = 2 ln 2;  s(A) = 2 ln 2;  IFD = 1, which is kept.  Last turn only: 3/2.
    """
    model = bigram({"q": {"a": 1 / 2}, "r": {"b": 1 / 8}, "<s>": {"a": 1 / 4, "b": 1 / 4}})
    chat = [("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")]
    pool = [{"messages": [{"role": role, "content": content} for role, content in chat]}]
    selection = fastsel.ifd(pool, model=model, template=BARE, budget=1, **QUIET)
    np.testing.assert_allclose(selection.scores, [1.0], rtol=1e-6)
    last = fastsel.ifd(pool, model=model, template=BARE, budget=1, turns="last", **QUIET)
    np.testing.assert_allclose(last.scores, [1.5], rtol=1e-6)
    assert last.indices.tolist() == [] and last.short_by == 1


@pytest.mark.parametrize("method", [fastsel.ifd, fastsel.superfiltering, fastsel.perplexity])
@pytest.mark.parametrize(
    ("source", "per", "message"), [(None, "source", "names no sources"), ("web", "source=typo:1", "no source 'typo'")]
)
def test_quotas_that_the_pool_cannot_have_are_refused_before_a_model_is_loaded(method, source, per, message):
    pool = [{"instruction": "q", "output": "a", "source": source}]
    with pytest.raises(UsageError, match=message):
        method(pool, model="no/such/model", per=per, **QUIET)


def transcription(rows, model, tokenizer, max_length):
    """IFD written out: one row, one pass, one token at a time, in float64 from the logits on."""
    start = tokenizer("")["input_ids"]

    def ids(text):
        return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def mean_loss(before, answer):
        with torch.no_grad():
            logits = model(torch.tensor([before + answer])).logits[0].double()
        losses = [-torch.log_softmax(logits[len(before) + t - 1], -1)[token].item() for t, token in enumerate(answer)]
        return sum(losses) / len(losses)

    scores = []
    for row in rows:
        form = ALPACA.prompt_with_input if row["input"] else ALPACA.prompt
        text = form.replace("{instruction}", row["instruction"], 1).replace("{input}", row["input"], 1)
        prompt, whole, header = ids(text), ids(text + row["output"]), ids("### Response:")
        answer = whole[len(prompt) :] if whole[: len(prompt)] == prompt else ids(row["output"])
        answer = answer[: max(0, max_length - len(start) - len(prompt))]
        ok = row["output"] and answer
        scores.append(mean_loss(start + prompt, answer) / mean_loss(start + header, answer) if ok else math.nan)
    return np.array(scores)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_equals_the_slow_transcription(tiny, golden_rows, kind):
    rows = [row for row in golden_rows if "{" not in row["instruction"]]
    model, tokenizer = tiny(kind)
    selection = fastsel.ifd(rows, model=(model, tokenizer), max_length=100, **QUIET)
    np.testing.assert_allclose(selection.scores, transcription(rows, model, tokenizer, 100), rtol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "llama-without-start", "gpt2"])
def test_official_equals_recorded_numbers(tiny, golden_rows, golden, kind):
    recorded = golden(f"cherry_{kind}")
    options = {"model": tiny(kind), "max_length": recorded["max_length"], "official": True, **QUIET}
    selection = fastsel.ifd(golden_rows, budget=recorded["rate"], **options)
    assert selection.indices.size and sorted(selection.indices.tolist()) == recorded["selected"]
    assert np.flatnonzero(selection.eligible).tolist() == recorded["kept"]
    scored = ~np.isnan(selection.scores)
    for name in ("loss_cond", "loss_direct"):
        np.testing.assert_allclose(selection.metrics[name][scored], recorded[name][scored], rtol=1e-5)
    # A row without a score here has no usable pair of losses there, or is dropped for its length.
    assert set(np.flatnonzero(~scored)) >= set(np.flatnonzero(np.isnan(recorded["loss_cond"])))
    assert not set(np.flatnonzero(~scored)) & set(recorded["kept"])


def test_official_prefers_the_highest_of_equal_rows(tiny, golden_rows):
    """Rows 14 to 16 are equal; the code sorts (ratio, row) upwards and keeps the tail."""
    rows = golden_rows[14:17]
    options = {"model": tiny("llama"), "max_length": 96, "budget": 1, **QUIET}
    assert fastsel.ifd(rows, official=True, **options).indices.tolist() == [2]
    assert fastsel.ifd(rows, **options).indices.tolist() == [0]


def test_official_share_is_of_the_rows_that_pass(tiny, golden_rows, golden):
    """20 of 37 rows pass: 30 % of them is 6, of all rows it is 11; 4 % rounds down to none."""
    options = {"model": tiny("llama"), "max_length": 96, **QUIET}
    assert len(fastsel.ifd(golden_rows, official=True, budget=0.3, **options)) == 6
    assert len(fastsel.ifd(golden_rows, budget=0.3, **options)) == 11
    assert len(fastsel.ifd(golden_rows, official=True, budget=0.04, **options)) == 0


def test_special_tokens_in_a_row_stay_text(tiny):
    pool = rows_of(("Say it.", "a<s>b"))
    options = {"model": tiny("llama"), "max_length": 96, **QUIET}
    plain, official = fastsel.ifd(pool, **options), fastsel.ifd(pool, official=True, **options)
    assert plain.n_tokens[0] == official.n_tokens[0] + 2  # "<", "s", ">" instead of one mark


@pytest.mark.parametrize(
    "budget, expected", [(1, 1), ("1.0", 20), ("37", 20), ("100%", 20), (0.5, 18), ("200tok", None)]
)
def test_edges_of_the_budget(tiny, golden_rows, golden, budget, expected):
    selection = fastsel.ifd(golden_rows, model=tiny("llama"), max_length=96, budget=budget, **QUIET)
    n_eligible = int(selection.eligible.sum())
    if expected is None:
        assert 0 < selection.n_tokens[selection.indices].sum() <= 200
    else:
        assert len(selection) == min(expected if expected < 20 else n_eligible, n_eligible)
    best = selection.scores[selection.indices]
    assert (np.diff(best) <= 0).all() and (best <= 1).all()
    rest = np.setdiff1d(np.flatnonzero(selection.eligible), selection.indices)
    assert len(rest) == 0 or selection.scores[rest].max() <= best.min()


def test_same_call_gives_the_same_bits(tiny, golden_rows):
    first, second = (fastsel.ifd(golden_rows, model=tiny("gpt2"), max_length=96, seed=7, **QUIET) for _ in range(2))
    assert first.scores.tobytes() == second.scores.tobytes()
    assert first.indices.tolist() == second.indices.tolist() and first.baseline.tolist() == second.baseline.tolist()


def test_no_eligible_row_and_no_row(tiny):
    nothing = fastsel.ifd(rows_of(("q", "")), model=tiny("llama"), max_length=96, budget=1, **QUIET)
    assert nothing.indices.size == 0 and np.isnan(nothing.scores).all() and nothing.short_by == 1
    assert nothing.reasons[0]


def test_text_without_a_prompt_has_no_score(tiny):
    selection = fastsel.ifd([{"text": "Only a text."}], model=tiny("llama"), max_length=96, budget=1, **QUIET)
    assert np.isnan(selection.scores).all()
    assert selection.reasons[0] == "row_id 0: nothing comes before the answer, so there is nothing to compare it with"


def test_quotas_keep_each_source(tiny, golden_rows):
    pool = [{**row, "source": "odd" if i % 2 else "even"} for i, row in enumerate(golden_rows)]
    selection = fastsel.ifd(pool, model=tiny("llama"), max_length=96, budget=8, per="source", **QUIET)
    assert sorted(np.bincount(selection.indices % 2).tolist()) == [4, 4]


def test_refuses_a_window_beyond_the_model(tiny, golden_rows):
    with pytest.raises(UsageError, match="max_length=4096 must be from 2 to 128"):
        fastsel.ifd(golden_rows, model=tiny("llama"), max_length=4096, **QUIET)


@pytest.mark.slow
def test_real_rows_and_model_agree_with_separate_forwards():
    from fastsel.models.loading import load_model

    loaded = load_model("bundled")
    pool = fastsel.open_pool(fastsel.io.bundled_pool_path(), limit=12)
    selection = fastsel.ifd(pool, model=(loaded.model, loaded.tokenizer), **QUIET)
    rows = [
        {"instruction": example.instruction, "input": example.input, "output": example.messages[-1].content}
        for example in pool.examples(range(12))
    ]
    np.testing.assert_allclose(selection.scores, transcription(rows, loaded.model, loaded.tokenizer, 512), rtol=1e-4)
