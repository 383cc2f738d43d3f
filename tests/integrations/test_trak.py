"""TRAK's interface, and its numbers: golden ones recorded by golden/record_trak.py, live ones where it is installed."""

import json
from pathlib import Path

import pytest
import torch

from fastsel.integrations.trak import BasicProjector, CudaProjector, FastJlProjector, ProjectionType, Projector
from fastsel.kernels.random_projection import fast_jl_projection, random_projection

GOLDEN = json.loads((Path(__file__).parent / "golden" / "trak_basic_projector.json").read_text())


def whole_numbers(b, p):
    """Small whole numbers: their sums are exact in float32, whatever the order."""
    return (torch.arange(b * p).reshape(b, p) * 7919 % 13 - 6).float()


@pytest.mark.parametrize("name", GOLDEN["cases"])
def test_basic_projector_gives_the_numbers_of_trak(name):
    case = GOLDEN["cases"][name]
    if case["options"]["proj_type"] == "rademacher":
        first_bits = torch.empty(64).bernoulli_(0.5, generator=torch.Generator().manual_seed(0)).tolist()
        if first_bits != GOLDEN["bits_of_seed_0"]:
            pytest.skip("this build of torch draws other bits than the one that recorded the numbers")
    projector = BasicProjector(**case["options"], device="cpu")
    got = projector.project(whole_numbers(3, case["options"]["grad_dim"]), case["project_model_id"])
    torch.testing.assert_close(got, torch.tensor(case["projected"]), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("proj_type", ["rademacher", "normal"])
@pytest.mark.parametrize("block_size", [100, 7, 40])
def test_basic_projector_equals_the_installed_trak(block_size, proj_type, dtype):
    theirs = pytest.importorskip("trak.projectors", reason="pip install --no-deps traker==0.3.2")
    options = {"grad_dim": 300, "proj_dim": 40, "seed": 3, "device": "cpu", "block_size": block_size, "dtype": dtype}
    x = torch.randn(5, 300).half()
    a, b = (made(**options, proj_type=proj_type) for made in (BasicProjector, theirs.BasicProjector))
    for model_id in (0, 2, 0):
        assert torch.equal(a.project(x, model_id), b.project(x, model_id))


@pytest.mark.parametrize("proj_type", [ProjectionType.rademacher, "sjlt"])
def test_projector_is_the_kernel_with_a_seed_for_each_model(proj_type):
    x = torch.randn(4, 90)
    projector = CudaProjector(90, 24, 5, proj_type, "cpu", 16)
    kind = str(ProjectionType(proj_type).value)
    assert torch.equal(projector.project(x, 0), random_projection(x, 24, kind=kind, seed=5))
    assert torch.equal(projector.project(x, 3), random_projection(x, 24, kind=kind, seed=5 + (3 << 32)))
    assert projector.project(x.half(), 0).dtype == torch.float32
    assert Projector(90, 24, 5, proj_type, "cpu", dtype=torch.bfloat16).project(x, 0).dtype == torch.bfloat16
    projector.free_memory()
    assert torch.equal(projector.project(x, 0), random_projection(x, 24, kind=kind, seed=5))


@pytest.mark.parametrize("made", [Projector, BasicProjector])
def test_law_a_mapping_is_its_tensors_one_after_the_other(made):
    grads = {"a": torch.randn(4, 3, 5), "b": torch.randn(4, 7), "c": torch.randn(4, 2, 2, 2)}
    projector = made(grad_dim=30, proj_dim=16, seed=1, proj_type="rademacher", device="cpu", max_batch_size=8)
    joined = torch.cat([x.flatten(1) for x in grads.values()], dim=1)
    torch.testing.assert_close(projector.project(grads, 1), projector.project(joined, 1), rtol=0, atol=1e-5)


def test_fast_jl_is_the_emulated_kernel():
    grads = {"a": torch.randn(2, 4, 5), "b": torch.randn(2, 9)}
    projector = FastJlProjector(29, 512, 3, "rademacher", "cpu", 16, num_sms=108)
    joined = torch.cat([x.flatten(1) for x in grads.values()], dim=1)
    assert torch.equal(projector.project(grads, 1), fast_jl_projection(joined, 512, num_sms=108, seed=3, model_id=1))
    projector.free_memory()
    with pytest.raises(ValueError, match="only proj_type='rademacher' is emulated, got 'normal'"):
        FastJlProjector(29, 512, 3, "normal", "cpu", num_sms=108)


def test_refuses_what_it_has_not():
    with pytest.raises(ValueError, match="proj_type='normal' has no hashed matrix"):
        Projector(9, 4, 0, "normal", "cpu")
    with pytest.raises(ValueError, match="Projector has sjlt"):
        BasicProjector(9, 4, 0, "sjlt", "cpu")
    with pytest.raises(ValueError, match=r"must hold 9 coordinates for each example, got \[2, 8\]: 8"):
        Projector(9, 4, 0, "sjlt", "cpu").project(torch.ones(2, 8), 0)
    with pytest.raises(ValueError, match="must hold 9 coordinates"):
        Projector(9, 4, 0, "sjlt", "cpu").project({"a": torch.ones(2, 4), "b": torch.ones(3, 5)}, 0)
