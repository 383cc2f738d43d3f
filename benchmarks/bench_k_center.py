"""k_center: the kernel against the matrix product that it contains; the selector against a loop over the picks.

pytest benchmarks/bench_k_center.py --benchmark-autosave            # FASTSEL_BENCH_POOL: embeddings, .npy [n, d]
FASTSEL_DIVERSE_EVOL=checkout pytest benchmarks/bench_k_center.py -k authors --benchmark-autosave
"""

import importlib.util
import os
import sys
import warnings
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import numpy as np
import pytest
import torch

from fastsel.kernels._runtime.testing import assert_as_exact
from fastsel.kernels.k_center import k_center as kernel
from fastsel.kernels.k_center.cases import CASES, make_inputs
from fastsel.selectors import k_center

EMBEDDINGS = os.environ.get("FASTSEL_BENCH_POOL", "")
AUTHORS = os.environ.get("FASTSEL_DIVERSE_EVOL", "")
needs_embeddings = pytest.mark.skipif(
    not EMBEDDINGS.endswith(".npy"), reason="FASTSEL_BENCH_POOL names no .npy of embeddings of a real pool"
)
GATE = pytest.param("newest", marks=pytest.mark.gate)


def run_kernel(inputs, implementation="native"):
    points, centres, nearest, rows, point_sqnorms, centre_sqnorms = inputs
    return kernel(
        points, centres, nearest, rows=rows, point_sqnorms=point_sqnorms, centre_sqnorms=centre_sqnorms,
        implementation=implementation,
    )  # fmt: skip


def check_against_reference(inputs, got):
    """The first 2,000 points against float64."""
    some = slice(0, 2000)
    few = (inputs[0][some], inputs[1], inputs[2][some], None, inputs[4][some], inputs[5])
    truth, plain = (
        run_kernel([x.double() if exact and x is not None else x for x in few], "reference") for exact in (True, False)
    )
    assert_as_exact(got.nearest[some], truth.nearest, plain.nearest, reduction_length=inputs[0].shape[1])


@pytest.mark.parametrize("case", [GATE, "minilm", "minilm_many", pytest.param("llm_states", marks=pytest.mark.slow)])
def test_kernel_against_plain_torch(compare_all, case):
    """The bare product writes into a buffer that it is given; plain torch adds the norms and takes the minimum."""
    inputs = make_inputs(CASES[case], torch.float32, "cpu")
    points, centres, nearest, _, point_sqnorms, centre_sqnorms = inputs
    buffer = torch.empty(len(points), len(centres))

    def plain():
        squares = torch.addmm(centre_sqnorms, points, centres.T, alpha=-2)
        return torch.minimum(nearest, squares.amin(1).add_(point_sqnorms).clamp_(min=0))

    def agrees(got, other):
        check_against_reference(inputs, got)
        torch.testing.assert_close(got.nearest, other, rtol=0, atol=1e-5)

    compare_all(
        lambda: run_kernel(inputs),
        [
            {"name": "torch.mm alone", "call": lambda: torch.mm(points, centres.T, out=buffer), "check": None},
            {"name": "torch, distances stored", "call": plain, "check": agrees},
        ],
        op="k_center", case=case,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ the selector


def random_rows(n, d=384, seed=0):
    x = np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def real_rows(n):
    x = np.load(EMBEDDINGS, mmap_mode="r")
    assert len(x) >= n, f"{EMBEDDINGS} has {len(x)} rows, {n} are needed"
    return np.ascontiguousarray(x[:n], dtype=np.float32)


def running_minimum(x, k):
    """What one writes in plain torch: one product with the newest centre for each pick, already at memory speed."""
    x = torch.from_numpy(x)
    sqnorms = x.square().sum(1)
    nearest, row, picks = torch.full((len(x),), torch.inf), 0, []
    for _ in range(k):
        picks.append(row)
        torch.minimum(nearest, torch.addmv(sqnorms, x, x[row], alpha=-2).add_(sqnorms[row]), out=nearest)
        row = int(nearest.argmax())
    return np.array(picks)


def distances_of_picks(x, picks):
    """Float64 distance of each pick to the picks before it: the greedy's objective, whatever chose them."""
    y = torch.from_numpy(x[picks]).double()
    norms = y.square().sum(1)
    squares = torch.addmm(norms[:, None] + norms[None, :], y, y.T, alpha=-2).clamp_(min=0)
    squares[torch.ones_like(squares, dtype=torch.bool).triu()] = torch.inf
    return squares.amin(1).sqrt().numpy()


def assert_same_greedy(x):
    def check(ours, picks):
        rows, gains = ours
        np.testing.assert_allclose(distances_of_picks(x, rows)[1:], gains[1:], rtol=1e-6)
        # float32 may take another of two rows that are equally far, and goes its own way from there.
        same = int((rows == picks).argmin()) if (rows != picks).any() else len(rows)
        np.testing.assert_allclose(distances_of_picks(x, picks)[1:], gains[1:], rtol=1e-3)
        assert same > min(len(rows), 50)

    return check


def compare_selectors(compare, peak_memory, x, k, case):
    _, peak = peak_memory(lambda: k_center(x, k))
    return compare(
        lambda: k_center(x, k), lambda: running_minimum(x, k),
        op="selectors.k_center", case=case, name="torch, running minimum", check=assert_same_greedy(x),
        info={"our_peak_bytes": peak},
    )  # fmt: skip


@pytest.mark.gate
def test_selector_on_random_rows(compare, peak_memory):
    """Independent directions: the worst case, distances are almost equal. The rows (77 MB) lie outside a processor's
    cache, as a pool's do; 10,000 of them fit inside, and there the loop is as fast.
    """
    found = compare_selectors(compare, peak_memory, random_rows(50_000), 300, "random, n=50,000 k=300")
    assert found.ratio_cpu > 1.2


@pytest.mark.slow
def test_selector_on_many_random_rows(compare, peak_memory):
    compare_selectors(compare, peak_memory, random_rows(50_000), 2500, "random, n=50,000 k=2,500")


@needs_embeddings
@pytest.mark.slow
def test_selector_on_real_embeddings(compare, peak_memory):
    found = compare_selectors(compare, peak_memory, real_rows(50_000), 2500, "real, n=50,000 k=2,500")
    assert found.ratio > 1.5


@needs_embeddings
@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "k"), [(12_500, 1000), (25_000, 1000), (50_000, 1000), (50_000, 500), (50_000, 2000), (50_000, 4000)]
)
def test_growth(benchmark, peak_memory, n, k):
    """n doubles at one k, k doubles at one n."""
    x = real_rows(n)
    _, peak = peak_memory(lambda: k_center(x, k))
    benchmark.extra_info.update(op="selectors.k_center", case=f"growth, n={n:,} k={k:,}", our_peak_bytes=peak)
    benchmark.pedantic(lambda: k_center(x, k), rounds=3, iterations=1)


def authors_sampling():
    """KCenterSampling of OFA-Sys/DiverseEvol, from a checkout; what it imports and does not use here is left out."""
    base, helpers = ModuleType("evol_schedule_base"), ModuleType("utils")
    base.EvolSchedule = object
    helpers.compute_kernel_bias = helpers.transform_and_normalize = None
    torch.distributed.get_rank = lambda: 0
    file = Path(AUTHORS) / "evol_schedules" / "kcenter_sampling.py"
    spec = importlib.util.spec_from_file_location("authors_k_center", file)
    module = importlib.util.module_from_spec(spec)
    with patch.dict(sys.modules, {"evol_schedule_base": base, "utils": helpers}):
        spec.loader.exec_module(module)
    return module.KCenterSampling


@pytest.mark.slow
@pytest.mark.skipif(not AUTHORS, reason="FASTSEL_DIVERSE_EVOL names no checkout of the authors' code")
def test_selector_against_the_authors(compare):
    """Their selection step alone: all distances, then a pick at a time from the matrix of those to chosen rows."""
    n, k = 20_000, 1000
    x = real_rows(n) if EMBEDDINGS.endswith(".npy") else random_rows(n)
    labeled = np.arange(100)

    def authors():
        sampling = authors_sampling()
        strategy = sampling.__new__(sampling)
        strategy.n_pool, strategy.whiten_n_components = n, -1
        strategy.labeled_idx = torch.arange(n) < len(labeled)
        strategy.get_embeddings_all_data = lambda **_: list(torch.from_numpy(x))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return strategy.query(0, k, "").numpy()

    def check(ours, theirs):
        assert len(np.intersect1d(ours[0], theirs)) > 0.98 * k

    found = compare(
        lambda: k_center(x, k, initial=labeled), authors,
        op="selectors.k_center", case=f"real, n={n:,} k={k:,}, 100 labelled", name="DiverseEvol, KCenterSampling",
        check=check,
    )  # fmt: skip
    assert found.ratio > 20
