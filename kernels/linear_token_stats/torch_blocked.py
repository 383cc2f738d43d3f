"""linear_token_stats in plain torch, one tile of logits at a time: any device, bounded memory.

Each row carries (m, Z, S', z2, argmax, z_target) over the vocabulary: the running maximum, sum e^(z-m),
sum e^(z-m) (z-m), the second largest logit, the first index of the largest and the target's logit. Every tile is
read by the matrix product and then by three to eight elementwise passes while it is in cache (256 x 1,024 float32 =
1 MB on a CPU; a larger tile spills, a smaller one is dominated by the cost of a call). 16-bit inputs are widened
tile by tile.
"""

import torch

TILE_ROWS = {"cpu": 256}
TILE_WORDS = {"cpu": 1024}
DEVICE_TILE_ROWS, DEVICE_TILE_WORDS = 4096, 8192  # other devices: large enough to keep them busy, 128 MB


def unsupported(*inputs: object) -> str | None:
    """It takes everything."""
    return None


def compute(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    scale: float,
    outputs: tuple[str, ...],
) -> dict[str, torch.Tensor]:
    """See api.linear_token_stats."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    values = {
        name: torch.empty(len(hidden), dtype=torch.int64 if name == "argmax" else dtype, device=hidden.device)
        for name in outputs
    }
    step = TILE_ROWS.get(hidden.device.type, DEVICE_TILE_ROWS)
    for start in range(0, len(hidden), step):
        rows = slice(start, start + step)
        block = _rows_stats(hidden[rows].to(dtype), weight, targets[rows], bias, softcap, scale, outputs)
        for name in outputs:
            values[name][rows] = block[name]
    return values


def _rows_stats(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    scale: float,
    outputs: tuple[str, ...],
) -> dict[str, torch.Tensor]:
    n_words, dtype = weight.shape[0], hidden.dtype
    step = TILE_WORDS.get(hidden.device.type, DEVICE_TILE_WORDS)
    # Finite, so that max - max is 0 and never NaN; no logit but -inf is below it.
    lowest = torch.finfo(dtype).min
    max_t = torch.full_like(hidden[:, 0], lowest)
    sum_t, weighted_t, target_t = torch.zeros_like(max_t), torch.zeros_like(max_t), torch.zeros_like(max_t)
    second_t, argmax_t = max_t.clone(), torch.zeros_like(targets)
    for start in range(0, n_words, step):
        logits = hidden @ weight[start : start + step].to(dtype).T
        if bias is not None:
            logits += bias[start : start + step].to(dtype)
        if scale != 1.0:
            logits *= scale
        if softcap is not None:
            logits.div_(softcap).tanh_().mul_(softcap)
        stop = start + logits.shape[1]
        here = (targets >= start) & (targets < stop)
        found_t = logits.gather(1, (targets - start).clamp(0, stop - start - 1)[:, None])[:, 0]
        target_t = torch.where(here, found_t, target_t)
        tile_max_t = logits.amax(1)
        if "argmax" in outputs or "top2_logprob" in outputs:
            words = torch.arange(start, stop, device=hidden.device)
            first_t = torch.where(logits == tile_max_t[:, None], words, n_words).amin(1)
            argmax_t = torch.where(tile_max_t > max_t, first_t, argmax_t)
            tile_second_t = torch.where(words == first_t[:, None], lowest, logits).amax(1)
            runner_up_t = torch.minimum(max_t, tile_max_t)
            second_t = torch.maximum(torch.maximum(second_t, tile_second_t), runner_up_t)
        new_max_t = torch.maximum(max_t, tile_max_t)
        # e^-10000 is 0 in every dtype; unlike -inf it may be multiplied by 0.
        shift_t = (max_t - new_max_t).clamp(min=-1e4)
        logits = logits.sub_(new_max_t[:, None]).clamp_(min=-1e4)
        if "entropy" in outputs:
            powers = logits.exp()
            weighted_t = shift_t.exp() * (weighted_t + sum_t * shift_t) + torch.linalg.vecdot(powers, logits)
            sum_t = shift_t.exp() * sum_t + powers.sum(1)
        else:
            sum_t = shift_t.exp() * sum_t + logits.exp_().sum(1)
        max_t = new_max_t
    # NaN where a logit was NaN or +inf (the sum is NaN) and where all were -inf (it is 0).
    log_sum_t = torch.where(sum_t > 0, sum_t.log(), torch.nan)
    top2_t = torch.where(second_t > lowest, second_t - max_t, -torch.inf) - log_sum_t
    values = {
        "nll": torch.where(targets < 0, 0.0, log_sum_t + (max_t - target_t)),
        "lse": max_t + log_sum_t,
        "entropy": log_sum_t - weighted_t / sum_t,
        "top1_logprob": -log_sum_t,
        "top2_logprob": top2_t,
        "argmax": torch.where(log_sum_t.isnan(), -1, argmax_t),
    }
    return {name: values[name] for name in outputs}
