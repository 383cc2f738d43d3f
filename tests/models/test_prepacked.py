import pytest
import torch
from torch import nn

from fastsel.models import prepacked
from fastsel.models.prepacked import PrepackedLinears


@pytest.fixture
def body():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 70), nn.GELU(), nn.Linear(70, 5, bias=False)).requires_grad_(False)


@pytest.mark.parametrize("rows", [1, 33, 1024, 2000])
def test_products_are_those_of_torch(body, rows):
    x = torch.randn(1, rows, 48)
    truth, plain = body.double()(x.double()), body.float()(x)
    with torch.inference_mode(), PrepackedLinears(body).active():
        assert all("forward" in vars(body[i]) for i in (0, 2))
        got = body(x)
    assert (got - truth).abs().max() <= 2 * (plain - truth).abs().max() + 1e-6


def test_the_model_is_left_as_it_was(body):
    x = torch.randn(7, 48)
    before = body(x)
    linears = PrepackedLinears(body)
    with pytest.raises(ZeroDivisionError), linears.active():
        raise ZeroDivisionError
    assert not any("forward" in vars(layer) for layer in body)
    assert torch.equal(body(x), before)


def test_layers_that_others_changed_and_other_dtypes_are_left_alone(body):
    body[0].forward = lambda x: x[..., :1].expand(*x.shape[:-1], 70)
    body[2].to(torch.bfloat16)
    with PrepackedLinears(body).active():
        assert body[0].forward(torch.ones(2, 48)).shape == (2, 70)
        assert "forward" not in vars(body[2])
    assert "forward" in vars(body[0])


def test_weights_whose_copies_have_no_room_are_multiplied_as_they_lie(body, monkeypatch):
    x = torch.randn(1, 64, 48)
    with PrepackedLinears(body).active():
        expected = body(x)
    monkeypatch.setattr(prepacked, "MOST_BYTES", 4 * (48 * 70 + 70 * 5) - 1)
    with PrepackedLinears(body).active():
        forwards = [vars(body[i])["forward"] for i in (0, 2)]
        got = body(x)
    assert [forward.keywords["weight"].data_ptr() for forward in forwards] == [
        body[i].weight.data_ptr() for i in (0, 2)
    ]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
