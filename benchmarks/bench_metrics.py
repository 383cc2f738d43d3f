"""What each metric costs for 10,000 rows of 384 features, beside the naive form that others use."""

import numpy as np
import pytest
import torch

from fastsel import metrics

N, POOL, D = 10_000, 50_000, 384


def clustered(n, seed):
    """Unit rows around 100 centres, as embeddings of real text."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(100, D, generator=torch.Generator().manual_seed(0))
    rows = centres[torch.randint(0, 100, (n,), generator=generator)] + 0.5 * torch.randn(n, D, generator=generator)
    return (rows / rows.norm(dim=1, keepdim=True)).numpy()


def vendi_of_the_whole_matrix(x):
    """score_K of the package vendi_score: all eigenvalues of the n x n similarities, in float64."""
    values = np.linalg.eigvalsh((x.astype(np.float64) @ x.T.astype(np.float64)) / len(x))
    values = values[values > 0]
    return float(np.exp(-(values * np.log(values)).sum()))


def whole_matrix_mean(x):
    """compute_cos_distance of NovelSum's code, as one product."""
    unit = torch.from_numpy(x)
    return float((1 - unit @ unit.T).mean())


def faiss_knn(x):
    faiss = pytest.importorskip("faiss")
    index = faiss.IndexFlatL2(x.shape[1])
    index.add(x)
    squares, _ = index.search(x, 6)
    return float(np.sqrt(np.maximum(squares[:, 1:], 0)).mean())


PEERS = {
    "vendi": (2000, lambda x, _: metrics.vendi(x), lambda x, _: vendi_of_the_whole_matrix(x), "eigenvalues of K"),
    "dist_sum": (
        N, lambda x, _: metrics.dist_sum(x, average="all"), lambda x, _: whole_matrix_mean(x), "torch, whole matrix",
    ),
    "knn": (N, lambda x, _: metrics.knn(x), lambda x, _: faiss_knn(x), "faiss IndexFlatL2"),
}  # fmt: skip
ALONE = {
    "dist_sum, Euclidean": lambda x, _: metrics.dist_sum(x, metric="euclidean"),
    "radius": lambda x, _: metrics.radius(x),
    "vendi": lambda x, _: metrics.vendi(x),
    "log_determinant": lambda x, _: metrics.log_determinant(x),
    "cluster_inertia": lambda x, _: metrics.cluster_inertia(x),
    "partition_entropy": lambda x, pool: metrics.partition_entropy(x, pool),
    "facility_location": lambda x, pool: metrics.facility_location(x, pool),
}


@pytest.mark.parametrize("name", PEERS)
def test_against_the_naive_form(compare, name):
    n, ours, peer, label = PEERS[name]
    x = clustered(n, 1)

    def agrees(got, theirs):
        assert got == pytest.approx(theirs, rel=1e-4)

    found = compare(
        lambda: ours(x, None), lambda: peer(x, None), op=f"metrics.{name}", case=f"n={n:,}, d={D}", name=label,
        check=agrees, rounds=3,
    )  # fmt: skip
    assert found.ratio_cpu > 0.8


@pytest.mark.parametrize("name", ALONE)
def test_cost(benchmark, name):
    x, pool = clustered(N, 1), clustered(POOL, 2)
    value = benchmark.pedantic(lambda: ALONE[name](x, pool), rounds=2, iterations=1, warmup_rounds=1)
    assert np.isfinite(value)
    benchmark.extra_info.update(
        op=f"metrics.{name}", case=f"n={N:,} of {POOL:,}, d={D}", threads=torch.get_num_threads()
    )
