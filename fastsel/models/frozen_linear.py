"""Products with a model's frozen float32 matrices on a CPU, in both directions, by oneDNN; weights lie as they are.

On an AMD EPYC (Zen 4) MKL takes its AVX2 kernels. 906 x 576 x 1,536 and its like with nothing in cache: 94 to 97
GFLOP/s a thread by MKL, 99 to 105 by oneDNN, of 117 that the multiply-adds allow.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastsel.models.replaced_forwards import forwards_replaced

# oneDNN compiles each number of rows anew and keeps up to 1,024 such products, 5 MB for the four shapes of
# SmolLM2-135M in both directions. Other numbers than multiples of this are left to torch's own product.
ROWS_MULTIPLE = 32


@cache
def _is_there() -> bool:
    return hasattr(torch.ops.mkldnn, "_linear_pointwise") and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


def takes(weight: torch.Tensor) -> bool:
    """Whether frozen_linear multiplies with this matrix by oneDNN."""
    is_plain = type(weight) in (torch.Tensor, nn.Parameter)  # quantised weights are tensors of other types
    return is_plain and (weight.dtype, weight.device.type) == (torch.float32, "cpu") and _is_there()


def frozen_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + bias, outside autograd.

    Args:
        x: [..., k].
        weight: [n, k], also a transposed view.
        bias: [n] or None.

    Returns:
        [..., n]. By oneDNN where it takes the weight and x has a multiple of ROWS_MULTIPLE rows, else by torch's own.
    """
    with torch.no_grad():
        rows = x.numel() // x.shape[-1]
        if rows and rows % ROWS_MULTIPLE == 0 and takes(weight):
            product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")
            return product
        return F.linear(x, weight, bias)


class _FrozenLinear(torch.autograd.Function):
    """x W^T + bias, of which only x gets a gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.weight = weight
        return frozen_linear(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, delta: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        return frozen_linear(delta, ctx.weight.T) if ctx.needs_input_grad[0] else None, None, None


def frozen_linears(body: nn.Module) -> list[nn.Linear]:
    """The layers of a model whose weights frozen_linear takes, but for those whose forward somebody has replaced."""
    return [
        module
        for module in body.modules()
        if type(module) is nn.Linear and takes(module.weight) and "forward" not in vars(module)
    ]


@contextmanager
def multiplied_by_onednn(layers: Sequence[nn.Linear]) -> Iterator[None]:
    """Inside, these layers (see frozen_linears) run by frozen_linear, and their weights get no gradient."""
    with forwards_replaced((layer, forward_as_it_lies(layer)) for layer in layers):
        yield


def forward_as_it_lies(layer: nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
    """The layer's output by frozen_linear; its input gets a gradient."""
    bias = None if layer.bias is None else layer.bias.detach()
    return partial(_forward, weight=layer.weight.detach(), bias=bias)


def _forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    out: torch.Tensor = _FrozenLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return out
