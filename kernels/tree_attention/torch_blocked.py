"""Scaled dot-product attention, one call for each block of queries over exactly the keys that it may see.

Memory: a block of QUERY_BLOCK queries times its path, for all heads. A path's keys are gathered (copied) only where
the ancestors and the segment do not lie side by side.
"""

import torch
import torch.nn.functional as F

from fastsel.kernels.tree_attention.segments import Segments

QUERY_BLOCK = 512


def unsupported(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    window: int | None,
    softcap: float | None,
    scale: float,
) -> str | None:
    return None


def compute(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    window: int | None,
    softcap: float | None,
    scale: float,
) -> torch.Tensor:
    tokens, heads, _ = query.shape
    out = query.new_empty(tokens, heads, value.shape[2])
    for s in range(len(segments)):
        first, end = segments.start_list[s], segments.start_list[s + 1]
        for start in range(first, end, QUERY_BLOCK):
            stop = min(start + QUERY_BLOCK, end)
            position = segments.first_positions[s] + start - first
            oldest = 0 if window is None else max(0, position + 1 - window)
            ranges = [
                (begin + max(0, oldest - at), until)
                for begin, until, at in segments.ancestor_ranges[s]
                if until - begin + at > oldest
            ]
            own = first + max(0, oldest - segments.first_positions[s])
            if ranges and ranges[-1][1] == own:
                ranges[-1] = (ranges[-1][0], stop)
            else:
                ranges.append((own, stop))
            keys_hjd, values_hjd = (_gather(x, ranges).transpose(0, 1) for x in (key, value))
            queries_hqd = query[start:stop].transpose(0, 1)
            n_keys, n_queries = keys_hjd.shape[1], stop - start
            out[start:stop] = _attend(
                queries_hqd, keys_hjd, values_hjd, n_keys - n_queries, window, softcap, scale
            ).transpose(0, 1)
    return out


def _gather(rows: torch.Tensor, ranges: list[tuple[int, int]]) -> torch.Tensor:
    if len(ranges) == 1:
        return rows[ranges[0][0] : ranges[0][1]]
    return torch.cat([rows[begin:until] for begin, until in ranges])


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    n_before: int,
    window: int | None,
    softcap: float | None,
    scale: float,
) -> torch.Tensor:
    """The last of the keys stand for the queries themselves, after n_before older ones."""
    n_queries, n_keys = query.shape[1], key.shape[1]
    grouped = query.shape[0] != key.shape[0]
    windowed = window is not None and window < n_keys
    if n_before == 0 and not windowed and softcap is None:
        return F.scaled_dot_product_attention(
            query[None], key[None], value[None], is_causal=True, scale=scale, enable_gqa=grouped
        )[0]
    age = torch.arange(n_queries, device=query.device)[:, None] + n_before
    age = age - torch.arange(n_keys, device=query.device)[None, :]
    seen = (age >= 0) & (age < window) if windowed and window is not None else age >= 0
    if softcap is None:
        return F.scaled_dot_product_attention(
            query[None], key[None], value[None], attn_mask=seen, scale=scale, enable_gqa=grouped
        )[0]
    if grouped:
        key, value = (x.repeat_interleave(query.shape[0] // x.shape[0], 0) for x in (key, value))
    dtype = torch.promote_types(query.dtype, torch.float32)  # a bfloat16 logit of 30 is off by up to 0.06
    products = query.to(dtype) @ key.to(dtype).transpose(1, 2)
    logits = softcap * torch.tanh(products * (scale / softcap))
    weights = logits.masked_fill(~seen, float("-inf")).softmax(-1)
    return weights.to(value.dtype) @ value
