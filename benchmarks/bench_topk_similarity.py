"""topk_similarity against faiss' IndexFlat and against a matrix product with torch.topk, tile by tile."""

import numpy as np
import pytest
import torch

from fastsel.kernels._runtime.testing import assert_as_exact
from fastsel.kernels.topk_similarity import topk_similarity
from fastsel.kernels.topk_similarity.cases import CASES, make_inputs

SEARCH = CASES["search"]


def product_and_topk(queries, points, k, step=256):
    """What one writes first, in blocks that fit into memory."""
    found = [(block @ points.T).topk(k) for block in queries.split(step)]
    return torch.cat([x.values for x in found]), torch.cat([x.indices for x in found])


def product_alone(queries, points, step=256):
    """The floor of anything that computes every similarity."""
    buffer = torch.empty(step, len(points))
    for block in queries.split(step):
        torch.mm(block, points.T, out=buffer[: len(block)])


def faiss_flat(queries, points, k):
    faiss = pytest.importorskip("faiss")
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(points.shape[1])
    index.add(points.numpy())
    values, indices = index.search(queries.numpy(), k)
    return torch.from_numpy(values), torch.from_numpy(indices)


def check_values(inputs, got):
    """The gate: a sample of queries against float64."""
    queries, points, k, metric, exclude, _ = inputs
    sample = slice(0, 100)
    truth, plain = (
        topk_similarity(q, p, k, metric=metric, exclude=exclude, implementation="reference")
        for q, p in ((queries[sample].double(), points.double()), (queries[sample], points))
    )
    assert_as_exact(got.values[sample], truth.values, plain.values, reduction_length=points.shape[1])


def agrees(inputs):
    def check(got, peer):
        check_values(inputs, got)
        np.testing.assert_allclose(got.values, peer[0], rtol=1e-4, atol=1e-5)
        assert (got.indices == peer[1]).float().mean() > 0.999

    return check


PEERS = [
    {"name": "faiss IndexFlatIP", "call": faiss_flat},
    {"name": "torch mm + topk", "call": product_and_topk},
]


@pytest.mark.parametrize("case", ["search"])
def test_search(compare_all, peak_memory, case):
    inputs = make_inputs(CASES[case], torch.float32, "cpu")
    queries, points, k, *_ = inputs
    _, our_peak = peak_memory(lambda: topk_similarity(queries, points, k, minimum=True))
    peers = [
        {"name": peer["name"], "call": lambda peer=peer: peer["call"](queries, points, k), "check": agrees(inputs)}
        for peer in PEERS
    ]
    peers.append({
        "name": "matrix product alone", "call": lambda: product_alone(queries, points),
        "check": lambda ours, _: check_values(inputs, ours),
    })  # fmt: skip
    compare_all(
        lambda: topk_similarity(queries, points, k, minimum=True), peers,
        op="topk_similarity", case=f"{case}: 5,000 x 50,000 x 384, k=10, with the minimum",
        info={"our_peak_bytes": our_peak},
    )  # fmt: skip


@pytest.mark.gate
def test_gate(compare):
    """No slower than torch's product with topk. Small enough for CI, large enough for much the same ratio each time."""
    queries, points, _, *rest = make_inputs(SEARCH, torch.float32, "cpu")
    inputs = (queries[:2000], points[:20_000], 10, *rest)
    found = compare(
        lambda: topk_similarity(*inputs[:3]), lambda: product_and_topk(*inputs[:3]),
        op="topk_similarity", case="gate: 2,000 x 20,000 x 384, k=10", name="torch mm + topk", check=agrees(inputs),
    )  # fmt: skip
    assert found.ratio_cpu > 1.0
