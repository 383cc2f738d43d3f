"""Linear layers on a CPU with weights laid out once for oneDNN's matrix product, instead of at every call.

On an AMD EPYC (Zen 4), 803 x 576 x 1,536 and its like: 1.15 to 1.18 times the rate of torch's own float32 product.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

# The copies live beside the model's own weights.
MOST_BYTES = 512 << 20
TYPICAL_ROWS = 1024  # the layout is chosen for this many; others are computed as well
# oneDNN compiles each number of rows anew and keeps up to 1,024 such products, 1.7 MB for each new batch of
# SmolLM2-135M: 48 batches of other lengths took 80 MB more. Multiples of this leave few lengths.
ROWS_MULTIPLE = 64


def can_prepack(weights: Sequence[torch.Tensor]) -> bool:
    """Whether oneDNN is here, all are float32 matrices on the CPU, and copies of them take at most MOST_BYTES."""
    operations = torch.ops.mkldnn
    known = all(hasattr(operations, name) for name in ("_reorder_linear_weight", "_linear_pointwise"))
    return (
        known
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and all((weight.dtype, weight.device.type) == (torch.float32, "cpu") for weight in weights)
        and sum(4 * weight.numel() for weight in weights) <= MOST_BYTES
    )


def prepacked_product(weight: torch.Tensor, bias: torch.Tensor | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """x [..., d_in] -> x weight^T + bias [..., d_out], from a copy of the weight as it is now. No gradients."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), TYPICAL_ROWS)
    bias = None if bias is None else bias.detach()

    def product(x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
        return out

    return product


class PrepackedLinears:
    """Faster forwards for the float32 nn.Linear layers of a model, used only inside active().

    The copies are of the weights as they are now. Layers of other types, dtypes and devices are left alone, and so is
    a model whose copies would take more than MOST_BYTES.
    """

    def __init__(self, body: nn.Module) -> None:
        self._body = body
        layers = [
            module
            for module in body.modules()
            if type(module) is nn.Linear
            and (module.weight.dtype, module.weight.device.type) == (torch.float32, "cpu")
            and "forward" not in vars(module)  # someone else's
        ]
        if not can_prepack([layer.weight for layer in layers]):
            layers = []
        with torch.inference_mode():
            self._forwards = [(layer, prepacked_product(layer.weight, layer.bias)) for layer in layers]

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process is sent the layers and packs them for itself."""
        return PrepackedLinears, (self._body,)

    def __len__(self) -> int:
        return len(self._forwards)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Inside, the layers multiply with the prepacked weights."""
        try:
            for layer, forward in self._forwards:
                vars(layer)["forward"] = forward
            yield
        finally:
            for layer, _ in self._forwards:
                vars(layer).pop("forward", None)
