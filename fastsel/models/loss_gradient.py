"""Cross-entropy of labelled tokens and its gradient with respect to the hidden states, in one sweep over the head."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from fastsel.models.frozen_linear import ROWS_MULTIPLE, frozen_linear

if TYPE_CHECKING:
    from fastsel.models.packed import HeadParameters

# Of logits at a time: above 32 MB, glibc takes new pages from the system for each tile.
TILE_BYTES = 24 << 20
TILE_ROWS = 128  # at least: fewer would read the head more often than their products take


def loss_and_gradient(
    hidden: torch.Tensor, head: "HeadParameters", targets: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-token loss, and the gradient of its weighted sum.

        nll[t] = log sum_j e^z[t, j] - z[t, targets[t]],   gradient[t] = weights[t] * d nll[t] / d hidden[t]

    z are the logits of HeadParameters. The gradient is formed from e^z / sum e^z, never from a rounded logarithm, whose
    error all words of a token would share (torch's own: 4e-5 of a LoRA gradient in float32; this: 5e-6). The target's
    own is minus the others' share, not its probability minus 1, which is rounded away where the model is sure of it.

    Args:
        hidden: [t, d].
        head: of the model.
        targets: [t] int64.
        weights: [t] float64.

    Returns:
        (nll float64 [t] on the CPU, gradient [t, d] in the type of hidden). Not finite where a token's logits are not.

    Cost: two matrix products, 4 t v d flops; at most TILE_BYTES or TILE_ROWS of logits, never [t, v].
    """
    weight, bias, softcap, scale = head
    working = torch.promote_types(weight.dtype, torch.float32)
    count = len(hidden)
    # Rows of zeros lead MKL away from what it does with the last one to three of fewer than 12 rows, with two threads
    # on AVX-512: their whole depth in one chain, errors of 1e-4 in place of 5e-7 at 49,152 words.
    fillers = -count % ROWS_MULTIPLE
    hidden, targets, weights = (
        F.pad(hidden, (0, 0, 0, fillers)),
        F.pad(targets, (0, fillers)),
        F.pad(weights, (0, fillers)),
    )
    gradient = torch.empty_like(hidden)
    nll = torch.empty(len(hidden), dtype=torch.float64)
    rows = max(TILE_ROWS, TILE_BYTES // (weight.shape[0] * working.itemsize) // ROWS_MULTIPLE * ROWS_MULTIPLE)
    for start in range(0, len(hidden), rows):
        tile = slice(start, start + rows)
        target = targets[tile, None]
        z = frozen_linear(hidden[tile].to(weight.dtype), weight, bias).to(working)
        if scale != 1.0:
            z *= scale
        slope = None
        if softcap is not None:
            z = torch.tanh(z / softcap)
            slope = 1 - z.square()
            z *= softcap
        largest = z.amax(1, keepdim=True)
        z.sub_(largest)
        at_target = z.gather(1, target)
        z.exp_().scatter_(1, target, 0.0)
        others = z.sum(1, keepdim=True)
        total = others + at_target.exp()
        log_total = torch.where(at_target == 0, others.log1p(), total.log())
        nll[tile] = (log_total - at_target)[:, 0].double().cpu()
        factor = weights[tile, None].to(working) / total
        z.mul_(factor)
        z.scatter_(1, target, -factor * others)
        if slope is not None:
            z *= slope
        if scale != 1.0:
            z *= scale
        gradient[tile] = frozen_linear(z.to(weight.dtype), weight.T).to(hidden.dtype)
    return nll[:count], gradient[:count]
