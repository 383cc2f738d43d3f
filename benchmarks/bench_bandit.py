"""bandit's bookkeeping against the authors' loop, rewards ready on both sides; and what asking ahead costs in rewards.

The authors' code has no package: CLUSTERUCB_CHECKOUT names a checkout of ZigeW/ClusterUCB at 8cbd9f0; without it those
rows are skipped. It runs as tests/selectors/golden/record_bandit.py runs it: ready rows in the place of gradients.
"""

import os
import random
import sys
import types
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastsel.selectors.bandit import draw_rows

CHECKOUT = os.environ.get("CLUSTERUCB_CHECKOUT")
NEEDS_AUTHORS = pytest.mark.skipif(
    CHECKOUT is None, reason="CLUSTERUCB_CHECKOUT names no folder with the authors' code"
)
SLOW = pytest.mark.slow
GATE = pytest.mark.gate


def pool(n, clusters, d=64, seed=0):
    """Labels, unit rows and unit target rows: clusters of rows, of which the target is near one."""
    generator = np.random.default_rng(seed)
    centres = generator.standard_normal((clusters, d))
    labels = generator.integers(0, clusters, n)
    rows = centres[labels] + generator.standard_normal((n, d))
    target = centres[:1] + 0.5 * generator.standard_normal((20, d))
    return labels, *(x / np.linalg.norm(x, axis=1, keepdims=True) for x in (rows, target))


class Rows:
    """As much of a dataset as their code asks for."""

    def __init__(self, rows):
        self.rows = rows

    def select(self, places):
        return Rows(self.rows[places])


@pytest.fixture
def authors(monkeypatch):
    """authors(labels, rows, target, budget, cold_start) -> arms in order and the rows drawn, ascending."""
    if "trak" not in sys.modules:  # imported by their file, and not used here
        for name in ("trak", "trak.projectors"):
            stub = types.ModuleType(name)
            stub.BasicProjector = stub.CudaProjector = stub.ProjectionType = None
            monkeypatch.setitem(sys.modules, name, stub)
    monkeypatch.syspath_prepend(CHECKOUT)
    module = import_module("data_selection.cluster_ucb_select_data")
    monkeypatch.setattr(module, "get_training_gradients", lambda dataset, *rest: torch.from_numpy(dataset.rows))
    monkeypatch.setattr(module, "args", SimpleNamespace(task="gsm"), raising=False)
    monkeypatch.setattr(module.tqdm, "tqdm", lambda steps, **options: steps)

    def run(labels, rows, target, budget, cold_start):
        members = [np.flatnonzero(labels == arm) for arm in range(labels.max() + 1)]
        clusters = [module.Cluster(part, Rows(rows[part])) for part in members]
        random.seed(42)
        _, arms, _, _ = module.ucb_selection(
            clusters, int(len(labels) * (budget - cold_start)), None, None, None, torch.from_numpy(target),
            method="ucb_beta", beta=1.0, cold_start_p=cold_start,
        )  # fmt: skip
        return arms, sorted(int(row) for cluster in clusters for row in cluster.selected_subset()[0])

    return run


@NEEDS_AUTHORS
@pytest.mark.parametrize(("n", "clusters"), [pytest.param(2000, 20, marks=GATE), pytest.param(20_000, 100, marks=SLOW)])
def test_bandit(compare, authors, n, clusters):
    """A fifth of the rows drawn, a twentieth of every cluster first; the same draws."""
    labels, rows, target = pool(n, clusters)
    scores = (rows @ target.T).mean(1)
    options = {"budget": 0.2, "cold_start": 0.05, "beta": 1.0, "rule": "official", "seed": 42}

    def ours():
        return draw_rows(labels, lambda wanted: scores[wanted], batch=32, **options)

    def same(found, theirs):
        arms, drawn = theirs
        assert found.arms[len(found.arms) - len(arms) :].tolist() == [int(arm) for arm in arms]
        assert sorted(found.rows.tolist()) == drawn

    found = compare(
        ours, lambda: authors(labels, rows, target, 0.2, 0.05), op="bandit",
        case=f"n={n:,}, {clusters} clusters, a fifth drawn", name="the authors' ucb_selection", check=same,
        info={"note": f"{ours().n_evaluated} rewards asked for, {len(ours().rows)} drawn"},
    )  # fmt: skip
    assert found.ratio_cpu >= (10 if n < 20_000 else 50)


@SLOW
@pytest.mark.parametrize("rule", ["shuffled", "official"])
@pytest.mark.parametrize("batch", [8, 32, 128])
def test_rewards_asked_for_in_vain(benchmark, batch, rule):
    """Beside the draws that need them: what a batch wastes, where a reward is a gradient."""
    labels, rows, target = pool(20_000, 100)
    scores = (rows @ target.T).mean(1)
    options = {"budget": 0.2, "cold_start": 0.0, "beta": 1.0, "rule": rule, "seed": 42, "batch": batch}
    calls = []

    def reward(wanted):
        calls.append(len(wanted))
        return scores[wanted]

    found = draw_rows(labels, reward, **options)
    benchmark.extra_info.update(
        op="bandit", case=f"n=20,000, 100 clusters, {rule}, batch {batch}", threads=torch.get_num_threads(),
        load=round(os.getloadavg()[0], 1),
        note=f"{found.n_evaluated} rewards for {len(found.rows)} draws, {np.mean(calls):.1f} a call",
    )  # fmt: skip
    benchmark.pedantic(lambda: draw_rows(labels, reward, **options), rounds=1, iterations=1)
    assert found.n_evaluated <= 1.5 * len(found.rows)
