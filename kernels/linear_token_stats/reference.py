"""linear_token_stats as its formulas read: all logits at once."""

import torch


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
    logits_tv = hidden.to(dtype) @ weight.to(dtype).T
    if bias is not None:
        logits_tv += bias.to(dtype)
    logits_tv = scale * logits_tv
    if softcap is not None:
        logits_tv = softcap * torch.tanh(logits_tv / softcap)
    lse_t = torch.logsumexp(logits_tv, dim=1)
    lse_t = torch.where(torch.isfinite(lse_t), lse_t, torch.nan)
    logprobs_tv = logits_tv - lse_t[:, None]
    words_v = torch.arange(weight.shape[0], device=hidden.device)
    top1_t = logprobs_tv.amax(1)
    # Spelt out because torch.argmax promises no particular index on ties; no word equals a NaN maximum.
    argmax_t = torch.where(logprobs_tv == top1_t[:, None], words_v, weight.shape[0]).amin(1)
    top2_t = torch.where(words_v == argmax_t[:, None], -torch.inf, logprobs_tv).amax(1)
    target_logprobs_t = logprobs_tv.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    values = {
        "nll": torch.where(targets < 0, 0.0, -target_logprobs_t),
        "lse": lse_t,
        "entropy": torch.special.entr(logprobs_tv.exp()).sum(1),
        "top1_logprob": top1_t,
        "top2_logprob": top2_t,
        "argmax": torch.where(lse_t.isnan(), -1, argmax_t),
    }
    return {name: values[name] for name in outputs}
