"""LESS's features to the letter: dtypes, order of operations and projection of its released code on a CPU.

What collect_grads of princeton-nlp/LESS@8abf962 writes with TRAK 0.3.2's BasicProjector (its way without fast_jl): each
row's gradient by autograd through the model's own layers, in the model's type; Adam's step in float32; float16; the
model's type again; times blocks of 128 columns of +1 and -1, sixteen rows at a time. For comparing with that code:
LESS itself (methods/less.py) multiplies whole gradients, which is what these projections estimate.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from fastsel.features.answer_tokens import NOT_FINITE
from fastsel.features.batches import Shard
from fastsel.features.gradient_rows import AdamMoments, GradientWorker
from fastsel.features.training_rows import TrainingRow
from fastsel.kernels.random_projection import trak_basic_blocks
from fastsel.models.lora_forward import LoraForward

SEED, MODEL_ID, BLOCK_SIZE, INTERVAL = 0, 0, 128, 16
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8
HELD_BYTES = 256 << 20  # of whole gradients, which share one drawing of the matrix


def official_features(gradients: torch.Tensor, k: int = 8192, *, moments: AdamMoments | None = None) -> torch.Tensor:
    """[n, k] as collect_grads stores them unnormalised.

        gamma = m' / sqrt(v' + eps) with m' = .9 m + .1 g, v' = .999 v + .001 g^2, or g without moments
        feature = (float16(gamma) in g's type) R,  R of +1 and -1

    Args:
        gradients: [n, p] in the type of the model (bfloat16, or float32 where the user asked for it), of one row each.
        k: the projection's size.
        moments: float32 Adam state for training features; None for target features, which are plain gradients.

    Returns:
        [n, k] in the type of gradients. All bits are the code's where torch's generator and products are the same.

    Cost: 2 n p k flops, and p k random numbers, which the code draws for every sixteen rows and this once a call.
    """
    n, p = gradients.shape
    groups = [slice(start, min(start + INTERVAL, n)) for start in range(0, n, INTERVAL)]
    halves = [torch.stack([_stepped(g, moments) for g in gradients[group]]).to(torch.float16) for group in groups]
    features = gradients.new_empty(n, k)
    blocks = trak_basic_blocks(
        p, k, seed=SEED, model_id=MODEL_ID, block_size=BLOCK_SIZE, dtype=gradients.dtype, device=gradients.device
    )
    for first, matrix in blocks:
        for group, half in zip(groups, halves, strict=True):
            features[group, first : first + matrix.shape[1]] = half.to(gradients.dtype) @ matrix
    return features


def _stepped(g: torch.Tensor, moments: AdamMoments | None) -> torch.Tensor:
    """In the code's order of operations, which decides the last bits."""
    if moments is None:
        return g
    first = BETA1 * moments.exp_avg + (1 - BETA1) * g
    second = BETA2 * moments.exp_avg_sq + (1 - BETA2) * g**2
    return first / torch.sqrt(second + EPS)


def official_gradient(forward: LoraForward, row: TrainingRow) -> tuple[float, torch.Tensor]:
    """A row's loss and whole gradient [p], by autograd through the model's own layers, as model(**batch).loss gives it.

    Sequences of one row count by their labelled tokens; LESS's rows are one sequence each.
    """
    model, layers = forward.loaded.model, forward.lora.layers
    matrices = list({id(matrix): matrix for layer in layers for matrix in layer.parameters}.values())
    count = sum(len(labelled) for _, labelled in row.sequences)
    try:
        for matrix in matrices:
            matrix.requires_grad_(True)
        with torch.enable_grad():
            losses = []
            for ids, labelled in row.sequences:
                token_ids = torch.tensor([ids], device=forward.loaded.device)
                labels = torch.full_like(token_ids, -100)
                labels[0, labelled] = token_ids[0, labelled]
                loss = model(
                    input_ids=token_ids, attention_mask=torch.ones_like(token_ids), labels=labels, use_cache=False
                ).loss
                losses.append(loss if len(labelled) == count else loss * (len(labelled) / count))
            total = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
            pieces = torch.autograd.grad(total, matrices)
    finally:
        for matrix in matrices:
            matrix.requires_grad_(False)
    return float(total.detach()), torch.cat([piece.reshape(-1) for piece in pieces])


def official_rows(
    forward: LoraForward, rows: Sequence[TrainingRow], k: int, *, moments: AdamMoments | None = None
) -> Iterator[tuple[TrainingRow, float, float, torch.Tensor]]:
    """(row, loss, squared norm of its step, feature [k]) of each row, in order."""
    size = forward.n_parameters * forward.modules[0].lora_a.element_size()
    held = max(1, HELD_BYTES // (size * INTERVAL)) * INTERVAL
    for start in range(0, len(rows), held):
        part = rows[start : start + held]
        losses, gradients = zip(*(official_gradient(forward, row) for row in part), strict=True)
        features = official_features(torch.stack(gradients), k, moments=moments)
        for row, loss, g, feature in zip(part, losses, gradients, features, strict=True):
            yield row, loss, float(_stepped(g, moments).square().sum(dtype=torch.float64)), feature


class OfficialWorker(GradientWorker):
    """shard -> its records, with LESS's own features; the groups of sixteen rows begin anew at each shard."""

    def __call__(self, shard: Shard) -> NDArray[np.void]:
        forward, rule = self.model(), self.rule
        assert rule.trak is not None
        rows, records = self.read(shard)
        moments = rule.moments if rule.step == "adam" else None
        for row, loss, sqnorm, feature in official_rows(forward, rows, rule.trak, moments=moments):
            place = row.row_id - shard.start
            if np.isfinite([loss, sqnorm]).all() and bool(torch.isfinite(feature).all()):
                records["loss"][place], records["sqnorm"][place] = loss, sqnorm
                records["trak"][place] = feature.float().cpu().numpy()
            else:
                records["why"][place] = NOT_FINITE
            if self.on_tokens is not None:
                self.on_tokens(row.size)
        return records
