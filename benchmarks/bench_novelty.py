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
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from fastsel.kernels._runtime.testing import assert_as_exact
from fastsel.kernels.novelty import novelty
from fastsel.kernels.novelty.cases import CASES, make_inputs
from fastsel.selectors import novelselect

CHECKOUT = os.environ.get("NOVELSUM_CHECKOUT")
NEEDS_AUTHORS = pytest.mark.skipif(CHECKOUT is None, reason="NOVELSUM_CHECKOUT names no folder with the authors' code")
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

    def same(ours, theirs):
        assert ours[0].tolist() == theirs

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
