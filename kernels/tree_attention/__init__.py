"""Attention over packed segments that form a forest: a token sees its ancestors and its own past."""

from fastsel.kernels.tree_attention.api import IMPLEMENTATIONS, tree_attention
from fastsel.kernels.tree_attention.gradient import tree_attention_gradient
from fastsel.kernels.tree_attention.segments import Segments

__all__ = ["IMPLEMENTATIONS", "Segments", "tree_attention", "tree_attention_gradient"]
