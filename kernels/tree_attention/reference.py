"""As the formula reads: one query row at a time over the rows of its path."""

import torch

from fastsel.kernels.tree_attention.segments import Segments


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
    group = query.shape[1] // key.shape[1]
    out = query.new_empty(*query.shape[:2], value.shape[2])
    starts = segments.start_list
    for s in range(len(segments)):
        path = torch.cat([torch.arange(starts[a], starts[a + 1], device=query.device) for a in segments.path(s)])
        for row in range(starts[s], starts[s + 1]):
            position = int(segments.positions[row])
            seen = path[max(0, position + 1 - (window or position + 1)) : position + 1]
            logits = scale * torch.einsum("hd,jhd->hj", query[row], key[seen].repeat_interleave(group, 1))
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            out[row] = torch.einsum("hj,jhd->hd", logits.softmax(-1), value[seen].repeat_interleave(group, 1))
    return out
