"""Attention over sequences that lie one after another in a packed row, with a backward.

kernels.tree_attention computes the same, forwards only. Sequences share nothing here: what one example's tokens pass
back must not mix with another's.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from fastsel.models.packed import refuse_unusual

ATTENTION_NAME = "fastsel_segments"

_lengths: list[int] | None = None
# A plain global under a lock, not a context variable: on a GPU the backward has a thread of its own.
_lock = threading.RLock()


@contextmanager
def packed_lengths(lengths: Sequence[int]) -> Iterator[None]:
    """Inside, forwards and backwards see these sequences; one thread at a time."""
    global _lengths
    with _lock:
        before, _lengths = _lengths, list(lengths)
        try:
            yield
        finally:
            _lengths = before


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
    if _lengths is None:
        raise RuntimeError(f"attention {ATTENTION_NAME!r} works only inside packed_lengths")
    refuse_unusual(module, query, key, sum(_lengths), is_causal, others)
    grouped = query.shape[1] // key.shape[1]
    if grouped > 1:
        key, value = key.repeat_interleave(grouped, 1), value.repeat_interleave(grouped, 1)
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    # Split, not sliced: the backward of n slices writes n zero tensors of full size.
    pieces = zip(*(torch.split(tensor, _lengths, 2) for tensor in (query, key, value)), strict=True)
    out = [_attend(q, k, v, scale, sliding_window, softcap) for q, k, v in pieces]
    return torch.cat(out, 2).transpose(1, 2).contiguous(), None


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
