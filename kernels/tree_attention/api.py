"""Attention over packed segments that form a forest."""

import torch

from fastsel.kernels._runtime.checks import check_tensor
from fastsel.kernels._runtime.dispatch import run
from fastsel.kernels.tree_attention.segments import Segments

IMPLEMENTATIONS = {
    "triton": "fastsel.kernels.tree_attention.gpu_triton",
    "native": "fastsel.kernels.tree_attention.cpu_native",
    "torch": "fastsel.kernels.tree_attention.torch_blocked",
    "reference": "fastsel.kernels.tree_attention.reference",
}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def tree_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    *,
    implementation: str = "auto",
) -> torch.Tensor:
    """Softmax attention in which each packed row sees its ancestors and, causally, its own segment.

        out[i] = sum_j softmax_j(cap(scale * <query[i], key[j]>)) value[j],
            j in the path of i's segment, position[j] <= position[i], position[j] > position[i] - window;
            cap(x) = softcap * tanh(x / softcap), or x without a softcap

    Query head g uses key head g // (h / hk): grouped queries as Hugging Face orders them.

    Args:
        query: [t, h, d] float32 | float64 | bfloat16 | float16; any stride; finite.
        key: [t, hk, d], same dtype and device; hk divides h.
        value: [t, hk, dv], same dtype and device.
        segments: the forest over the t rows.
        window: how many positions a query sees, itself included (>= 1); None sees all. It counts positions in the
            sequence, not packed rows.
        softcap: > 0 bounds the logits; None leaves them.
        scale: factor of the dot products; None is d ** -0.5.
        implementation: "auto", "triton", "native", "torch" or "reference".

    Returns:
        [t, h, dv] in the dtype of query; accumulated in float32 at least. The same inputs give the same bits; another
        packing of the same sequences may differ in the last bits, as sums are ordered by the packed layout. NaN in a
        segment reaches that segment and its descendants only.

    Raises:
        ValueError: shapes, dtypes, devices or ranges do not match the above.
        NotImplementedError: the implementation asked for cannot take these inputs; the message says why.

    Cost: 2 * h * (d + dv) flops for each pair (query, key it sees); reads are proportional to the same pairs by
        blocks; no [t, t] array is made. Extra memory: native: a packed copy of key and value; torch: the scores of one
        block, 512 * longest path * h, and the keys of its path; triton: the lists of blocks and ranges.
    Source: Vaswani et al., "Attention Is All You Need", 2017, eq. 1; softcap: Gemma Team, "Gemma 2", 2024, section 2;
        trees of shared prefixes: Cai et al., "Medusa", 2024, section 2.1.2.
    """
    check_tensor("query", query, ("t", "h", "d"), dtypes=DTYPES)
    tokens, heads, head_dim = query.shape
    check_tensor("key", key, (tokens, "hk", head_dim), dtypes=(query.dtype,), device=query.device)
    check_tensor("value", value, (tokens, key.shape[1], "dv"), dtypes=(query.dtype,), device=query.device)
    if segments.n_tokens != tokens:
        raise ValueError(f"segments cover {segments.n_tokens} rows, query has {tokens}")
    if key.shape[1] == 0 or heads % key.shape[1]:
        raise ValueError(f"query has {heads} heads, which is no multiple of the {key.shape[1]} heads of key")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 or None, got {window}")
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"softcap must be positive and finite, or None, got {softcap}")
    if head_dim == 0:
        raise ValueError("query and key must have at least one feature")
    scale = head_dim**-0.5 if scale is None else float(scale)
    if not abs(scale) < float("inf"):
        raise ValueError(f"scale must be finite, got {scale}")
    result: torch.Tensor = run(IMPLEMENTATIONS, implementation, query, key, value, segments, window, softcap, scale)
    return result
