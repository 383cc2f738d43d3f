"""What attention passes back to queries, keys and values, for segments that share nothing."""

import torch

from fastsel.kernels._runtime.checks import check_tensor
from fastsel.kernels.tree_attention import cpu_native
from fastsel.kernels.tree_attention.segments import Segments

# Queries whose scores are formed together; keys after them are not read.
QUERY_BLOCK = 64
DTYPES = (torch.float32, torch.float64)

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def tree_attention_gradient(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    d_out: torch.Tensor,
    segments: Segments,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    *,
    implementation: str = "auto",
) -> Gradients:
    """The gradient of sum(tree_attention(query, key, value, ...) * d_out), scores formed again.

        p = softmax(s),  dv = p^T d_out,  ds = p (d_out v^T - <d_out, out>),  dq = scale ds k,  dk = scale ds^T q

    Args:
        query: [t, h, d] float32 | float64, on a CPU; any stride; finite.
        key: [t, hk, d], same dtype; hk divides h.
        value: [t, hk, dv].
        d_out: [t, h, dv].
        segments: over the t rows; none continues another.
        window, softcap, scale: as of tree_attention.
        implementation: "auto", "native" (float32 without a softcap) or "torch".

    Returns:
        ([t, h, d], [t, hk, d], [t, hk, dv]). The same bits whatever the threads and the other segments are; NaN in a
        segment reaches that segment only.

    Raises:
        ValueError: shapes, dtypes or devices do not match the above, or a segment continues another.
        NotImplementedError: the implementation asked for cannot take these inputs; the message says why.

    Cost: (6 d + 4 dv) h flops for each pair (query, key it sees). Extra memory, a thread: native: packed copies
        of one segment's keys and values, and 2 * 96 scores for each of its tokens; torch: the scores of one block.
    Source: Dao et al., "FlashAttention", 2022, appendix B.2.
    """
    cpu = torch.device("cpu")
    check_tensor("query", query, ("t", "h", "d"), dtypes=DTYPES, device=cpu)
    tokens, heads, head_dim = query.shape
    check_tensor("key", key, (tokens, "hk", head_dim), dtypes=(query.dtype,), device=cpu)
    check_tensor("value", value, (tokens, key.shape[1], "dv"), dtypes=(query.dtype,), device=cpu)
    check_tensor("d_out", d_out, (tokens, heads, value.shape[2]), dtypes=(query.dtype,), device=cpu)
    if segments.n_tokens != tokens:
        raise ValueError(f"segments cover {segments.n_tokens} rows, query has {tokens}")
    if any(parent >= 0 for parent in segments.parent_list):
        raise ValueError("a segment continues another; the gradient is of segments that share nothing")
    if key.shape[1] == 0 or heads % key.shape[1]:
        raise ValueError(f"query has {heads} heads, which is no multiple of the {key.shape[1]} heads of key")
    scale = head_dim**-0.5 if scale is None else float(scale)
    if implementation not in ("auto", "native", "torch"):
        raise ValueError(f"implementation={implementation!r} is not known here; it is one of: auto, native, torch")
    if implementation != "torch":
        reason = cpu_native.unsupported(query, key, value, segments, window, softcap, scale)
        reason = reason or (None if softcap is None else "takes no softcap")
        if reason is None:
            return cpu_native.gradient(query, key, value, d_out, segments, window, scale)
        if implementation == "native":
            raise NotImplementedError(f"native: {reason}")
    return _blocked(query, key, value, d_out, segments, window, softcap, scale)


def _blocked(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    d_out: torch.Tensor,
    segments: Segments,
    window: int | None,
    softcap: float | None,
    scale: float,
) -> Gradients:
    """Matrix products of blocks of queries; a key's queries of all heads are rows of one matrix."""
    heads, group = key.shape[1], query.shape[1] // key.shape[1]
    q, d_o = (_by_key_head(x, heads, group) for x in (query, d_out))
    q = q * scale
    k, v = key.transpose(0, 1).contiguous(), value.transpose(0, 1).contiguous()
    d_query, d_key, d_value = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for first, end in zip(segments.start_list, segments.start_list[1:], strict=False):
        for start in range(first, end, QUERY_BLOCK):
            stop = min(start + QUERY_BLOCK, end)
            oldest = first if window is None else max(first, start + 1 - window)
            queries, keys = slice(start * group, stop * group), slice(oldest, stop)
            scores = torch.bmm(q[:, queries], k[:, keys].transpose(1, 2))
            slope = None
            if softcap is not None:
                scores = scores.div_(softcap).tanh_()
                slope = 1 - scores.square()
                scores.mul_(softcap)
            age = torch.arange(start, stop)[:, None] - torch.arange(oldest, stop)
            hidden = (age < 0) if window is None else (age < 0) | (age >= window)
            scores.masked_fill_(hidden.repeat_interleave(group, 0), float("-inf"))
            weights = torch.softmax(scores, -1)
            d_value[:, keys].baddbmm_(weights.transpose(1, 2), d_o[:, queries])
            d_scores = torch.bmm(d_o[:, queries], v[:, keys].transpose(1, 2))
            d_scores.sub_((d_scores * weights).sum(-1, keepdim=True)).mul_(weights)
            if slope is not None:
                d_scores *= slope
            torch.bmm(d_scores, k[:, keys], out=d_query[:, queries])
            d_key[:, keys].baddbmm_(d_scores.transpose(1, 2), q[:, queries])
    d_query = d_query.mul_(scale).reshape(heads, len(query), group, query.shape[2]).transpose(0, 1).reshape(query.shape)
    return d_query, d_key.transpose(0, 1), d_value.transpose(0, 1)


def _by_key_head(x: torch.Tensor, heads: int, group: int) -> torch.Tensor:
    """[t, heads * group, d] -> [heads, t * group, d]."""
    tokens, _, d = x.shape
    return x.reshape(tokens, heads, group, d).transpose(0, 1).reshape(heads, tokens * group, d)
