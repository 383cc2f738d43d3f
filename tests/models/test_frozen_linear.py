"""Products with frozen matrices: as exact as torch's own, both ways, and layers left as they were."""

import pytest
import torch
from torch import nn

from fastsel.models import frozen_linear as module
from fastsel.models.frozen_linear import ROWS_MULTIPLE, frozen_linear, frozen_linears, multiplied_by_onednn

NEEDS_ONEDNN = pytest.mark.skipif(not module._is_there(), reason="this torch has no oneDNN")


@pytest.fixture
def body():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 70), nn.GELU(), nn.Linear(70, 5, bias=False)).requires_grad_(False)


def calls_counted(monkeypatch):
    """How often torch's own product runs."""
    calls = []
    own = torch.nn.functional.linear
    monkeypatch.setattr(module.F, "linear", lambda *inputs: calls.append(1) or own(*inputs))
    return calls


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 31, 32, 96, 100])
def test_matches_float64(rows, turned):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, rows, 300)[:, :, ::2], torch.randn(70, 150), torch.randn(70)
    if turned:
        weight = weight.T.contiguous().T
    truth = x.double() @ weight.double().T + bias.double()
    assert frozen_linear(x, weight, bias).shape == truth.shape
    torch.testing.assert_close(frozen_linear(x, weight, bias).double(), truth, rtol=0, atol=3e-5)
    assert torch.equal(frozen_linear(x.double(), weight.double()), x.double() @ weight.double().T)


@NEEDS_ONEDNN
def test_only_whole_multiples_of_rows_and_float32_are_taken(monkeypatch):
    calls = calls_counted(monkeypatch)
    weight = torch.randn(5, 7)
    frozen_linear(torch.randn(ROWS_MULTIPLE, 7), weight)
    frozen_linear(torch.randn(2, ROWS_MULTIPLE // 2, 7), weight)
    assert not calls
    frozen_linear(torch.randn(ROWS_MULTIPLE + 1, 7), weight)
    frozen_linear(torch.randn(ROWS_MULTIPLE, 7).double(), weight.double())
    quantised = type("Quantised", (torch.Tensor,), {})
    frozen_linear(torch.randn(ROWS_MULTIPLE, 7), weight.as_subclass(quantised))
    assert len(calls) == 3


@NEEDS_ONEDNN
@pytest.mark.parametrize("rows", [ROWS_MULTIPLE, 33])
def test_layers_pass_the_gradient_of_their_input_on(body, rows):
    torch.manual_seed(1)
    x, d_out = torch.randn(rows, 48, requires_grad=True), torch.randn(rows, 5)
    (expected,) = torch.autograd.grad(body(x), x, d_out)
    with multiplied_by_onednn(frozen_linears(body)):
        out = body(x)
        assert "_FrozenLinear" in type(out.grad_fn).__name__
        (found,) = torch.autograd.grad(out, x, d_out)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_model_is_left_as_it_was(body):
    x = torch.randn(7, 48)
    before = body(x)
    with pytest.raises(ZeroDivisionError), multiplied_by_onednn(frozen_linears(body)):
        raise ZeroDivisionError
    assert not any("forward" in vars(layer) for layer in body)
    assert torch.equal(body(x), before)


@NEEDS_ONEDNN
def test_layers_that_others_changed_and_other_dtypes_are_left_alone(body):
    body[0].forward = lambda x: x[..., :1].expand(*x.shape[:-1], 70)
    body[2].to(torch.bfloat16)
    linears = frozen_linears(body)
    assert len(linears) == 0
    with multiplied_by_onednn(linears):
        assert body[0].forward(torch.ones(2, 48)).shape == (2, 70)
        assert "forward" not in vars(body[2])
    assert "forward" in vars(body[0])
