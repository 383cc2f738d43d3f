"""Rows x picks -> how new each row is: its distances to the picks, the nearer the heavier."""

from fastsel.kernels.novelty.api import novelty
from fastsel.kernels.novelty.columns import similarity_columns

__all__ = ["novelty", "similarity_columns"]
