"""bandit against a loop that keeps every reward in lists, and against the draws of the authors' code."""

import json
import logging
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsel.errors import UsageError
from fastsel.selectors import bandit
from fastsel.selectors.bandit import draw_rows

CASES = json.loads((Path(__file__).parent / "golden" / "bandit.json").read_text())


def data(seed, n, clusters, d):
    """As golden/record_bandit.py makes them; the last is each row's mean cosine with the target rows."""
    generator = np.random.default_rng(seed)
    centres = generator.standard_normal((clusters, d))
    labels = generator.integers(0, clusters, n)
    rows = centres[labels] + generator.standard_normal((n, d))
    target = centres[:1] + 0.5 * generator.standard_normal((5, d))
    rows, target = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (rows, target))
    return labels, (rows @ target.T).mean(1)


def drawn(labels, values, **options):
    defaults = {"budget": 0.2, "cold_start": 0.0, "beta": 1.0, "rule": "shuffled", "batch": 32, "seed": 42}
    return draw_rows(labels, lambda rows: values[rows], **{**defaults, **options})


def naive(labels, values, budget, cold_start, beta, rule, seed):
    """Means and deviations of lists at every draw, bounds rounded to 12 digits; returns rows and clusters in order."""
    members = [np.flatnonzero(labels == arm) for arm in range(labels.max() + 1)]
    n, stream, generator = sum(map(len, members)), random.Random(seed), np.random.default_rng(seed)
    left = [part.tolist() if rule == "official" else generator.permutation(part).tolist() for part in members]
    rewards, rows, arms = [[] for _ in members], [], []

    def take(arm, count):
        found = stream.sample(left[arm], count) if rule == "official" else left[arm][:count]
        for row in found:
            left[arm].remove(row)
            rows.append(row), arms.append(arm), rewards[arm].append(values[row])

    if cold_start:
        for arm, part in enumerate(members):
            if len(part):
                take(arm, max(int(len(part) * cold_start), 1))
    end = len(rows) + int(n * (budget - cold_start)) if rule == "official" else int(n * budget + 1e-9)
    while len(rows) < min(end, n):
        bounds = [
            -np.inf if not left[arm] else np.inf if not past else round(np.mean(past) + beta * np.std(past), 12)
            for arm, past in enumerate(rewards)
        ]
        take(int(np.argmax(bounds)), 1)
    return rows, arms


def assert_is_naive(labels, values, batch=8, **options):
    got = drawn(labels, values, batch=batch, **options)
    rows, arms = naive(labels, values, **options)
    assert got.rows.tolist() == rows and got.arms.tolist() == arms
    assert got.rewards.tolist() == values[rows].tolist()
    assert got.rows.dtype == got.arms.dtype == np.int64 and got.rewards.dtype == np.float64
    return got


def test_worked_example():
    """Clusters {0, 1, 2}, {3, 4} and {5}; rewards that are equal within a cluster, so that their deviation is 0.

    Each cluster is pulled once, the lowest first. Bounds are then 0.2, 0.5 and (used up): cluster 1 gives its other row
    and is used up too; what is left is cluster 0, also where its bound is below 0. Of six rows the best three are 5,
    then 3 and 4, which tie.
    """
    labels, values = np.array([0, 0, 0, 1, 1, 2]), np.array([0.2, 0.2, 0.2, 0.5, 0.5, 0.9])
    found = drawn(labels, values, budget=1.0)
    assert found.arms.tolist() == [0, 1, 2, 1, 0, 0] and sorted(found.rows.tolist()) == [0, 1, 2, 3, 4, 5]
    indices, gains = bandit(labels, lambda rows: values[rows], 3, budget=1.0)
    assert indices.tolist() == [5, 3, 4] and gains.tolist() == [0.9, 0.5, 0.5]
    assert drawn(labels, values - 1, budget=1.0).arms.tolist() == [0, 1, 2, 1, 0, 0]
    assert drawn(labels, values, budget=0.5).arms.tolist() == [0, 1, 2]


@pytest.mark.parametrize("rule", ["shuffled", "official"])
@pytest.mark.parametrize("beta", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("cold_start", [0.0, 0.05])
def test_matches_the_naive_loop(cold_start, beta, rule):
    labels, values = data(0, 400, 12, 16)
    assert_is_naive(labels, values, budget=0.4, cold_start=cold_start, beta=beta, rule=rule, seed=7)


@settings(max_examples=80, deadline=None)
@given(
    n=st.integers(1, 60), clusters=st.integers(1, 8), seed=st.integers(0, 999), batch=st.integers(1, 9),
    rule=st.sampled_from(["shuffled", "official"]), budget=st.sampled_from([0.0, 0.3, 1.0]),
    cold_start=st.sampled_from([0.0, 0.1, 0.3]), shift=st.sampled_from([0.0, -9.0]),
)  # fmt: skip
def test_law_equals_the_naive_loop(n, clusters, seed, batch, rule, budget, cold_start, shift):
    """Clusters may be empty or of one row, rows may have none, rewards may all be below 0."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(-1, clusters, n)
    values = generator.standard_normal(n) + shift
    cold_start = min(cold_start, budget)
    options = {"budget": budget, "cold_start": cold_start, "beta": 1.0, "rule": rule, "seed": seed}
    if (labels < 0).all():
        assert drawn(labels, values, batch=batch, **options).rows.tolist() == []
    else:
        assert_is_naive(labels, values, batch, **options)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_the_authors_draws(case):
    labels, values = data(*case["data"])
    options = {name: case[name] for name in ("cold_start", "budget", "beta")}
    for batch in (1, 32):
        found = drawn(labels, values, rule="official", batch=batch, **options)
        n_first = len(found.rows) - len(case["arms"])
        assert found.arms[n_first:].tolist() == case["arms"]
        assert found.rewards[n_first:] == pytest.approx(case["rewards"], rel=1e-12)
        assert sorted(found.rows.tolist()) == case["drawn"]


@pytest.mark.parametrize("rule", ["shuffled", "official"])
def test_law_asking_ahead_changes_no_draw(rule):
    labels, values = data(1, 2000, 30, 16)
    expected = drawn(labels, values, rule=rule, batch=1)
    assert expected.n_evaluated == len(expected.rows) == 400
    for batch in (2, 7, 100):
        found = drawn(labels, values, rule=rule, batch=batch)
        assert found.rows.tolist() == expected.rows.tolist() and found.arms.tolist() == expected.arms.tolist()
        assert 400 <= found.n_evaluated <= 400 * 1.5


def test_rewards_are_asked_for_once_and_in_batches():
    labels, values = data(1, 2000, 30, 16)
    asked = []

    def reward(rows):
        asked.append(rows.tolist())
        return torch.from_numpy(values[rows])

    bandit(labels, reward, 20, batch=32)
    every = [row for rows in asked for row in rows]
    assert len(set(every)) == len(every) and max(map(len, asked)) == 32 and len(asked) < 400 / 8


def test_it_finds_more_of_the_best_than_chance_does():
    """On clustered rows, a fifth drawn holds most of the best twentieth; both rules alike."""
    recall = {"shuffled": [], "official": []}
    for seed in range(10):
        labels, values = data(seed, 1000, 20, 16)
        best = set(np.argsort(-values)[:50].tolist())
        for rule, shares in recall.items():
            found = bandit(labels, lambda rows, values=values: values[rows], 50, rule=rule, cold_start=0.05, seed=seed)
            shares.append(len(best & set(found[0].tolist())) / 50)
    means = {rule: np.mean(shares) for rule, shares in recall.items()}
    assert min(means.values()) > 0.5 and abs(means["shuffled"] - means["official"]) < 0.1


def test_law_fewer_rows_are_the_first_and_seeds_differ():
    labels, values = data(2, 500, 10, 16)

    def reward(rows):
        return values[rows]

    indices, gains = bandit(labels, reward, 40)
    assert gains.tolist() == values[indices].tolist() == sorted(gains.tolist(), reverse=True)
    assert bandit(labels, reward, 7)[0].tolist() == indices[:7].tolist()
    assert len(bandit(labels, reward, 500)[0]) == 100 and len(bandit(labels, reward, 0)[0]) == 0
    assert bandit(labels, reward, 40, seed=1)[0].tolist() != indices.tolist()


def test_edges_no_rows_and_rows_without_a_cluster():
    assert bandit(np.zeros(0, int), lambda rows: pytest.fail("asked"), 5)[0].tolist() == []
    assert bandit([-1, -1], lambda rows: pytest.fail("asked"), 5, budget=1.0)[0].tolist() == []
    assert bandit([-1, 3, -1, 3], lambda rows: rows * 1.0, 9, budget=1.0)[0].tolist() == [3, 1]


def test_it_says_what_was_asked_for_in_vain(caplog):
    labels, values = data(2, 500, 10, 16)
    with caplog.at_level(logging.INFO, "fastsel"):
        found = drawn(labels, values)
    (record,) = [r for r in caplog.records if r.msg.startswith("bandit")]
    assert record.args[:4] == (100, 500, 10, found.n_evaluated)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": [0.5, 1.0]}, r"labels must be whole numbers \[n\], got float64 \[2\]"),
        ({"labels": [[0, 1]]}, r"labels must be whole numbers \[n\], got int64 \[1, 2\]"),
        ({"labels": [0, -2, 1]}, "labels: row 1 has -2"),
        ({"k": -1}, "k=-1 must not be negative"),
        ({"budget": 1.5}, "budget must be a share from 0 to 1, got 1.5"),
        ({"cold_start": -0.1}, "cold_start must be a share from 0 to 1, got -0.1"),
        ({"cold_start": 0.3}, "cold_start=0.3 is more than the whole budget=0.2"),
        ({"beta": -1.0}, "beta must be a number of at least 0"),
        ({"rule": "ucb1"}, "rule must be one of shuffled, official, got 'ucb1'"),
        ({"batch": 0}, "batch must be a whole number of at least 1, got 0"),
        ({"reward": lambda rows: [1.0]}, r"reward must return one number for each of \d+ rows, got \[1\]"),
        ({"reward": lambda rows: np.where(rows == 3, np.nan, 1.0)}, "reward: row 3 has nan, which is not a finite"),
    ],
)
def test_refuses(options, message):
    given_options = {"labels": [0] * 10, "reward": lambda rows: rows * 1.0, "k": 2, **options}
    if "reward" in options:
        given_options["budget"] = 1.0
    with pytest.raises(UsageError, match=message):
        bandit(given_options.pop("labels"), given_options.pop("reward"), given_options.pop("k"), **given_options)
