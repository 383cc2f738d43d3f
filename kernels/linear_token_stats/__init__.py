"""Hidden states x vocabulary -> per-token statistics of the next-token distribution, never the logits."""

from fastsel.kernels.linear_token_stats.api import LinearTokenStats, linear_token_stats

__all__ = ["LinearTokenStats", "linear_token_stats"]
