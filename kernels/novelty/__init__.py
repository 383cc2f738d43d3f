"""Rows x picks -> how new each row is: its distances to the picks, the nearer the heavier."""

from fastsel.kernels.novelty.api import novelty

__all__ = ["novelty"]
