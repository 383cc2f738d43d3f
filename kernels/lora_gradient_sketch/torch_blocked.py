"""lora_gradient_sketch in plain torch, a tile of gradients at a time: any device, bounded memory.

A and B have one shape: gradient[j, c] = sum_t left[t, j] right[t, c], with left, right = scale delta B, x for A and
delta, scale x A^T for B. A tile is some rows of it, which are consecutive coordinates, of a block of examples; each of
its entries is formed, stepped and reduced before the next tile is made.
"""

import torch

from fastsel.kernels._runtime.rng import rademacher_signs, sjlt_map
from fastsel.kernels.lora_gradient_sketch.options import AdamStep, GradientSketch, SketchSpec

VALUES = 2**22  # entries of a tile, all its examples together; a row of one example may be more


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
    bounds, n = offsets.tolist(), len(offsets) - 1
    device, double = x.device, torch.float64
    dots = None if targets is None else torch.zeros(n, len(targets), dtype=double, device=device)
    sqnorms = torch.zeros(n, dtype=double, device=device)
    projected = out
    if sketch is not None and out is None:
        projected = torch.zeros(n, sketch.k, dtype=dtype, device=device)
    left_a = (delta.to(dtype) @ lora_b.to(dtype)).mul_(scale)
    right_b = (x.to(dtype) @ lora_a.to(dtype).T).mul_(scale)
    for left, right, start in ((left_a, x, 0), (delta, right_b, lora_a.numel())):
        n_rows, n_columns = left.shape[1], right.shape[1]
        n_examples = max(1, min(n, VALUES // max(1, n_columns)))
        n_tile_rows = max(1, VALUES // max(1, n_examples * n_columns))
        for row in range(0, n_rows, n_tile_rows):
            rows = slice(row, min(row + n_tile_rows, n_rows))
            part = slice(start + rows.start * n_columns, start + rows.stop * n_columns)
            for first in range(0, n, n_examples):
                examples = slice(first, min(first + n_examples, n))
                tile = _gradients(left, right, bounds[examples.start : examples.stop + 1], rows, dtype)
                tile = _stepped(tile, adam, sign, part)
                sqnorms[examples] += tile.square().sum(1, dtype=double)
                if dots is not None and targets is not None:
                    dots[examples] += (tile @ targets[:, part].to(dtype).T).double()
                if projected is not None and sketch is not None:
                    _project(tile, sketch, part, projected[examples])
    return GradientSketch(dots, sqnorms, projected)


def _gradients(
    left: torch.Tensor, right: torch.Tensor, bounds: list[int], rows: slice, dtype: torch.dtype
) -> torch.Tensor:
    """[examples, entries of these rows]."""
    tile = torch.empty(len(bounds) - 1, rows.stop - rows.start, right.shape[1], dtype=dtype, device=right.device)
    for i in range(len(tile)):
        tokens = slice(bounds[i], bounds[i + 1])
        torch.mm(left[tokens, rows].T.to(dtype), right[tokens].to(dtype), out=tile[i])
    return tile.flatten(1)


def _stepped(g: torch.Tensor, adam: AdamStep | None, sign: bool, part: slice) -> torch.Tensor:
    if sign:
        root = g.abs()
    elif adam is None:
        return g
    else:
        f_m, f_g, f_v, f_gg = adam.factors()
        root = (adam.exp_avg_sq[part].to(g.dtype) * f_v).addcmul(g, g, value=f_gg)
        root = root.add_(adam.eps).sqrt_() if adam.eps_inside else root.sqrt_().add_(adam.eps)
        g = g.mul_(f_g)
        if adam.momentum and adam.exp_avg is not None:
            g = g.add_(adam.exp_avg[part].to(g.dtype), alpha=f_m)
    return g.div_(root.masked_fill_(root == 0, torch.inf))


def _project(tile: torch.Tensor, sketch: SketchSpec, part: slice, projected: torch.Tensor) -> None:
    """Adds the projection of the coordinates `part` to `projected` [examples, k]."""
    coordinates = torch.arange(sketch.first + part.start, sketch.first + part.stop, device=tile.device)
    if sketch.kind == "sjlt":
        rows, signs = sjlt_map(sketch.seed, coordinates, sketch.k, sketch.sparsity)
        for rows_of, signs_of in zip(rows, signs.to(tile.dtype) / sketch.sparsity**0.5, strict=True):
            projected.index_add_(1, rows_of, tile * signs_of)
        return
    step = max(1, VALUES // max(1, tile.shape[1]))
    for column in range(0, sketch.k, step):
        columns = torch.arange(column, min(column + step, sketch.k), device=tile.device)
        signs = rademacher_signs(sketch.seed, coordinates, columns).to(tile.dtype)
        projected[:, column : column + step] += tile @ signs
