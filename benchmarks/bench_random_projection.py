"""random_projection against TRAK's projector (pip install --no-deps traker==0.3.2) and against index_add_ in torch.

pytest benchmarks/bench_random_projection.py --benchmark-autosave
"""

import warnings

import pytest
import torch

from fastsel.kernels._runtime import rng
from fastsel.kernels.random_projection import random_projection
from fastsel.kernels.random_projection.cases import CASES, make_call


def inputs_of(case):
    """x, k and the options of the kernel, without what is added to."""
    x, k, options, _ = make_call(CASES[case], torch.float32, "cpu")
    return x, k, options


def ours(x, k, options):
    return lambda: random_projection(x, k, **options, implementation="native")


def check_columns(x, k, options):
    """The first 32 coordinates of k, of dense signs, against float64."""
    truth = torch.zeros(len(x), 32, dtype=torch.float64)
    for start in range(0, x.shape[1], 1 << 17):
        tile = x[:, start : start + (1 << 17)].double()
        numbers = torch.arange(start, start + tile.shape[1])
        truth += tile @ rng.rademacher_signs(options["seed"], numbers, torch.arange(32)).double()

    def check(got, other):
        torch.testing.assert_close(got[:, :32].double(), truth, rtol=0, atol=8e-6 * float(truth.abs().max()))
        check_norms(x, k)(got, other)

    return check


def check_norms(x, peer_scale, our_scale=None):
    """Other signs: only lengths can be compared, within six standard deviations of both."""
    lengths = x.double().square().sum(1)

    def check(got, other):
        for y, scale in ((got, our_scale or peer_scale), (other, peer_scale)):
            error = y.double().square().sum(1) / scale / lengths - 1
            assert error.abs().max() < 6 * (2 / y.shape[1]) ** 0.5

    return check


def stored_map(x, k, options):
    """The rows and signs of our own map, kept: int64 and float32, 12 bytes a coordinate."""
    rows, signs = rng.sjlt_map(options["seed"], torch.arange(x.shape[1]), k, 1)
    return rows[0], signs[0]


@pytest.mark.gate
def test_gate_equals_the_stored_map():
    x, k, options = inputs_of("whole_blocks")
    rows, signs = stored_map(x, k, options)
    expected = torch.zeros(len(x), k).index_add_(1, rows, x * signs)
    torch.testing.assert_close(ours(x, k, options)(), expected, rtol=0, atol=1e-5)


def test_sjlt_against_a_stored_map(compare_all, peak_memory):
    """Three ways to write it in torch; the map is made before the clock starts."""
    x, k, options = inputs_of("million")
    rows, signs = stored_map(x, k, options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch calls its CSR a beta
        places = torch.stack([rows, torch.arange(len(rows))])
        matrix = torch.sparse_coo_tensor(places, signs, (k, len(rows)), check_invariants=False).to_sparse_csr()

    def agrees(got, other):
        torch.testing.assert_close(got, other, rtol=0, atol=1e-4)

    peers = {
        "torch index_add_, rows": lambda: torch.zeros(len(x), k).index_add_(1, rows, x * signs),
        "torch index_add_, columns": lambda: torch.zeros(k, len(x)).index_add_(0, rows, (x * signs).T).T,
        "torch sparse product": lambda: (matrix @ x.T).T,
    }
    _, our_peak = peak_memory(ours(x, k, options))
    compare_all(
        ours(x, k, options),
        [{"name": name, "call": call, "check": agrees} for name, call in peers.items()],
        op="random_projection", case="million", info={"our_peak_bytes": our_peak, "note": "sjlt"},
    )  # fmt: skip


def test_grass_against_torch(compare):
    """The mask, then SJLT, against the gathered columns and index_add_ with a stored map."""
    x, k, options = inputs_of("lora_grass")
    kept = rng.coordinate_mask(options["seed"], options["total"], options["mask"])
    kept = kept[kept < x.shape[1]]
    rows, signs = rng.sjlt_map(options["seed"], torch.arange(len(kept)), k, 1)

    def plain():
        return torch.zeros(len(x), k).index_add_(1, rows[0], x[:, kept] * signs[0])

    def agrees(got, other):
        torch.testing.assert_close(got, other, rtol=0, atol=1e-5)

    compare(
        ours(x, k, options),
        plain,
        op="random_projection",
        case="lora_grass",
        name="torch index_add_, rows",
        check=agrees,
    )


@pytest.mark.slow
@pytest.mark.parametrize("case", ["million", "million_dense"])
def test_against_trak(compare, case):
    """TRAK's BasicProjector makes its matrix again in each call, as LESS has it on a machine without fast_jl."""
    projectors = pytest.importorskip("trak.projectors", reason="pip install --no-deps traker==0.3.2")
    x, k, options = inputs_of(case)
    peer = projectors.BasicProjector(
        grad_dim=x.shape[1], proj_dim=k, seed=0, proj_type="rademacher", device="cpu", block_size=128
    )
    check = check_norms(x, k, 1) if case == "million" else check_columns(x, k, options)
    compare(
        ours(x, k, options), lambda: peer.project(x, model_id=0),
        op="random_projection", case=case, name="TRAK 0.3.2 BasicProjector, rademacher", check=check,
    )  # fmt: skip
