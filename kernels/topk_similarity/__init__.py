"""Exact nearest neighbours: queries x points -> the k most similar points of each query, never the similarities."""

from fastsel.kernels.topk_similarity.api import TopK, topk_similarity

__all__ = ["TopK", "topk_similarity"]
