"""Attention over sequences that lie one after another in a packed row, with a backward.

Sequences share nothing here: what one example's tokens pass back must not mix with another's. On a CPU both directions
are kernels.tree_attention's; elsewhere, and in 16 bits, they are torch's own, one call a sequence.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F

from fastsel.kernels.tree_attention import Segments, tree_attention, tree_attention_gradient
from fastsel.models.packed import refuse_unusual

ATTENTION_NAME = "fastsel_segments"

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
        out: torch.Tensor = _PackedAttention.apply(query, key, value, *how)  # type: ignore[no-untyped-call]
        return out, None
    grouped = query.shape[1] // key.shape[1]
    if grouped > 1:
        key, value = key.repeat_interleave(grouped, 1), value.repeat_interleave(grouped, 1)
    # Split, not sliced: the backward of n slices writes n zero tensors of full size.
    lengths = _segments.starts.diff().tolist()
    pieces = zip(*(torch.split(tensor, lengths, 2) for tensor in (query, key, value)), strict=True)
    attended = [_attend(q, k, v, scale, sliding_window, softcap) for q, k, v in pieces]
    return torch.cat(attended, 2).transpose(1, 2).contiguous(), None


class _PackedAttention(torch.autograd.Function):
    """tree_attention and its gradient, which keep the inputs only; on a CPU."""

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
        ctx.save_for_backward(query, key, value)
        ctx.how = segments, window, softcap, scale
        q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        return tree_attention(q, k, v, segments, window, softcap, scale)[None]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v = (tensor[0].transpose(0, 1) for tensor in ctx.saved_tensors)
        found = tree_attention_gradient(q, k, v, gradients[0][0], *ctx.how)
        return (*(gradient.transpose(0, 1)[None] for gradient in found), None, None, None, None)


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
