"""LESS's features to the letter: dtypes, order of operations and projection of its released code on a CPU.

For comparing stores with that code's. LESS itself (methods/less.py) multiplies whole gradients, which is what these
projections estimate.
"""

import torch

from fastsel.features.gradient_rows import AdamMoments
from fastsel.kernels.random_projection import trak_basic_projection

SEED, MODEL_ID, BLOCK_SIZE, INTERVAL = 0, 0, 128, 16
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8


def official_features(gradients: torch.Tensor, k: int = 8192, *, moments: AdamMoments | None = None) -> torch.Tensor:
    """[n, k] as collect_grads of princeton-nlp/LESS@8abf962 with TRAK 0.3.2's BasicProjector stores them unnormalised.

        gamma = m' / sqrt(v' + eps) with m' = .9 m + .1 g, v' = .999 v + .001 g^2, or g without moments
        feature = (float16(gamma) in g's type) R,  R of +1 and -1, sixteen rows at a time

    Args:
        gradients: [n, p] in the type of the model (bfloat16, or float32 where the user asked for it), of one row each.
        k: the projection's size.
        moments: float32 Adam state for training features; None for target features, which are plain gradients.

    Returns:
        [n, k] in the type of gradients. All bits are the code's where torch's generator and products are the same.

    Cost: 2 n p k flops, and p k random numbers for every sixteen rows, as there: use it for small models.
    """
    projected = []
    for start in range(0, len(gradients), INTERVAL):
        rows = [_stepped(g, moments) for g in gradients[start : start + INTERVAL]]
        halves = torch.stack(rows).to(torch.float16)
        projected.append(
            trak_basic_projection(halves, k, seed=SEED, model_id=MODEL_ID, block_size=BLOCK_SIZE, dtype=gradients.dtype)
        )
    return torch.cat(projected) if projected else gradients.new_zeros(0, k)


def _stepped(g: torch.Tensor, moments: AdamMoments | None) -> torch.Tensor:
    """In the code's order of operations, which decides the last bits."""
    if moments is None:
        return g
    first = BETA1 * moments.exp_avg + (1 - BETA1) * g
    second = BETA2 * moments.exp_avg_sq + (1 - BETA2) * g**2
    return first / torch.sqrt(second + EPS)
