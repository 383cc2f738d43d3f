"""Linear layers on a CPU with weights laid out once for oneDNN's matrix product, instead of at every call.

On an AMD EPYC (Zen 4), 803 x 576 x 1,536 and its like: 1.15 to 1.18 times the rate of torch's own float32 product.
Where the copies would be too large, oneDNN reads the weights as they lie: a Llama with 516 MiB of them, 1.09 times.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from fastsel.models.frozen_linear import forward_as_it_lies, frozen_linears
from fastsel.models.replaced_forwards import forwards_replaced

# The copies live beside the model's own weights.
MOST_BYTES = 512 << 20
TYPICAL_ROWS = 1024  # the layout is chosen for this many; others are computed as well
# oneDNN compiles each number of rows anew and keeps up to 1,024 such products, 1.7 MB for each new batch of
# SmolLM2-135M: 48 batches of other lengths took 80 MB more. Multiples of this leave few lengths.
ROWS_MULTIPLE = 64


class PrepackedLinears:
    """Faster forwards for the float32 nn.Linear layers of a model, used only inside active().

    The copies are of the weights as they are now; a model whose copies would take more than MOST_BYTES goes without.
    Layers of other types, dtypes and devices are left alone.
    """

    def __init__(self, body: nn.Module) -> None:
        self._body = body
        layers = frozen_linears(body)
        total = sum(4 * layer.weight.numel() for layer in layers)
        can_copy = total <= MOST_BYTES and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        forward_of = _prepacked_forward if can_copy else forward_as_it_lies
        with torch.inference_mode():
            self._forwards = [(layer, forward_of(layer)) for layer in layers]

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process is sent the layers and packs them for itself."""
        return PrepackedLinears, (self._body,)

    def __len__(self) -> int:
        return len(self._forwards)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Inside, the layers multiply by oneDNN."""
        with forwards_replaced(self._forwards):
            yield


def _prepacked_forward(layer: nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
    weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), TYPICAL_ROWS)
    bias = None if layer.bias is None else layer.bias.detach()

    def forward(x: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return product

    return forward
