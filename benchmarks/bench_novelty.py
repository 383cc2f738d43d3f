"""novelty against plain torch, NovelSelect and NovelSum against the authors' code, and how NovelSelect grows.

The authors' code has no package: NOVELSUM_CHECKOUT names a folder with its novelselect.py, novelsum.py and utils.py
(UmeanNever/NovelSum at b594962); without it those rows are skipped. It runs as
tests/selectors/golden/record_novelsum.py runs it: on the CPU, and NovelSelect in float32, which two words in its text
ask for. Each of these rows takes the authors minutes, and is timed once.
"""

import contextlib
import logging
import os
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from fastsel.kernels._runtime.testing import assert_as_exact
from fastsel.kernels.novelty import novelty
from fastsel.kernels.novelty.cases import CASES, make_inputs
from fastsel.metrics import novelsum_grid
from fastsel.selectors import novelselect
from fastsel.selectors.density import densities, mean_squared_distances
from fastsel.selectors.rows import Rows

CHECKOUT = os.environ.get("NOVELSUM_CHECKOUT")
NEEDS_AUTHORS = pytest.mark.skipif(CHECKOUT is None, reason="NOVELSUM_CHECKOUT names no folder with the authors' code")
# The authors' code asks for CUDA's autocast by its old name, on a machine without CUDA.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.cuda.amp.autocast:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*CUDA is not available:UserWarning"),
]
SLOW = pytest.mark.slow
GATE = pytest.mark.gate


@pytest.fixture
def authors(monkeypatch):
    """authors(name) -> that module of the authors', on a CPU and in float32."""
    import faiss

    monkeypatch.setattr(faiss, "StandardGpuResources", lambda: None, raising=False)
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", lambda resources, gpu, index: index, raising=False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.syspath_prepend(CHECKOUT)

    def load(name):
        text = (Path(CHECKOUT) / f"{name}.py").read_text()
        module = types.ModuleType(name)
        text = text.replace(".half()", ".float()").replace("torch.float16", "torch.float32")
        exec(compile(text, f"{name}.py", "exec"), module.__dict__)
        module.tqdm = lambda steps, **options: steps
        return module

    yield load
    sys.modules.pop("utils", None)


@pytest.fixture
def work_done():
    """work_done() -> the numbers that novelselect last reported: k, n, rows scored, their share in percent, passes."""
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.args)
    logger = logging.getLogger("fastsel")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lambda: records[-1]
    logger.removeHandler(handler)
    logger.setLevel(level)


def pool(n, d=384, seed=0):
    """Normal numbers: a pool without near-duplicates, on which lists can be compared."""
    return np.random.RandomState(seed).standard_normal((n, d)).astype(np.float32)


def score(x, density, row, picks):
    """The official rule's novelty of one row, in float64."""
    unit = Rows(x, unit=True).exact(np.append(picks, row)).numpy()
    values = np.sort((1 - unit[:-1] @ unit[-1]) * (density[row] + density[picks]))
    return (values / np.arange(1, len(values) + 1)).mean()


def plain_torch(rows, picks, weights, row_density, pick_density):
    """What one writes first."""
    values = (1 - rows @ picks.T) * (row_density.float()[:, None] + pick_density.float())
    return (values.sort(dim=1).values.double() @ weights).float()


@pytest.mark.parametrize("case", ["contenders", pytest.param("odd", marks=GATE)])
def test_scores_of_a_block(compare, case):
    inputs = make_inputs(CASES[case], torch.float32, "cpu")[:-1]
    truth = novelty(*(x.double() for x in inputs), implementation="reference")
    plain = novelty(*inputs, implementation="reference")
    found = compare(
        lambda: novelty(*inputs, implementation="native"), lambda: plain_torch(*inputs),
        op="novelty", case=case, name="torch, distances stored and sorted",
        check=lambda got, _: assert_as_exact(got, truth, plain, reduction_length=sum(inputs[1].shape)),
    )  # fmt: skip
    assert found.ratio_cpu > 1.2 or case == "odd"


def test_append_bound_of_a_pool(compare):
    """Against reading the rows once, which no implementation can avoid: a product with two vectors."""
    rows, picks, weights, p, q, _ = make_inputs(CASES["pool"], torch.float32, "cpu")
    vectors = torch.randn(rows.shape[1], 2)
    compare(
        lambda: novelty(rows, picks, weights, p, q, rank_by="order", implementation="native"), lambda: rows @ vectors,
        op="novelty", case="append bound, n=100,000, d=384", name="torch.mm with two columns", check=None,
    )  # fmt: skip


@NEEDS_AUTHORS
@pytest.mark.parametrize(
    ("n", "d", "k"), [pytest.param(2500, 96, 250, marks=GATE), pytest.param(10_000, 384, 1000, marks=SLOW)]
)
def test_novelselect(compare, peak_memory, authors, work_done, n, d, k):
    x, module = pool(n, d), authors("novelselect")
    density = densities(mean_squared_distances(Rows(x), Rows(x), [10])[10], 0.5)

    def same(ours, theirs):
        """The same list, up to rows that float32 cannot tell apart: there the authors' list is taken and goes on."""
        theirs, done, n_ties = np.array(theirs), 0, 0
        indices = ours[0]
        while done < k and (indices != theirs[done:]).any():
            done += int((indices != theirs[done:]).argmax())
            n_ties += 1
            best = novelselect(x, 1, initial=theirs[:done], density=density)[1][0]
            assert n_ties <= 5 and score(x, density, theirs[done], theirs[:done]) == pytest.approx(best, rel=2e-7)
            done += 1
            indices = novelselect(x, k - done, initial=theirs[:done], density=density)[0]

    _, our_peak = peak_memory(lambda: novelselect(x, k))
    found = compare(
        lambda: novelselect(x, k), lambda: module.novelselect(x, k, seed=42),
        op="novelselect", case=f"n={n:,}, d={d}, k={k:,}", name="the authors' novelselect.py, float32, CPU", check=same,
        info={"our_peak_bytes": our_peak, "note": f"{work_done()[3]:.2f} % of rows times picks scored exactly"},
    )  # fmt: skip
    assert found.ratio_cpu >= (2 if n < 10_000 else 60)


@SLOW
def test_novelselect_of_a_large_pool(benchmark, peak_memory, work_done):
    """100,000 rows, 5,000 picks: within 2 GB beside the rows, and at most 1 % of rows times picks scored."""
    x = pool(100_000)
    (indices, _), peak = peak_memory(lambda: novelselect(x, 5000))
    k, n, _, share, n_passes = work_done()
    benchmark.extra_info.update(
        op="novelselect", case=f"n={n:,}, d=384, k={k:,}", threads=torch.get_num_threads(),
        load=round(os.getloadavg()[0], 1), our_peak_bytes=peak,
        note=f"{share:.3f} % scored exactly, {n_passes} passes",
    )  # fmt: skip
    benchmark.pedantic(lambda: novelselect(x, 5000), rounds=1, iterations=1)
    assert len(set(indices.tolist())) == 5000
    assert peak <= 2 * 2**30 and share <= 1


@NEEDS_AUTHORS
@pytest.mark.parametrize("grid", [False, True], ids=["recommended", "grid"])
@pytest.mark.parametrize(("n", "m"), [pytest.param(500, 2000, marks=GATE), pytest.param(10_000, 50_000, marks=SLOW)])
def test_novelsum(compare, peak_memory, authors, n, m, grid):
    """One value, or the 18 of the authors' command line; the reference's index is theirs to build."""
    reference = pool(m)
    x, module, index_of = reference[:n], authors("novelsum"), authors("utils").FaissIndex
    powers = {"alphas": (0, 1, 2), "betas": (0, 0.25, 0.5), "neighbours": (5, 10)} if grid else {
        "alphas": (1,), "betas": (0.5,), "neighbours": (10,)
    }  # fmt: skip

    def theirs():
        index, distances = index_of(reference, 0), module.compute_cos_distance(x, torch.device("cpu"))
        values = {}
        for beta in powers["betas"]:
            for k in powers["neighbours"]:
                density = index.local_density(x, n_neighbors=k, power=beta, regularization=1e-9)
                for alpha in powers["alphas"]:
                    values[(k, beta, alpha)] = module.novelsum(distances, density, power=alpha)
        return values

    def same(ours, peer):
        for key, value in peer.items():
            assert ours[key] == pytest.approx(value, rel=2e-6), key

    def ours():
        return novelsum_grid(x, reference, **powers)

    _, our_peak = peak_memory(ours)
    found = compare(
        ours, theirs, op="novelsum", case=f"{n:,} against {m:,}, d=384, {'18 values' if grid else 'one value'}",
        name="the authors' novelsum.py, CPU", check=same, info={"our_peak_bytes": our_peak},
    )  # fmt: skip
    assert found.ratio_cpu >= (2 if n < 10_000 else 20)


@SLOW
@pytest.mark.parametrize(
    ("n", "k"), [(n, 500) for n in (5000, 10_000, 20_000, 40_000)] + [(20_000, k) for k in (250, 1000, 2000)]
)
def test_growth(benchmark, peak_memory, work_done, n, k):
    """n doubles at fixed k, k doubles at fixed n: time, memory, the share scored exactly and the passes."""
    x = pool(n)
    density = np.random.RandomState(1).uniform(1, 2, n)
    _, peak = peak_memory(lambda: novelselect(x, k, density=density))
    cpu = time.process_time()
    benchmark.pedantic(lambda: novelselect(x, k, density=density), rounds=1, iterations=1)
    cpu = time.process_time() - cpu
    *_, share, n_passes = work_done()
    benchmark.extra_info.update(
        op="novelselect", case=f"growth, n={n:,} d=384 k={k:,}, density given", threads=torch.get_num_threads(),
        load=round(os.getloadavg()[0], 1), our_cpu_s=cpu, our_peak_bytes=peak,
        note=f"{share:.3f} % scored exactly, {n_passes} passes",
    )  # fmt: skip
