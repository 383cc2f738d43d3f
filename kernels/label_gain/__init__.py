"""Sparse label rows x what the labels have already received -> how much information each row would add (MIG)."""

from fastsel.kernels.label_gain.api import label_gain
from fastsel.kernels.label_gain.label_rows import LabelRows

__all__ = ["LabelRows", "label_gain"]
