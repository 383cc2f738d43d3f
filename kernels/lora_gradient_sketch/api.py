"""The contract of lora_gradient_sketch and the table of its implementations."""

import torch

from fastsel.kernels._runtime.checks import check_tensor
from fastsel.kernels._runtime.dispatch import run
from fastsel.kernels.lora_gradient_sketch.options import AdamStep, GradientSketch, SketchSpec

IMPLEMENTATIONS = {  # tried in this order
    "triton": "fastsel.kernels.lora_gradient_sketch.gpu_triton",
    "native": "fastsel.kernels.lora_gradient_sketch.cpu_native",
    "torch": "fastsel.kernels.lora_gradient_sketch.torch_blocked",
    "reference": "fastsel.kernels.lora_gradient_sketch.reference",
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def lora_gradient_sketch(
    x: torch.Tensor,
    delta: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    offsets: torch.Tensor,
    *,
    scale: float,
    adam: AdamStep | None = None,
    sign: bool = False,
    targets: torch.Tensor | None = None,
    sketch: SketchSpec | None = None,
    out: torch.Tensor | None = None,
    implementation: str = "auto",
) -> GradientSketch:
    """Per-example gradients of one LoRA module, each turned into an optimizer step and reduced: never [n, p] in memory.

        y = W x + scale B A x for each token;   delta = dL/dy, L the sum of the examples' losses
        dA[i] = scale (delta_i B)^T x_i  [r, d_in],   dB[i] = scale delta_i^T (x_i A^T)  [d_out, r]
            with x_i, delta_i the rows offsets[i]:offsets[i + 1], the tokens of example i
        g[i] = [dA[i], dB[i]], each row by row;   gamma[i] = adam's step of g[i], sign(g[i]), or g[i] itself
        dots[i, j] = gamma[i] . targets[j],   sqnorms[i] = |gamma[i]|^2,   sketch[i] = the projection of gamma[i]

    Args:
        x: [t, d_in] float32 | bfloat16 | float16 | float64, the module's input; t may be 0.
        delta: [t, d_out] same dtype and device, the gradient of its output.
        lora_a: [r, d_in], lora_b: [d_out, r]: x's dtype or float32 (of float64 x: float64); r >= 1.
        offsets: [n + 1] int64 on the CPU or x's device, not decreasing, from at least 0 to at most t. An example
            without tokens has gradient 0, which adam turns into its momentum.
        scale: LoRA's alpha / r (alpha / sqrt(r) with rsLoRA).
        adam: the step and the module's slice of its state, p_module = r d_in + d_out r numbers on x's device; None: g.
        sign: take sign(g), 0 where g is 0; not together with adam.
        targets: [s, p_module] float32 | bfloat16 | float16 (or float64), any row stride; None: no dots.
        sketch: the projection, None: no sketch.
        out: [n, sketch.k] float32 (float64 for float64 x): the sketch is added to it and returned.
        implementation: "auto", "triton", "native", "torch" or "reference".

    Returns:
        GradientSketch(dots [n, s] float64 | None, sqnorms [n] float64, sketch [n, k] float32 | None); the sketch of
        float64 inputs is float64.

    Raises:
        ValueError: shapes, dtypes, devices, offsets or options do not match the above.
        NoImplementationError: the implementation asked for cannot take these inputs; the message says why.

    Not finite: a NaN or infinity in an example's tokens spoils its own results and no other's; one in a target, in the
        state or in A and B spoils what it enters.
    Determinism: the same bits from run to run. native: an example's bits depend on its own tokens, the module, the
        state and the options only, not on the other examples, their order or the number of threads.
    Cost: with T tokens in all, 2 T p_module flops for the gradients, as many again for delta B and x A^T, 2 n s
        p_module for dots; for a step a root and a division a coordinate; for SJLT `sparsity` hashes a coordinate and
        as many additions an example. Reads x, delta, state and targets about once. Gradients live in tiles, in float32
        at least; dots and norms of tiles are added in float64. Extra memory: the two [t, r] products and a few
        megabytes of tiles.
    Source: LESS (Xia et al., ICML 2024, arXiv 2402.04333), equations 2 to 4 and the released code's step;
        tile by tile, so that the gradient of an example never exists, is this library's.
    """
    check_tensor("x", x, ("t", "d_in"), dtypes=DTYPES)
    t, d_in = x.shape
    check_tensor("delta", delta, (t, "d_out"), dtypes=(x.dtype,), device=x.device)
    d_out = delta.shape[1]
    weight_dtypes = (x.dtype, torch.float32) if x.dtype != torch.float64 else (x.dtype,)
    check_tensor("lora_a", lora_a, ("r", d_in), dtypes=weight_dtypes, device=x.device)
    r = lora_a.shape[0]
    check_tensor("lora_b", lora_b, (d_out, r), dtypes=(lora_a.dtype,), device=x.device)
    if r < 1:
        raise ValueError("lora_a must have at least one row")
    check_tensor("offsets", offsets, ("n + 1",), dtypes=(torch.int64,))
    if len(offsets) < 1:
        raise ValueError("offsets must have at least one entry, got none")
    offsets = offsets.cpu()
    if bool((offsets.diff() < 0).any()) or int(offsets[0]) < 0 or int(offsets[-1]) > t:
        raise ValueError(f"offsets must not decrease and lie between 0 and {t}, the number of tokens")
    n, p = len(offsets) - 1, r * (d_in + d_out)
    if adam is not None:
        _check_adam(adam, p, x.device)
        if sign:
            raise ValueError("adam and sign are two different steps: give one of them")
    if targets is not None:
        check_tensor("targets", targets, ("s", p), dtypes=DTYPES, device=x.device)
    if sketch is not None:
        _check_sketch(sketch)
        if out is not None:
            working = torch.float64 if x.dtype == torch.float64 else torch.float32
            check_tensor("out", out, (n, sketch.k), dtypes=(working,), device=x.device)
    elif out is not None:
        raise ValueError("out is what a sketch is added to: give sketch too")
    with torch.no_grad():
        result: GradientSketch = run(
            IMPLEMENTATIONS, implementation,
            x, delta, lora_a, lora_b, offsets, float(scale), adam, sign, targets, sketch, out,
        )  # fmt: skip
    return result


def _check_adam(adam: AdamStep, p: int, device: torch.device) -> None:
    dtypes = (torch.float32, torch.float64)
    check_tensor("adam.exp_avg_sq", adam.exp_avg_sq, (p,), dtypes=dtypes, device=device)
    if adam.exp_avg is not None:
        check_tensor("adam.exp_avg", adam.exp_avg, (p,), dtypes=(adam.exp_avg_sq.dtype,), device=device)
    elif adam.momentum:
        raise ValueError("adam.exp_avg is needed for a step with momentum, got None")
    if not (0 <= adam.beta1 <= 1 and 0 <= adam.beta2 <= 1 and 0 <= adam.eps < float("inf")):
        raise ValueError(
            f"adam needs betas of 0 to 1 and eps of at least 0, got {adam.beta1}, {adam.beta2} and {adam.eps}"
        )
    if not (0 < adam.correction1 < float("inf") and 0 < adam.correction2 < float("inf")):
        raise ValueError(f"adam's corrections must be above 0, got {adam.correction1} and {adam.correction2}")


def _check_sketch(sketch: SketchSpec) -> None:
    if sketch.kind not in ("sjlt", "rademacher"):
        raise ValueError(f"sketch.kind must be sjlt or rademacher, got {sketch.kind!r}")
    if not 1 <= sketch.k < 2**31:
        raise ValueError(f"sketch.k must lie between 1 and 2^31 - 1, got {sketch.k}")
    if sketch.first < 0:
        raise ValueError(f"sketch.first must be at least 0, got {sketch.first}")
    if not 1 <= sketch.sparsity <= sketch.k:
        raise ValueError(f"sketch.sparsity must lie between 1 and k = {sketch.k}, got {sketch.sparsity}")
