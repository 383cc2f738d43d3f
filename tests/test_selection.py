"""Budgets, ranking, quotas, the random draw and the result type. Each hand-worked case has its arithmetic beside it."""

import io
import json
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsel.errors import UsageError
from fastsel.io import STATUS, open_pool
from fastsel.selection import (
    Budget,
    build_selection,
    choose,
    largest_remainder,
    random_scores,
    rank_rows,
    spread,
)


def make_pool(sources):
    """A pool with one row a source name; None makes a row without one."""
    rows = [
        {"instruction": f"question {i}", "output": f"answer {i}"} | ({} if source is None else {"source": source})
        for i, source in enumerate(sources)
    ]
    return open_pool(rows)


def make_selection(scores, budget, *, sources=None, n_tokens=None, per=None, status=None, **more):
    n = len(scores)
    pool = make_pool(sources or [None] * n)
    scores = np.asarray(scores, float)
    status = np.zeros(n, np.uint8) if status is None else np.asarray(status, np.uint8)
    eligible = more.pop("eligible", (status <= 1) & ~np.isnan(scores))
    tokens = None if n_tokens is None else np.asarray(n_tokens, np.int32)
    arguments = {
        "pool": pool,
        "method": "toy",
        "indices": choose(scores, eligible, budget, pool=pool, n_tokens=tokens, per=per),
        "scores": scores,
        "status": status,
        "reasons": {},
        "n_tokens": tokens,
        "metrics": {"toy": scores},
        "config": {},
        "timings": {"score": 0.5},
        "seed": 3,
        "budget": budget,
        "per": per,
        "eligible": eligible,
    }
    return build_selection(**(arguments | more))


@pytest.mark.parametrize(
    ("written", "unit", "amount"),
    [
        ("0.05", "share", Fraction(1, 20)),
        (0.05, "share", Fraction(1, 20)),
        ("5%", "share", Fraction(1, 20)),
        (" 12.5 % ", "share", Fraction(1, 8)),
        ("1e-3", "share", Fraction(1, 1000)),
        ("1.0", "share", Fraction(1)),
        (1.0, "share", Fraction(1)),
        ("100%", "share", Fraction(1)),
        ("1000", "rows", 1000),
        (1000, "rows", 1000),
        (np.int64(7), "rows", 7),
        ("1_000", "rows", 1000),
        ("1,000", "rows", 1000),
        ("1", "rows", 1),
        (1, "rows", 1),
        ("2Mtok", "tokens", 2_000_000),
        ("500ktok", "tokens", 500_000),
        ("1.5 Mtok", "tokens", 1_500_000),
        ("750tok", "tokens", 750),
        ("3 gtokens", "tokens", 3_000_000_000),
    ],
)
def test_budget_reads_shares_rows_and_tokens(written, unit, amount):
    budget = Budget.parse(written)
    assert (budget.unit, budget.amount) == (unit, amount)
    assert Budget.parse(str(budget)) == budget
    assert Budget.parse(budget) is budget


@pytest.mark.parametrize(
    "written",
    [
        "",
        "ten",
        "0",
        0,
        -5,
        "-5",
        0.0,
        "0%",
        "150%",
        1.5,
        "-0.1",
        "1/3",
        "1,5",
        "0tok",
        "tok",
        "nan",
        "inf",
        True,
        None,
        [5],
    ],
)
def test_refuses_budgets_that_are_none(written):
    with pytest.raises(UsageError, match=r"write 0.05 or 5%"):
        Budget.parse(written)


def test_a_share_is_rounded_down_exactly_and_is_one_row_at_least():
    # 0.29 * 100 is 28.999999999999996 in floating point, and 29 rows.
    assert Budget.parse(0.29).limit(100) == 29
    assert Budget.parse("10%").limit(256) == 25
    assert Budget.parse("0.1%").limit(256) == 1
    assert Budget.parse("1.0").limit(256) == 256
    assert Budget.parse("10%").limit(0) == 0


@given(st.integers(1, 9999), st.integers(1, 10**7))
@settings(deadline=None)
def test_law_a_share_never_exceeds_its_part_unless_it_is_one_row(ten_thousandths, n):
    rows = Budget.parse(f"{ten_thousandths / 10_000:.4f}").limit(n)
    assert rows == max(1, ten_thousandths * n // 10_000)


def test_rows_of_a_token_budget_need_token_counts():
    assert Budget.parse("10tok").rows(99, np.array([4, 5, 2, 1])) == 2
    with pytest.raises(UsageError, match="counts tokens"):
        Budget.parse("10tok").rows(99)


def test_ranking_takes_the_lowest_row_of_equals_and_no_row_without_a_score():
    scores = np.array([0.5, 0.9, np.nan, 0.9, 0.1, 0.5])
    eligible = np.array([True, True, True, True, True, False])
    assert rank_rows(scores, eligible).tolist() == [1, 3, 0, 4]
    assert rank_rows(scores, eligible, largest=False).tolist() == [4, 0, 1, 3]


@given(
    st.lists(st.sampled_from([0.0, 0.25, 0.5, float("nan"), float("inf"), -float("inf")]), max_size=40), st.booleans()
)
@settings(deadline=None)
def test_law_ranking_equals_pythons_stable_sort(scores, largest):
    rows = [i for i, score in enumerate(scores) if score == score]
    expected = sorted(rows, key=lambda i: -scores[i] if largest else scores[i])
    assert rank_rows(np.array(scores), np.ones(len(scores), bool), largest=largest).tolist() == expected


def test_choosing_changes_neither_scores_nor_mask():
    scores, eligible = np.array([1.0, 3.0, 2.0]), np.array([True, True, True])
    choose(scores, eligible, 2, pool=make_pool("aab"))
    assert scores.tolist() == [1.0, 3.0, 2.0] and eligible.all()


def test_largest_remainder_by_hand():
    # 10 seats over 47, 16, 15, 22 of 100: exact 4.7, 1.6, 1.5, 2.2; whole 4+1+1+2 = 8; two left for .7 and .6.
    assert largest_remainder(10, [47, 16, 15, 22]) == [5, 2, 1, 2]
    assert largest_remainder(1, [1, 1]) == [1, 0]
    assert largest_remainder(5, [0, 0]) == [0, 0]


@given(st.integers(0, 10_000), st.lists(st.integers(0, 10_000), min_size=1, max_size=30))
@settings(deadline=None)
def test_law_quotas_sum_up_and_are_within_one_of_exact(total, weights):
    parts = largest_remainder(total, weights)
    if sum(weights) == 0:
        assert parts == [0] * len(weights)
        return
    assert sum(parts) == total
    assert all(abs(Fraction(total * w, sum(weights)) - part) < 1 for part, w in zip(parts, weights, strict=True))


def test_a_token_budget_keeps_the_top_of_the_ranking():
    # 100 tokens hold 40 + 50; row 2 would make 110, and row 3, which would fit, is not pulled up.
    selection = make_selection([0.9, 0.8, 0.7, 0.6], "100tok", n_tokens=[40, 50, 20, 5])
    assert selection.indices.tolist() == [0, 1]
    assert selection.short_by == 0 and selection.requested == 100


def test_a_token_budget_that_the_pool_cannot_fill_is_short_in_tokens():
    selection = make_selection([0.9, 0.8], "1ktok", n_tokens=[40, 50])
    assert selection.indices.tolist() == [0, 1]
    assert selection.short_by == 910
    assert "910 tokens" in selection.summary_text()


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 50)), min_size=1, max_size=30), st.integers(1, 400))
@settings(deadline=None)
def test_law_a_token_budget_is_never_exceeded_and_the_next_row_would(rows, limit):
    scores, tokens = np.array([row[0] for row in rows]), np.array([row[1] for row in rows], np.int32)
    pool = make_pool([None] * len(rows))
    everything = np.ones(len(rows), bool)
    chosen = choose(scores, everything, f"{limit}tok", pool=pool, n_tokens=tokens)
    ranked = rank_rows(scores, everything)
    assert chosen.tolist() == ranked[: len(chosen)].tolist()
    assert tokens[chosen].sum() <= limit
    if len(chosen) < len(rows):
        assert tokens[ranked[: len(chosen) + 1]].sum() > limit


def test_refuses_a_token_budget_without_token_counts():
    with pytest.raises(UsageError, match="counts tokens, but this method counts none"):
        make_selection([0.5], "1ktok")


def test_quotas_keep_the_pools_mix():
    # 6 a and 4 b, half of 10 rows: 5 seats, exact 3 and 2, though all of b scores higher.
    selection = make_selection(
        [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.9, 0.9, 0.8, 0.7], "50%", sources="aaaaaabbbb", per="source"
    )
    assert selection.indices.tolist() == [6, 7, 5, 4, 3]


def test_equal_and_weighted_quotas():
    scores = np.arange(8, dtype=float)
    pool, everything = make_pool("aaaaaabb"), np.ones(8, bool)

    def chosen(per):
        return sorted(choose(scores, everything, 4, pool=pool, per=per).tolist())

    assert chosen("source=equal") == [4, 5, 6, 7]
    assert chosen("source=a:3,b:1") == chosen({"a": 3, "b": 1}) == chosen({"a": 0.75, "b": 0.25}) == [3, 4, 5, 7]
    assert chosen({"a": 1}) == [2, 3, 4, 5]


def test_rows_without_a_source_are_a_group_of_their_own():
    selection = make_selection([1, 2, 3, 4], "50%", sources=["a", None, "a", None], per="source")
    assert sorted(selection.indices.tolist()) == [2, 3]
    assert {part["source"] for part in selection.summary()["sources"]} == {"a", "(none)"}


def test_what_a_source_cannot_fill_is_missing_and_said():
    # 2 of the 4 seats are b's; b has one row with a score.
    selection = make_selection(
        [1, 2, 3, 4, 5, np.nan, np.nan, np.nan], 4, sources="aaaabbbb", per="source", status=[0] * 5 + [2] * 3
    )
    assert selection.indices.tolist() == [4, 3, 2]
    assert selection.short == {"b": 1} and selection.short_by == 1
    assert "1 row: the eligible rows ran out (b 1)" in selection.summary_text()


def test_token_quotas_follow_the_sources_tokens():
    # a has 300 of 400 tokens: 60 of 80. Its rows hold 10 each, b's one row 100: too long for b's 20.
    tokens = [10] * 30 + [100]
    selection = make_selection(
        np.linspace(1, 0.5, 31), "80tok", sources=["a"] * 30 + ["b"], n_tokens=tokens, per="source"
    )
    assert selection.indices.tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("per", "message"),
    [
        ("kind", "write source"),
        ("source=a", "write source"),
        ("source=a:x", "each weight must be a number"),
        ({"a": -1}, "must be >= 0"),
        ({}, "one of them above 0"),
        ({"c": 1}, "has no source 'c'; it has 'a', 'b'"),
    ],
)
def test_refuses_quotas(per, message):
    with pytest.raises(UsageError, match=message):
        spread(2, make_pool("aab"), per=per)


def test_refuses_quotas_on_a_pool_without_sources():
    with pytest.raises(UsageError, match="names no sources"):
        spread(2, make_pool([None, None]), per="source")


def test_too_few_eligible_rows_are_counted_as_short():
    selection = make_selection(
        [0.9, np.nan, 0.8, 1.2],
        3,
        eligible=np.array([True, False, True, False]),
        status=[0, 2, 0, 0],
        rule="toy above 1",
    )
    assert selection.indices.tolist() == [0, 2]
    assert (selection.requested, selection.short_by) == (3, 1)


def test_a_pool_smaller_than_the_budget_is_short():
    assert make_selection([0.1, 0.2], 5).short_by == 3
    assert make_selection([0.1, 0.2], "1.0").short_by == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"indices": np.array([0, 0])}, "repeat"),
        ({"indices": np.array([5])}, "outside"),
        ({"indices": np.array([-1])}, "outside"),
        ({"scores": np.zeros(2)}, r"scores is \(2,\), not \[3\]"),
        ({"status": np.array([0, 3, 0], np.uint8)}, "in error has a score"),
        ({"eligible": np.array([False, True, True]), "indices": np.array([0])}, "not eligible"),
    ],
)
def test_refuses_malformed_results(wrong, message):
    good = {"indices": np.array([1])}
    eligible = wrong.pop("eligible", None)
    selection = make_selection([0.1, 0.2, 0.3], 1)
    arguments = {name: getattr(selection, name) for name in ("pool", "method", "scores", "status", "reasons", "config")}
    others = {"n_tokens": None, "metrics": {}, "timings": {}, "seed": 0, "budget": 1, "eligible": eligible}
    with pytest.raises(ValueError, match=message):
        build_selection(**(arguments | others | good | wrong))


def test_refuses_score_arrays_of_another_length():
    with pytest.raises(UsageError, match="one entry a pool row"):
        choose(np.zeros(2), np.ones(3, bool), 1, pool=make_pool("abc"))


def test_the_random_draw_is_the_random_methods_choice():
    selection = make_selection(np.arange(50.0), "20%")
    pool, usable = make_pool([None] * 50), np.ones(50, bool)
    assert selection.baseline.tolist() == choose(random_scores(50, 3), usable, "20%", pool=pool).tolist()
    assert "random draw of seed 3 itself" not in str(selection)
    itself = make_selection(random_scores(50, 3), "20%", method="random")
    assert "the choice is the random draw of seed 3 itself" in str(itself)
    assert make_selection(np.arange(50.0), "20%", seed=4).baseline.tolist() != selection.baseline.tolist()


def test_the_random_draw_takes_usable_rows_only_and_keeps_quotas():
    status = [0, 1, 2, 3] * 10
    scores = np.where(np.array(status) > 1, np.nan, np.arange(40.0))
    selection = make_selection(scores, 8, sources=["a", "b"] * 20, status=status, per="source")
    assert set(selection.status[selection.baseline]) <= {0, 1}
    assert np.bincount(selection.baseline % 2).tolist() == np.bincount(selection.indices % 2).tolist()


def test_the_random_draw_of_a_token_budget_has_its_tokens_not_its_rows():
    selection = make_selection(np.arange(40.0), "100tok", n_tokens=[30] * 20 + [5] * 20)
    assert len(selection.indices) == 20
    assert 100 - 30 < selection.n_tokens[selection.baseline].sum() <= 100


def test_expected_overlap_is_the_mean_over_many_draws():
    scores = np.arange(40.0)
    sources = ["a"] * 10 + ["b"] * 30
    overlaps = [
        make_selection(scores, 12, sources=sources, per="source=a:1,b:2", seed=seed).summary()["random_baseline"]
        for seed in range(300)
    ]
    # a: 4 of 10 against 4 of 10, b: 8 of 30 against 8 of 30.
    expected = 4 * 4 / 10 + 8 * 8 / 30
    assert overlaps[0]["expected_overlap"] == pytest.approx(expected, abs=1e-4)
    # Standard error of the mean of 300 draws: the law's deviation is 1.5 rows, so 0.09; four of them.
    assert np.mean([overlap["overlap"] for overlap in overlaps]) == pytest.approx(expected, abs=0.36)


def test_the_summary_is_plain_json_and_says_what_is_known():
    selection = make_selection(
        [0.9, 0.8, np.nan, 1.5, 0.1],
        2,
        sources="aabba",
        n_tokens=[10, 70, -1, 20, 10],
        status=[0, 1, 3, 0, 0],
        eligible=np.array([True, True, False, False, True]),
        rule="toy above 1",
        notes=["a note"],
        provenance={"model": {"name": "tiny"}},
    )
    facts = json.loads(json.dumps(selection.summary(), allow_nan=False))
    assert facts["counts"] == {"ok": 3, "truncated": 1, "skipped": 0, "error": 1}
    assert facts["refused"] == {"rule": "toy above 1", "rows": 1}
    assert facts["scores"]["cut"] == 0.8 and facts["scores"]["mean_kept"] == pytest.approx(0.85)
    assert facts["tokens"]["kept"] == {"total": 80, "mean": 40.0, "median": 40.0}
    assert facts["sources"][0] == {
        "source": "a",
        "pool": {"rows": 3, "share": 0.6},
        "kept": {"rows": 2, "share": 1.0},
        "random": facts["sources"][0]["random"],
    }
    assert [(part["from"], part["to"], part["pool"]["rows"], part["kept"]["rows"]) for part in facts["lengths"]] == [
        (0, 31, 3, 1),
        (32, 63, 0, 0),
        (64, 127, 1, 1),
    ]
    text = str(selection)
    for part in (
        "toy: kept 2 of 5 rows",
        "model tiny",
        "last kept 0.8",
        "1 kept out by the rule: toy above 1",
        "1 truncated",
        "a note",
    ):
        assert part in text


def test_a_selection_of_nothing_has_a_summary_and_a_table():
    selection = make_selection([np.nan, np.nan], 1, status=[2, 2])
    assert selection.short_by == 1
    assert json.dumps(selection.summary(), allow_nan=False)
    assert "none" in str(selection)
    assert selection.table["rank"].to_pylist() == [None, None]


def test_the_table_has_exactly_the_columns_of_selection_parquet():
    selection = make_selection(
        [0.25, np.nan, 0.75, 1.5],
        1,
        sources=["a", None, "b", "a"],
        n_tokens=[5, -1, 7, 9],
        status=[0, 2, 0, 1],
        reasons={1: "line 2: empty answer", 3: "cut at 512 tokens"},
        eligible=np.array([True, False, True, False]),
        rule="toy above 1",
    )
    table = selection.table
    assert [(field.name, str(field.type)) for field in table.schema] == [
        ("row_id", "int64"),
        ("id", "string"),
        ("content_hash", "string"),
        ("source", "string"),
        ("selected", "bool"),
        ("rank", "int32"),
        ("score", "double"),
        ("gain", "double"),
        ("cluster", "int32"),
        ("n_tokens", "int32"),
        ("status", "string"),
        ("reason", "string"),
        ("toy", "double"),
    ]
    columns = table.to_pydict()
    assert columns["selected"] == [False, False, True, False]
    assert columns["rank"] == [None, None, 0, None]
    assert columns["score"] == columns["toy"] == [0.25, None, 0.75, 1.5]
    assert columns["n_tokens"] == [5, None, 7, 9]
    assert columns["source"] == ["a", None, "b", "a"]
    assert columns["status"] == ["ok", "skipped", "ok", "truncated"]
    assert columns["reason"] == [None, "line 2: empty answer", None, "rule: toy above 1; cut at 512 tokens"]
    assert columns["content_hash"] == [row.tobytes().hex() for row in selection.pool.content_hash]
    assert columns["gain"] == columns["cluster"] == [None] * 4


def test_a_row_that_was_never_hashed_has_no_hash():
    pool = open_pool([{"instruction": "q", "output": ""}, {"instruction": "q", "output": "a"}])
    scores = np.array([np.nan, 1.0])
    arguments = {"scores": scores, "status": np.asarray(pool.status), "reasons": pool.reasons, "n_tokens": None}
    others = {"metrics": {}, "config": {}, "timings": {}, "seed": 0, "requested": 1}
    selection = build_selection(pool=pool, method="toy", indices=np.array([1]), **arguments, **others)
    columns = selection.table.to_pydict()
    assert columns["content_hash"][0] is None and len(columns["content_hash"][1]) == 32
    assert columns["status"] == ["skipped", "ok"] and columns["n_tokens"] == [None, None]


def test_the_table_goes_on_over_the_edge_of_a_piece():
    n = 65_536 + 3
    scores = np.arange(n, dtype=float)
    sources = (["a", "b", None] * n)[:n]
    selection = make_selection(scores, 2, sources=sources)
    table = selection.table
    assert (table["row_id"].to_numpy() == np.arange(n)).all()
    assert table["source"].to_pylist() == sources
    assert table.filter(pc.field("selected"))["row_id"].to_pylist() == [n - 2, n - 1]


def test_gains_and_clusters_have_their_columns():
    selection = make_selection(
        [3.0, 2.0, 1.0], 2, gains=np.array([0.5, 0.25, np.nan]), clusters=np.array([1, 0, -1], np.int32)
    )
    assert selection.table["gain"].to_pylist() == [0.5, 0.25, None]
    assert selection.table["cluster"].to_pylist() == [1, 0, None]
    with pytest.raises(UsageError, match="needs a new run"):
        selection.choose_again(1)


def test_choosing_again_equals_choosing_at_first():
    scores = np.random.default_rng(0).random(30)
    sources = ["a", "b", "b"] * 10
    first = make_selection(scores, "10%", sources=sources, n_tokens=np.arange(30))
    again = first.choose_again("100tok", per="source")
    fresh = make_selection(scores, "100tok", sources=sources, n_tokens=np.arange(30), per="source")
    assert again.indices.tolist() == fresh.indices.tolist()
    assert again.baseline.tolist() == fresh.baseline.tolist()
    assert again.config["budget"] == "100tok" and again.timings == {}


def test_to_dataset_has_the_users_columns_and_the_score():
    pytest.importorskip("datasets")
    selection = make_selection([0.5, 0.9, 0.1, 0.7], 2, sources="abcd")
    dataset = selection.to_dataset(order="rank")
    assert dataset.column_names == ["instruction", "output", "source", "fastsel_score"]
    assert dataset["source"][:] == ["b", "d"] and dataset["fastsel_score"][:] == [0.9, 0.7]
    assert selection.to_dataset(score_column=None)["source"][:] == ["b", "d"]
    with pytest.raises(UsageError, match="pool or rank"):
        selection.to_dataset(order="best")


_MEASURE = """
import pathlib, resource, sys
import numpy as np, pyarrow as pa
from fastsel.io.writers import _write_arrays
from fastsel.selection import build_selection, choose
n = int(sys.argv[1])
class Rows:
    name, format, fingerprint, inputs = "p", "alpaca", "f", []
    content_hash = np.random.default_rng(0).integers(1, 255, (n, 16), np.uint8)
    _names = [f"source {i}" for i in range(50)]
    _sources = pa.DictionaryArray.from_arrays(pa.array(np.arange(n, dtype=np.int32) % 50), _names)
    def __len__(self): return n
    def ids(self): return None
    def sources(self): return self._sources
pool = Rows()
scores = np.random.default_rng(1).random(n)
eligible = scores < 0.95
tokens = np.full(n, 100, np.int32)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
indices = choose(scores, eligible, "10%", pool=pool, per="source")
selection = build_selection(pool=pool, method="ifd", indices=indices, scores=scores, status=np.zeros(n, np.uint8),
    reasons={}, n_tokens=tokens, metrics={"ifd": scores}, config={}, timings={}, seed=0, budget="10%", per="source",
    eligible=eligible, rule="IFD above 1")
selection.summary()
_write_arrays(selection, pathlib.Path(sys.argv[2]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)
"""


@pytest.mark.slow
def test_choosing_and_writing_take_less_than_100_bytes_a_row(tmp_path):
    def peak(n):
        run = subprocess.run(
            [sys.executable, "-c", _MEASURE, str(n), str(tmp_path)], capture_output=True, text=True, check=True
        )
        return int(run.stdout)

    grown = (peak(2_200_000) - peak(200_000)) / 2_000_000
    assert grown < 100, f"{grown:.0f} bytes a row"


def test_status_names_are_those_of_the_pool():
    assert STATUS == ("ok", "truncated", "skipped", "error")
    buffer = io.BytesIO()
    pq.write_table(make_selection([1.0, 2.0], 1).table, buffer)
    assert set(pq.read_table(buffer)["status"].to_pylist()) <= set(STATUS)
