"""lora_gradient_sketch as its formula reads: every example's whole gradient at once."""

from itertools import pairwise

import torch

from fastsel.kernels._runtime.rng import rademacher_signs, sjlt_map
from fastsel.kernels.lora_gradient_sketch.options import AdamStep, GradientSketch, SketchSpec


def unsupported(*inputs: object) -> str | None:
    """It takes everything."""
    return None


def compute(
    x: torch.Tensor, delta: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, offsets: torch.Tensor,
    scale: float, adam: AdamStep | None, sign: bool, targets: torch.Tensor | None, sketch: SketchSpec | None,
    out: torch.Tensor | None,
) -> GradientSketch:  # fmt: skip
    """See api.lora_gradient_sketch."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    x, delta, a, b = (tensor.to(dtype) for tensor in (x, delta, lora_a, lora_b))
    gammas = x.new_zeros(len(offsets) - 1, a.numel() + b.numel())
    for i, (first, stop) in enumerate(pairwise(offsets.tolist())):
        x_i, delta_i = x[first:stop], delta[first:stop]
        grad_a, grad_b = scale * (delta_i @ b).T @ x_i, scale * delta_i.T @ (x_i @ a.T)
        gammas[i] = torch.cat([grad_a.flatten(), grad_b.flatten()])
    if sign:
        gammas = gammas / gammas.abs().masked_fill(gammas == 0, torch.inf)
    elif adam is not None:
        f_m, f_g, f_v, f_gg = adam.factors()
        momentum = 0 if adam.exp_avg is None else f_m * adam.exp_avg.to(dtype)
        second = f_v * adam.exp_avg_sq.to(dtype) + f_gg * gammas.square()
        root = (second + adam.eps).sqrt() if adam.eps_inside else second.sqrt() + adam.eps
        gammas = (momentum + f_g * gammas) / root.masked_fill(root == 0, torch.inf)
    dots = None if targets is None else (gammas @ targets.to(dtype).T).double()
    if sketch is None:
        return GradientSketch(dots, gammas.square().sum(1).double(), None)
    projected = gammas.new_zeros(len(gammas), sketch.k) if out is None else out
    coordinates = sketch.first + torch.arange(gammas.shape[1], device=x.device)
    if sketch.kind == "rademacher":
        columns = torch.arange(sketch.k, device=x.device)
        projected += gammas @ rademacher_signs(sketch.seed, coordinates, columns).to(dtype)
    else:
        for rows, signs in zip(*sjlt_map(sketch.seed, coordinates, sketch.k, sketch.sparsity), strict=True):
            projected.index_add_(1, rows, gammas * signs.to(dtype) / sketch.sparsity**0.5)
    return GradientSketch(dots, gammas.square().sum(1).double(), projected)
