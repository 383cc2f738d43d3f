"""Gated MLPs in one pass pass back what the model's own do, keep less, and others are left alone."""

import pytest
import torch

from fastsel.models.gated_mlp import find_gated_mlps, gates_fused

transformers = pytest.importorskip("transformers")

SMALL = dict(vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
             max_position_embeddings=32)  # fmt: skip


def model_of(family, **more):
    config = getattr(transformers, f"{family}Config")(**SMALL | more)
    torch.manual_seed(0)
    return getattr(transformers, f"{family}Model")(config).eval().requires_grad_(False)


def passed_back(mlp, x):
    """(output, gradient of x, bytes kept for the backward)."""
    kept = {}

    def count(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = x.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        out = mlp(x)
    (gradient,) = torch.autograd.grad(out.square().sum(), x)
    weights = {p.untyped_storage().data_ptr() for p in mlp.parameters()}
    return out.detach(), gradient, sum(size for at, size in kept.items() if at not in weights)


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Mistral"])
def test_no_further_from_float64_and_a_tensor_less(family):
    model = model_of(family)
    mlps = find_gated_mlps(model)
    assert mlps == [layer.mlp for layer in model.layers]
    x = torch.randn(1, 7, 24)
    own = passed_back(mlps[0], x)
    with gates_fused(mlps):
        ours = passed_back(mlps[0], x)
    assert own[2] - ours[2] == 7 * 40 * 4
    assert all("forward" not in vars(mlp) for mlp in mlps)
    truth = passed_back(model.double().layers[0].mlp, x.double())
    for found, plain, exact in zip(ours[:2], own[:2], truth[:2], strict=True):
        error = float((found - exact).abs().max())
        assert error <= 2 * float((plain - exact).abs().max()) + 1e-7 * float(exact.abs().max())


def test_other_activations_formulas_and_types_are_left_alone():
    assert find_gated_mlps(model_of("Gemma")) == []  # gelu
    assert find_gated_mlps(model_of("Llama", hidden_act="relu")) == []
    assert find_gated_mlps(model_of("Llama").double()) == []
    assert find_gated_mlps(model_of("Llama").to(torch.bfloat16)) == []
    model = model_of("Llama")
    first = model.layers[0].mlp
    own = type(first).forward
    doubled = type("Doubled", (type(first),), {"forward": lambda self, x: 2 * own(self, x)})
    first.__class__ = doubled
    assert find_gated_mlps(model) == [model.layers[1].mlp]
    vars(model.layers[1].mlp)["forward"] = lambda x: x
    assert find_gated_mlps(model) == []


def test_an_interrupted_run_leaves_the_modules_as_they_were():
    model = model_of("Llama")
    with pytest.raises(KeyError), gates_fused(find_gated_mlps(model)):
        raise KeyError
    assert all("forward" not in vars(layer.mlp) for layer in model.layers)
