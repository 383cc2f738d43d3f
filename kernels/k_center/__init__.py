"""Points x new centres -> squared distance of each point to its nearest centre, never the distances between them."""

from fastsel.kernels.k_center.api import FARTHEST_BLOCK, KCenter, k_center

__all__ = ["FARTHEST_BLOCK", "KCenter", "k_center"]
