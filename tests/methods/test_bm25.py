"""BM25 against its formula by hand and word by word, and the method on a small pool."""

import math
from collections import Counter

import numpy as np
import pytest

import fastsel
from fastsel.errors import FastselWarning, InputError, UsageError
from fastsel.features.bm25 import BM25, mean_query, single_queries, words
from fastsel.io import open_pool


def naive(texts, query, k1, b):
    """The formula, one text and one word at a time, in float64."""
    split = [words(text) for text in texts]
    mean_length = sum(map(len, split)) / len(split)
    scores = []
    for text in split:
        counts, score = Counter(text), 0.0
        for word in query:  # once for each time it is asked for
            n_with = sum(word in other for other in split)
            idf = math.log(1 + (len(split) - n_with + 0.5) / (n_with + 0.5))
            f = counts[word]
            score += idf * f * (k1 + 1) / (f + k1 * (1 - b + b * len(text) / mean_length)) if f else 0.0
        scores.append(score)
    return scores


def test_one_text_by_hand():
    """Texts "a a" and "b": n = 2, mean length 1.5; idf(a) = ln(1 + 1.5/1.5) = ln 2; with k1 = 1, b = 0 the first scores
    ln 2 * 2 * 2 / (2 + 1) = 4/3 ln 2; with b = 1 its damping is 2/1.5: ln 2 * 4 / (2 + 4/3) = 6/5 ln 2.
    """
    assert BM25(["a a", "b"], k1=1, b=0).scores({"a": 1.0}).tolist() == pytest.approx([4 / 3 * math.log(2), 0])
    assert BM25(["a a", "b"], k1=1, b=1).scores({"a": 1.0}).tolist() == pytest.approx([6 / 5 * math.log(2), 0])


@pytest.mark.parametrize(("k1", "b"), [(1.5, 0.75), (0.0, 0.3), (2.0, 1.0)])
def test_matches_the_formula(k1, b):
    draw = np.random.default_rng(2)
    texts = [" ".join(f"w{i}" for i in draw.zipf(1.6, size=draw.integers(0, 30)) % 40) for _ in range(60)]
    queries = [" ".join(f"w{i}" for i in draw.zipf(1.6, size=12) % 45) for _ in range(5)]
    index = BM25(iter(texts), k1=k1, b=b)
    each = [naive(texts, words(query), k1, b) for query in queries]
    for query, expected in zip(single_queries(queries), each, strict=True):
        assert index.scores(query) == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert index.scores(mean_query(queries)) == pytest.approx(np.mean(each, axis=0), rel=1e-12, abs=1e-12)


def test_words():
    assert words("Don't PANIC: x_1 = 42!") == ["don", "t", "panic", "x", "1", "42"]
    assert words("北京 is 首都ok") == ["北", "京", "is", "首", "都", "ok"]
    assert words("Straße café") == ["straße", "café"] and words("...") == []


def test_edges():
    assert BM25([]).scores({"a": 1.0}).tolist() == []
    assert BM25(["", "..."]).scores({"a": 1.0}).tolist() == [0, 0]
    assert BM25(["a"]).scores({}).tolist() == [0]


POOL = [
    {"instruction": "add one and two", "output": "three", "source": "m"},
    {"instruction": "the capital of France", "output": "Paris", "source": "g"},
    {"instruction": "add", "output": "", "source": "m"},
    {"instruction": "multiply one by two", "output": "two", "source": "m"},
    {"instruction": "write a poem about rain and the sea", "output": "rain", "source": "g"},
]
TARGET = [
    {"instruction": "add four and one", "output": "five", "task": "sums"},
    {"instruction": "add two and two", "output": "four", "task": "sums"},
    {"instruction": "which city is the capital of Spain", "output": "Madrid", "task": "cities"},
]


def by_hand(aggregate, groups, k1=1.5, b=0.75):
    texts = [f"{row['instruction']} {row['output']}" for row in POOL if row["output"]]
    each = np.array([naive(texts, words(f"{row['instruction']} {row['output']}"), k1, b) for row in TARGET])
    combine = np.mean if aggregate == "mean" else np.max
    scores = np.max([combine(each[group], axis=0) for group in groups], axis=0)
    return np.insert(scores, 2, np.nan)


@pytest.mark.parametrize("aggregate", ["mean", "max"])
@pytest.mark.parametrize("column", [None, "task"])
def test_a_row_counts_by_its_best_subtask(aggregate, column):
    selection = fastsel.bm25(POOL, target=TARGET, subtask_column=column, aggregate=aggregate, budget=3)
    expected = by_hand(aggregate, [[0, 1], [2]] if column else [[0, 1, 2]])
    assert selection.scores == pytest.approx(expected, nan_ok=True)
    assert selection.indices.tolist() == np.argsort(-expected, kind="stable")[:3].tolist()
    assert sorted(selection.metrics) == (["bm25_cities", "bm25_sums"] if column else [])
    assert any("3 rows" in note for note in selection.notes) and any("leaks: no target" in n for n in selection.notes)
    assert selection.status.tolist() == [0, 0, 2, 0, 0]


def test_options_reach_the_index_and_quotas_hold():
    selection = fastsel.bm25(POOL, target=TARGET, k1=0.5, b=0.1, budget=2, per="source=equal")
    assert selection.scores == pytest.approx(by_hand("mean", [[0, 1, 2]], 0.5, 0.1), nan_ok=True)
    assert sorted(np.array([row["source"] for row in POOL])[selection.indices]) == ["g", "m"]


def test_leaks_are_counted_and_left_out_when_asked():
    target = [*TARGET, {"instruction": "Write a poem about rain, and the sea!", "output": "x", "task": "poems"}]
    with pytest.warns(FastselWarning, match="1 pool rows hold 1 of 4 target rows"):
        kept = fastsel.bm25(POOL, target=target, subtask_column="task", budget=1)
    assert kept.indices.tolist() == [4]
    with pytest.warns(FastselWarning, match="they are left out"):
        dropped = fastsel.bm25(POOL, target=target, subtask_column="task", budget=4, drop_leaks=True)
    assert 4 not in dropped.indices and dropped.eligible.tolist() == [True, True, False, True, False]
    assert dropped.rule == "it holds a row of the target" and dropped.short_by == 1
    assert dropped.scores == pytest.approx(kept.scores, nan_ok=True)


def test_several_targets(tmp_path):
    pool = open_pool(POOL)
    both = fastsel.bm25(pool, target={"sums": TARGET[:2], "cities": TARGET[2:]}, budget=2)
    assert both.scores == pytest.approx(by_hand("mean", [[0, 1], [2]]), nan_ok=True)


def test_refuses():
    with pytest.raises(UsageError, match="which target. --target"):
        fastsel.bm25(POOL, budget=1)
    with pytest.raises(UsageError, match="aggregate='round_robin' is not known; it is one of: mean, max"):
        fastsel.bm25(POOL, target=TARGET, aggregate="round_robin")
    with pytest.raises(UsageError, match="k1=-1 must be at least 0"):
        fastsel.bm25(POOL, target=TARGET, k1=-1)
    with pytest.raises(UsageError, match="b=2 from 0 to 1"):
        fastsel.bm25(POOL, target=TARGET, b=2)
    with pytest.raises(UsageError, match="counts tokens"):
        fastsel.bm25(POOL, target=TARGET, budget="10tok")
    with pytest.raises(InputError, match="no row has a value in the column kind"):
        fastsel.bm25(POOL, target=TARGET, subtask_column="kind")
