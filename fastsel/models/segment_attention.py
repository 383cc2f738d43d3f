"""Attention over sequences that lie one after another in a packed row, with a backward.

kernels.tree_attention computes the same, forwards only. Sequences share nothing here: what one example's tokens pass
back must not mix with another's.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F

from fastsel.kernels.tree_attention import Segments, tree_attention
from fastsel.models.packed import refuse_unusual

ATTENTION_NAME = "fastsel_segments"
# Queries that a backward works on together: keys after them are not read, and their scores stay in the cache.
QUERY_BLOCK = 128

_segments: Segments | None = None
# A plain global under a lock, not a context variable: on a GPU the backward has a thread of its own.
_lock = threading.RLock()


@contextmanager
def packed_lengths(lengths: Sequence[int]) -> Iterator[None]:
    """Inside, forwards and backwards see these sequences; one thread at a time."""
    global _segments
    segments = Segments([0, *accumulate(lengths)], [-1] * len(lengths))
    with _lock:
        before, _segments = _segments, segments
        try:
            yield
        finally:
            _segments = before


def segment_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that transformers calls: query [1, h, t, d], key and value [1, hk, t, d] -> [1, t, h, dv].

    Raises:
        CannotPackError: the layer asks for more than causal order, a window, a softcap and a scale.
    """
    if _segments is None:
        raise RuntimeError(f"attention {ATTENTION_NAME!r} works only inside packed_lengths")
    refuse_unusual(module, query, key, _segments.n_tokens, is_causal, others)
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    if query.device.type == "cpu" and query.dtype in (torch.float32, torch.float64):
        how = _segments, scale, sliding_window, softcap
        out: torch.Tensor = _BlockedAttention.apply(query, key, value, *how)  # type: ignore[no-untyped-call]
        return out, None
    grouped = query.shape[1] // key.shape[1]
    if grouped > 1:
        key, value = key.repeat_interleave(grouped, 1), value.repeat_interleave(grouped, 1)
    # Split, not sliced: the backward of n slices writes n zero tensors of full size.
    lengths = _segments.starts.diff().tolist()
    pieces = zip(*(torch.split(tensor, lengths, 2) for tensor in (query, key, value)), strict=True)
    attended = [_attend(q, k, v, scale, sliding_window, softcap) for q, k, v in pieces]
    return torch.cat(attended, 2).transpose(1, 2).contiguous(), None


class _BlockedAttention(torch.autograd.Function):
    """tree_attention forwards; backwards, the scores of a block of queries again and matrix products; on a CPU.

    All queries of a key's head are rows of one matrix there, so that grouped keys need no copies.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        segments: Segments,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        out = tree_attention(q, k, v, segments, window, softcap, scale)
        ctx.save_for_backward(query, key, value, out)
        ctx.how = segments, scale, window, softcap
        return out[None]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, out = ctx.saved_tensors
        segments, scale, window, softcap = ctx.how
        d_query, d_key, d_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        d_out = gradients[0].transpose(1, 2)  # [1, h, t, dv]
        # What softmax's derivative takes off every score of a query: sum_j p_j (dp)_j = <out, d_out>.
        common = torch.linalg.vecdot(out.transpose(0, 1)[None], d_out)[..., None]
        heads = key.shape[1]
        for first, end in zip(segments.start_list, segments.start_list[1:], strict=False):
            for start in range(first, end, QUERY_BLOCK):
                stop = min(start + QUERY_BLOCK, end)
                oldest = first if window is None else max(first, start + 1 - window)
                # [heads of keys, queries of all their groups, .] and [heads of keys, keys, .]
                q, d_o, shared = (x[0, :, start:stop].reshape(heads, -1, x.shape[-1]) for x in (query, d_out, common))
                k, v = key[0, :, oldest:stop], value[0, :, oldest:stop]
                scores = torch.bmm(q, k.transpose(1, 2)).mul_(scale)
                slope = None
                if softcap is not None:
                    scores = scores.div_(softcap).tanh_()
                    slope = 1 - scores.square()
                    scores.mul_(softcap)
                by_query = scores.view(heads, -1, stop - start, stop - oldest)
                by_query.masked_fill_(_hidden(start - oldest, stop - start, window, query.device), float("-inf"))
                weights = torch.softmax(scores, -1)
                d_value[0, :, oldest:stop] += torch.bmm(weights.transpose(1, 2), d_o)
                d_scores = torch.bmm(d_o, v.transpose(1, 2)).sub_(shared).mul_(weights).mul_(scale)
                if slope is not None:
                    d_scores *= slope
                d_query[0, :, start:stop] = torch.bmm(d_scores, k).view(-1, stop - start, k.shape[-1])
                d_key[0, :, oldest:stop] += torch.bmm(d_scores.transpose(1, 2), q)
        return d_query, d_key, d_value, None, None, None, None


def _hidden(n_before: int, n_queries: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Bool [queries, n_before + queries]: the last keys are the queries' own; a query sees its own and older ones."""
    age = torch.arange(n_queries, device=device)[:, None] + n_before
    age = age - torch.arange(n_before + n_queries, device=device)
    return (age < 0) if window is None else (age < 0) | (age >= window)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None, softcap: float | None
) -> torch.Tensor:
    length = q.shape[2]
    if window is not None and window >= length:
        window = None
    if softcap is None:
        mask = None if window is None else _visible(length, window, q.device)
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale)
    scores = softcap * torch.tanh(q @ k.transpose(2, 3) * (scale / softcap))
    hidden = ~_visible(length, window or length, q.device)
    return torch.softmax(scores.masked_fill(hidden, float("-inf")).to(_at_least_float32(q)), -1).to(v.dtype) @ v


def _visible(length: int, window: int, device: torch.device) -> torch.Tensor:
    """Bool [length, length]: whether a query (row) sees a key."""
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return (distance >= 0) & (distance < window)


def _at_least_float32(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
