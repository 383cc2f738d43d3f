"""The LoRA linears of a peft model, as what they are: two small matrices beside a frozen one.

Each is run as one autograd function that hands over its input x and the gradient delta of its output. No parameter
gets a gradient from autograd; those of A and B are sums over an example's tokens of products of the two.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from fastsel.errors import InputError
from fastsel.models.frozen_linear import frozen_linear

# Copies of W + scale B A may take this much; in larger models each is formed when it is needed.
MOST_MERGED_BYTES = 512 << 20
# Merging in 16 bits would round the adapter to what is left of W's last bits.
MERGED_DTYPES = (torch.float32, torch.float64)


@dataclass(frozen=True)
class LoraModule:
    """The two matrices of one LoRA linear (of several layers, where they share both).

    Attributes:
        number: position in the order of named_parameters().
        name: of the layer in the peft model.
        parameter_names: of A and of B, as in named_parameters().
        lora_a: [r, d_in].
        lora_b: [d_out, r].
        scale: alpha / r, or alpha / sqrt(r) with rslora; out = x W^T + scale (x A^T) B^T.
        first: coordinate number of A[0, 0] among the adapter's; A comes first, row by row, then B.
    """

    number: int
    name: str
    parameter_names: tuple[str, str]
    lora_a: torch.Tensor
    lora_b: torch.Tensor
    scale: float
    first: int

    @property
    def size(self) -> int:
        """Coordinates of both matrices."""
        return self.lora_a.numel() + self.lora_b.numel()


@dataclass(frozen=True)
class LoraLayer:
    """One layer of the model that runs with a LoraModule's matrices."""

    layer: Any
    adapter: str
    module: LoraModule
    weight: torch.Tensor  # [d_out, d_in], a view of the frozen one
    bias: torch.Tensor | None
    share: float  # of the module's scale: not 1 only where layers share matrices and scale them differently

    @property
    def parameters(self) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
        """A and B as the model holds them."""
        return self.layer.lora_A[self.adapter].weight, self.layer.lora_B[self.adapter].weight


def find_lora_layers(model: Any) -> list[LoraLayer]:
    """The LoRA layers of a model, in the order of named_parameters().

    Raises:
        InputError: it has none, or an adapter that is not plain LoRA on linear layers; the message names what.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: list[LoraLayer] = []
    modules: dict[int, LoraModule] = {}
    first = 0
    for name, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        adapter = _active_adapter(name, layer)
        if adapter is None:
            continue
        lora_a, lora_b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        scale = float(layer.scaling[adapter])
        module = modules.get(id(lora_a))
        if module is None:
            names = (f"{name}.lora_A.{adapter}.weight", f"{name}.lora_B.{adapter}.weight")
            module = LoraModule(len(modules), name, names, lora_a.detach(), lora_b.detach(), scale, first)
            modules[id(lora_a)] = module
            first += module.size
        elif module.lora_b.data_ptr() != lora_b.data_ptr():
            raise InputError(f"{name} shares only one of its LoRA matrices with {module.name}: share both or none")
        base = layer.get_base_layer()
        weight = base.weight.detach()
        turned = type(base) is not torch.nn.Linear  # Conv1D keeps [d_in, d_out]
        bias = None if base.bias is None else base.bias.detach()
        share = scale / module.scale if module.scale else 1.0
        layers.append(LoraLayer(layer, adapter, module, weight.T if turned else weight, bias, share))
    if not layers:
        raise InputError(
            "the model has no LoRA layer, and gradients are taken with respect to LoRA matrices: load a peft adapter, "
            "or let fastsel.warmup train one"
        )
    refuse_trained_beside(model)
    return layers


def refuse_trained_beside(model: Any) -> None:
    """Raises: InputError when the adapter's configuration trains more than LoRA matrices."""
    for config in (getattr(model, "peft_config", None) or {}).values():
        for option in ("modules_to_save", "trainable_token_indices", "target_parameters"):
            if getattr(config, option, None):
                raise InputError(
                    f"the adapter was trained with {option}={getattr(config, option)!r}: gradients are taken of LoRA "
                    "matrices on linear layers only, so that a part of the training would be left out"
                )
        if getattr(config, "bias", "none") not in ("none", None):
            raise InputError(f"the adapter was trained with bias={config.bias!r}; only bias='none' is supported")


def _active_adapter(name: str, layer: Any) -> str | None:
    """The one adapter that this layer runs with; None where it has none."""
    from peft.tuners.lora.layer import Linear
    from transformers.pytorch_utils import Conv1D

    if type(layer) is not Linear:
        held = {*getattr(layer, "lora_A", ()), *getattr(layer, "lora_embedding_A", ())}
        if type(layer).__module__.startswith("peft.tuners.lora") and not held & set(layer.active_adapters):
            return None
        raise InputError(
            f"{name} is a {type(layer).__module__}.{type(layer).__name__}: only LoRA on linear layers is supported"
        )
    active = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
    if layer.disable_adapters or not active:
        return None
    if len(active) > 1:
        raise InputError(f"{name} runs with {len(active)} adapters at once ({', '.join(active)}): activate one")
    adapter: str = active[0]
    if layer.merged:
        raise InputError(f"{name}: the adapter is merged into the weights; call unmerge_adapter() first")
    if adapter in layer.lora_variant:
        kind = type(layer.lora_variant[adapter]).__name__.removesuffix("LinearVariant")
        raise InputError(f"{name} is a {kind} layer: only plain LoRA is supported")
    if layer.lora_bias.get(adapter):
        raise InputError(f"{name} was trained with lora_bias=True; only LoRA without biases is supported")
    base = layer.get_base_layer()
    if type(base) not in (torch.nn.Linear, Conv1D):
        raise InputError(
            f"{name} is LoRA on a {type(base).__name__}: only plain linear layers are supported (load a quantised "
            "model in bfloat16 or float32)"
        )
    return adapter


# module, x [t, d_in], delta [t, d_out] -> None
HandOver = Callable[[LoraModule, torch.Tensor, torch.Tensor], None]


class LoraLayers:
    """Runs a model's LoRA layers, inside active(), so that each hands over x and delta in the backward.

    Attributes:
        layers: see find_lora_layers.
        modules: the LoraModules, in order; what layers share is here once.
        n_parameters: of all of them.
    """

    def __init__(self, model: Any) -> None:
        self.layers = find_lora_layers(model)
        self.modules = list({id(layer.module): layer.module for layer in self.layers}.values())
        self.n_parameters = sum(module.size for module in self.modules)
        total = sum(layer.weight.numel() * layer.weight.element_size() for layer in self.layers)
        dtypes = {layer.weight.dtype for layer in self.layers} | {layer.module.lora_a.dtype for layer in self.layers}
        self._can_merge = len(dtypes) == 1 and dtypes <= set(MERGED_DTYPES)
        keep = self._can_merge and total <= MOST_MERGED_BYTES
        self._merged = {id(layer.layer): merged_weight(layer) for layer in self.layers} if keep else {}
        # Makes outputs need a gradient although neither inputs nor parameters do.
        self._anchor = torch.zeros((), requires_grad=True)

    @contextmanager
    def active(self, hand_over: HandOver, on_forward: Callable[[LoraModule], None]) -> Iterator[None]:
        """Inside, on_forward is told of each layer that runs, and hand_over gets x and delta in the backward."""
        replaced = []
        try:
            for layer in self.layers:
                replaced.append((layer.layer, vars(layer.layer).get("forward")))
                vars(layer.layer)["forward"] = self._forward_of(layer, hand_over, on_forward)
            yield
        finally:
            for module, before in replaced:
                if before is None:
                    vars(module).pop("forward", None)
                else:
                    vars(module)["forward"] = before

    def _forward_of(
        self, layer: LoraLayer, hand_over: HandOver, on_forward: Callable[[LoraModule], None]
    ) -> Callable[..., torch.Tensor]:
        kept = self._merged.get(id(layer.layer))
        weight_of: Callable[[], torch.Tensor] | None = None
        if self._can_merge:
            weight_of = (lambda: merged_weight(layer)) if kept is None else (lambda: kept)

        def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            on_forward(layer.module)
            out: torch.Tensor = _LoraLinear.apply(x, self._anchor, layer, weight_of, hand_over)  # type: ignore[no-untyped-call]
            return out

        return forward


def merged_weight(layer: LoraLayer) -> torch.Tensor:
    """[d_out, d_in]: W + scale B A."""
    module = layer.module
    return torch.addmm(layer.weight, module.lora_b, module.lora_a, alpha=module.scale * layer.share)


class _LoraLinear(torch.autograd.Function):
    """x W'^T + bias, W' = W + scale B A; in 16 bits, or where A and B have another type than W, not merged."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        anchor: torch.Tensor,
        layer: LoraLayer,
        weight_of: Callable[[], torch.Tensor] | None,
        hand_over: HandOver,
    ) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.how = layer, weight_of, hand_over
        if weight_of is not None:
            return frozen_linear(x, weight_of(), layer.bias)
        module = layer.module
        low = F.linear(x.to(module.lora_a.dtype), module.lora_a)
        adapted = F.linear(low, module.lora_b) * (module.scale * layer.share)
        return (F.linear(x, layer.weight, layer.bias) + adapted).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None, None]:
        (x,) = ctx.saved_tensors
        layer, weight_of, hand_over = ctx.how
        module = layer.module
        delta = gradients[0]
        dx = None
        if ctx.needs_input_grad[0]:
            if weight_of is not None:
                dx = frozen_linear(delta, weight_of().T)
            else:
                low = (delta.to(module.lora_b.dtype) @ module.lora_b) * (module.scale * layer.share)
                dx = (delta @ layer.weight + low @ module.lora_a).to(x.dtype)
        own = module.lora_a.dtype
        x, delta = x.reshape(-1, x.shape[-1]).to(own), delta.reshape(-1, delta.shape[-1]).to(own)
        hand_over(module, x, delta if layer.share == 1.0 else delta * layer.share)
        return dx, None, None, None, None
