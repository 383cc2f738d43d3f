"""Cross-entropy and its gradient against float64 autograd."""

import pytest
import torch

from fastsel.models.loss_gradient import loss_and_gradient
from fastsel.models.packed import HeadParameters


def problem(rows, v, d=64, seed=0, sureness=1.0):
    """Words share a direction, as embeddings do; the first rows are almost sure of their target."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(v, d, generator=generator) * 0.3 + 0.2
    targets = torch.randint(0, v, (rows,), generator=generator)
    hidden = torch.randn(rows, d, generator=generator)
    hidden[: rows // 2] += sureness * (weight[targets[: rows // 2]] - weight.mean(0))
    weights = torch.rand(rows, generator=generator, dtype=torch.float64)
    return hidden, weight, targets, weights


def truth_of(hidden, weight, targets, weights, softcap=None, scale=1.0):
    exact = hidden.double().requires_grad_()
    z = exact @ weight.double().T * scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    nll = torch.nn.functional.cross_entropy(z, targets, reduction="none")
    (gradient,) = torch.autograd.grad((nll * weights).sum(), exact)
    return nll.detach(), gradient


def worst(ours, truth):
    return float(((ours.double() - truth).norm(dim=1) / truth.norm(dim=1)).max())


@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (3.0, 0.5), (None, 0.3)])
def test_matches_autograd_in_float64(softcap, scale):
    hidden, weight, targets, weights = problem(9, 500)
    head = HeadParameters(weight.double(), None, softcap, scale)
    nll, gradient = loss_and_gradient(hidden.double(), head, targets, weights)
    expected, expected_gradient = truth_of(hidden, weight, targets, weights, softcap, scale)
    torch.testing.assert_close(nll, expected, rtol=1e-13, atol=1e-13)
    assert worst(gradient, expected_gradient) < 1e-12


@pytest.mark.parametrize("rows", [1, 3, 7, 11, 40])
@pytest.mark.parametrize("threads", [1, 2])
def test_few_rows_and_many_words_add_up_as_exactly_as_many_rows(rows, threads):
    """One chain of 49,152 terms would err by 1e-4."""
    hidden, weight, targets, weights = problem(rows, 49_152)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        _, gradient = loss_and_gradient(hidden, HeadParameters(weight, None, None, 1.0), targets, weights)
    finally:
        torch.set_num_threads(before)
    assert worst(gradient, truth_of(hidden, weight, targets, weights)[1]) < 1e-5


def test_a_sure_model_keeps_its_small_gradient():
    """1 - p of 1e-6 and less has no bits left where p is rounded first."""
    hidden, weight, targets, weights = problem(8, 300, sureness=4.0)
    nll, gradient = loss_and_gradient(hidden, HeadParameters(weight, None, None, 1.0), targets, weights)
    expected, expected_gradient = truth_of(hidden, weight, targets, weights)
    assert 1e-12 < float(expected.min()) < 1e-5
    torch.testing.assert_close(nll, expected, rtol=1e-4, atol=0)
    assert worst(gradient, expected_gradient) < 1e-4


def test_rows_that_are_not_finite_are_nan_alone():
    hidden, weight, targets, weights = problem(4, 300)
    hidden[1] = torch.inf
    nll, gradient = loss_and_gradient(hidden, HeadParameters(weight, None, None, 1.0), targets, weights)
    assert not torch.isfinite(nll[1]) and not torch.isfinite(gradient[1]).any()
    assert torch.isfinite(nll[[0, 2, 3]]).all() and torch.isfinite(gradient[[0, 2, 3]]).all()
