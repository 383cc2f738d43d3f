"""label_gain against the dense matrix product it replaces, and mig's choice against the authors' sampler.

The authors' code (yichengchen24/MIG at 969eb53) is taken from the checkout that FASTSEL_AUTHORS_MIG names; its dense
loop is timed as it is, on the CPU, with its data loading and embedding stood in for.
"""

import os
import sys
import types

import numpy as np
import pytest
import torch

from fastsel.kernels.label_gain import label_gain
from fastsel.kernels.label_gain.cases import CASES, make_inputs
from fastsel.selectors import mig

N_LABELS, SAMPLES = 1000, 2000
AUTHORS = os.environ.get("FASTSEL_AUTHORS_MIG")


def annotated_rows(n, n_labels, seed=0):
    """(indptr, indices, None), quality, similarity: one to six tags a row, popular ones often; tags have near twins."""
    dice = np.random.default_rng(seed)
    vectors = (
        0.25 * dice.standard_normal((n_labels, 32))
        + dice.standard_normal((n_labels // 4, 32))[dice.integers(0, n_labels // 4, n_labels)]
    )
    vectors = torch.from_numpy(vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).float()
    similarity = vectors @ vectors.T
    similarity = similarity.where(similarity >= 0.9, 0.0)
    shares = 1 / np.arange(1, n_labels + 1) ** 0.8
    order = dice.permutation(n_labels)
    tags = [np.unique(order[dice.choice(n_labels, size, p=shares / shares.sum())]) for size in dice.integers(1, 7, n)]
    indptr = np.cumsum([0, *map(len, tags)])
    quality = dice.uniform(1, 30, n).astype(np.float32)
    return (indptr, np.concatenate(tags).astype(np.int32), None), quality, similarity


def authors_sampler(checkout):
    """MIGSampler, with the two modules that it takes only types from stood in for."""
    data, label = types.ModuleType("mig.data"), types.ModuleType("mig.label")
    data.DataPoint, data.Dataset, label.LabelGraph = object, list, object
    sys.path.insert(0, checkout)
    sys.modules |= {"mig.data": data, "mig.label": label}
    from mig.sampler import MIGSampler

    return MIGSampler


class LabelGraph:
    """What the sampler asks of a label graph."""

    def __init__(self, labels, quality, similarity):
        self.labels, self.quality, self.wam = labels, quality, similarity

    def __len__(self):
        return len(self.wam)

    def vectorize(self, pool, norm):
        """The dense matrix that the sampler multiplies."""
        indptr, indices, _ = self.labels
        counts = np.diff(indptr)
        vectors = torch.zeros(len(pool), len(self))
        vectors[np.repeat(np.arange(len(pool)), counts), indices.astype(np.int64)] = torch.from_numpy(
            np.repeat(self.quality, counts)
        )
        return vectors


def same_list_up_to_float32(labels, quality, similarity):
    """The gate: their picks are ours; where they first differ, the two gains are equal in float32."""

    def check(ours, theirs):
        indices, gains = ours
        differing = np.flatnonzero(indices != np.asarray(theirs))
        if len(differing):
            step = int(differing[0])
            options = {"quality": quality, "similarity": similarity, "initial": indices[:step]}
            order, their_gains = mig(labels, len(quality), **options)
            at_that_step = their_gains[0]
            assert theirs[step] in order[:2] and abs(gains[step] / at_that_step - 1) < 1e-6, f"step {step}"
            assert len(set(indices.tolist()) & set(theirs)) >= 0.999 * len(theirs)

    return check


@pytest.mark.skipif(AUTHORS is None, reason="FASTSEL_AUTHORS_MIG names no checkout of yichengchen24/MIG")
@pytest.mark.parametrize(
    ("n", "n_labels", "k"), [pytest.param(3000, 300, 300, marks=pytest.mark.gate), (20_000, N_LABELS, SAMPLES)]
)
def test_authors_sampler(compare, peak_memory, n, n_labels, k):
    labels, quality, similarity = annotated_rows(n, n_labels)
    sampler = authors_sampler(AUTHORS)(LabelGraph(labels, quality, similarity), norm=False)

    def ours():
        return mig(labels, k, quality=quality, similarity=similarity)

    _, our_peak = peak_memory(ours)
    found = compare(
        ours, lambda: list(sampler.sample(list(range(n)), k)),
        op="mig", case=f"n={n:,}, {n_labels:,} labels, k={k:,}", name="the authors' MIGSampler (CPU)",
        check=same_list_up_to_float32(labels, quality, similarity), info={"our_peak_bytes": our_peak},
    )  # fmt: skip
    if n == 20_000:
        assert found.ratio_cpu > 100


@pytest.mark.parametrize("rule", ["first_order", "exact"])
@pytest.mark.parametrize(
    ("n", "k"), [(n, 5000) for n in (50_000, 100_000, 200_000)] + [(100_000, k) for k in (2500, 10_000)]
)
def test_growth(benchmark, peak_memory, rule, n, k):
    """4,531 labels, as the authors' pool has; no peer: a dense matrix of 200,000 such rows takes 3.6 GB."""
    labels, quality, similarity = annotated_rows(n, 4531)
    options = {"quality": quality, "similarity": similarity, "gain": rule}
    _, peak = peak_memory(lambda: mig(labels, k, **options))
    benchmark.pedantic(lambda: mig(labels, k, **options), rounds=2, iterations=1)
    benchmark.extra_info.update(op="mig", case=f"growth, {rule}, n={n:,} k={k:,}", our_peak_bytes=peak)


@pytest.mark.parametrize("implementation", ["native", "torch"])
@pytest.mark.parametrize("case", [pytest.param("pool", marks=pytest.mark.gate), "front"])
def test_dense_product(compare, case, implementation):
    """What the first-order gains are in dense form, without the making of the dense matrix."""
    label_rows, state, rows, *_ = make_inputs(CASES[case], torch.float32, "cpu")
    dense = torch.zeros(len(label_rows), label_rows.n_labels)
    row_of_entry = torch.arange(len(label_rows)).repeat_interleave(label_rows.indptr.diff())
    dense[row_of_entry, label_rows.indices.long()] = label_rows.values
    dense = dense if rows is None else dense[rows]

    def agrees(ours, theirs):
        torch.testing.assert_close(ours.float(), theirs, rtol=1e-4, atol=1e-4)

    compare(
        lambda: label_gain(label_rows, state, rows, implementation=implementation),
        lambda: dense @ (0.8 * (state + 1e-6) ** -0.2).float(),
        op="label_gain", case=f"{case}, {implementation}", name="torch, dense float32 product", check=agrees,
    )  # fmt: skip
