"""The contract of linear_token_stats and the table of its implementations."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from fastsel.kernels._runtime.checks import check_tensor
from fastsel.kernels._runtime.dispatch import run

IMPLEMENTATIONS = {  # tried in this order
    "triton": "fastsel.kernels.linear_token_stats.gpu_triton",
    "native": "fastsel.kernels.linear_token_stats.cpu_native",
    "torch": "fastsel.kernels.linear_token_stats.torch_blocked",
    "reference": "fastsel.kernels.linear_token_stats.reference",
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class LinearTokenStats(NamedTuple):
    """One value per row for each output asked for, None for the others."""

    nll: torch.Tensor | None = None
    lse: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    top1_logprob: torch.Tensor | None = None
    top2_logprob: torch.Tensor | None = None
    argmax: torch.Tensor | None = None


def linear_token_stats(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    outputs: Sequence[str] = ("nll",),
    *,
    implementation: str = "auto",
) -> LinearTokenStats:
    """Statistics of the next-token distribution of each hidden state, without storing logits.

        z[i, j] = scale * (sum_k hidden[i, k] weight[j, k] + bias[j]);   with softcap: z <- softcap tanh(z / softcap)
        lse[i] = log sum_j e^z[i, j]                    nll[i] = lse[i] - z[i, targets[i]], 0 where targets[i] < 0
        entropy[i] = -sum_j p log p, p = e^(z[i, j] - lse[i])
        top1_logprob, top2_logprob: log p of the likeliest and the second likeliest word;  argmax: the likeliest word

    Args:
        hidden: [t, d] float32 | bfloat16 | float16 | float64; after the final norm; any stride; t may be 0.
        weight: [v, d] same dtype and device; one row per word of the vocabulary; any stride; v, d >= 1.
        targets: [t] int64, below v; negative = no target.
        bias: [v] same dtype, or None.
        softcap: > 0, or None.
        scale: finite; multiplies before the softcap.
        outputs: names of the fields asked for; the others are None and mostly cost nothing.
        implementation: "auto", "triton", "native", "torch" or "reference".

    Returns:
        LinearTokenStats of [t] float32 (float64 for float64 inputs, argmax int64), natural logarithms. A logit of -inf
        is a word of probability 0: nll is +inf if it is the target, and top2_logprob is -inf if no other word is
        left (also when v = 1). A row with NaN or +inf among its logits, or nothing but -inf, is NaN in every
        output, its argmax is -1; only nll stays 0 where there is no target.

    Raises:
        ValueError: shapes, dtypes, devices, targets, softcap, scale or outputs do not match the above.
        NoImplementationError: the implementation asked for cannot take these inputs; the message says why.

    Ties: equal logits give top1_logprob == top2_logprob, argmax is the lowest index among the largest logits.
    Determinism: the same bits from run to run. native: each row's bits depend on that row and on weight, bias, softcap
        and scale only, not on the other rows, their number, the number of threads or the outputs asked for; AVX2 and
        plain code may differ from AVX-512 in the last bits. Others: a row may differ in the last bits by its batch.
    Cost: 2 t v d flops and about 20 t v for the exponentials; hidden and weight are read; accumulated in float32 at
        least. Extra memory, native: 4 t d bytes for packed hidden states, at most 8 MB of partial results (more only
        from v = 5 million on) and 400 d + 12,000 bytes a thread; torch: about 3 MB; never an array [t, v].
    Source: online softmax as in Milakov & Gimelshein, "Online normalizer calculation for softmax", 2018
        (arXiv 1805.02867); the idea of fusing it with the projection as in Wijmans et al., "Cut Your Losses in
        Large-Vocabulary Language Models", 2025 (arXiv 2411.09009). Entropy is log Z - S'/Z with S' accumulated
        relative to the running maximum, which avoids cancellation.
    """
    check_tensor("hidden", hidden, ("t", "d"), dtypes=DTYPES)
    t, d = hidden.shape
    check_tensor("weight", weight, ("v", d), dtypes=(hidden.dtype,), device=hidden.device)
    v = weight.shape[0]
    if v < 1 or d < 1:
        raise ValueError(f"weight must have at least one row and one column, got {list(weight.shape)}")
    check_tensor("targets", targets, (t,), dtypes=(torch.int64,), device=hidden.device)
    if t and int(targets.max()) >= v:
        raise ValueError(f"targets must be below the vocabulary size {v}, got {int(targets.max())}")
    if bias is not None:
        check_tensor("bias", bias, (v,), dtypes=(hidden.dtype,), device=hidden.device)
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"softcap must be positive and finite, or None, got {softcap}")
    if not abs(scale) < float("inf"):
        raise ValueError(f"scale must be finite, got {scale}")
    outputs = tuple(outputs)
    unknown = [name for name in outputs if name not in LinearTokenStats._fields]
    if unknown or not outputs:
        raise ValueError(f"outputs must be some of {', '.join(LinearTokenStats._fields)}; got {outputs!r}")
    with torch.no_grad():
        values = run(IMPLEMENTATIONS, implementation, hidden, weight, targets, bias, softcap, float(scale), outputs)
    return LinearTokenStats(**values)
